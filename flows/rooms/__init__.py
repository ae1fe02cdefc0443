"""The commands and flows of rooms, a folder each; flows/cli.py lists the commands."""
