"""The live view of a run in a terminal: the screen (screen.py), drawn anew (live_view.py)."""
