"""The checks of the gate; `nested_core.gate.judge` has them in order, for a run.

judged.py is what a check is, file_checks.py the list of those that need no model; each other file
has the checks of what it is named for. Each says after which other checks it cannot be made. Those
of file_checks.py read files alone, and `promote` makes a run's again; all others need the base.
"""
