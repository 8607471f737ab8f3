"""One-sided reads: bytes out of another process's memory, which runs no code of ours for it."""
