"""Old runs and spare checkpoints go (pruning.py), and all of one adapter (housekeeping.py)."""
