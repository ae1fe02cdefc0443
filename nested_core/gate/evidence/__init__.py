"""What a run and the registry recorded, for the checks of the gate; no model is loaded.

run_evidence.py compares a run's files with their recorded digests and reads its update counts.
training_divergence.py finds in the metrics where the loss diverged. champion_adapter.py finds the
champion at the time of the gate.
"""
