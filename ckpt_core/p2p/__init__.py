"""Engines that join take their weights by one-sided reads from the host pools of running agents, who run no code for it."""
