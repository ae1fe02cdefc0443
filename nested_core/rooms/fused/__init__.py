"""What fusing leaves of an adapter, as a check of the gate (fused.py)."""
