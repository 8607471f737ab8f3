"""How bytes get from agents to ranks."""
