"""Learns from an engine's own loader, run once without data, which slice of the checkpoint lands where; and replays it."""
