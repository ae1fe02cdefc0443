"""What a run and the registry recorded, for the checks of the gate; no model is loaded.

run_evidence.py holds a run's files against their digests and its updates against the tiers'
clocks, training_divergence.py finds in the metrics where the loss left, and champion_adapter.py
finds the champion of the moment.
"""
