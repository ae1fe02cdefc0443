"""The small parent that begins a command again where it is killed (restarting.py)."""
