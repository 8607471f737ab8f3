"""Plans an update of many ranks on many hosts: each byte that a host's ranks need enters that host once, over even lanes."""
