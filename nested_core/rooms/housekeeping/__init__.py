"""Old runs and spare checkpoints go (run_removal.py), and all of one adapter (housekeeping.py)."""
