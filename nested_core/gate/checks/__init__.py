"""The checks of the gate; `nested_core.gate.judge` has them in order, for a run.

Each says after which other checks it cannot be made. Those in tensors.py and updates.py read an
adapter's files alone, and `promote` makes them again; all others need the base model.
"""
