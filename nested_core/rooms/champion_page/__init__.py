"""An adapter's page: its champion and those before it (champion.py)."""
