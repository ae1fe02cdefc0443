"""Processes of ours that answer requests: `Child` asks one, child_main.py is its program."""
