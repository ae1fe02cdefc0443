"""The checks of the gate; `nested_core.gate.judge` lists them in the order in which they run.

judged.py defines a check, and file_checks.py has the checks that read files alone, which `promote`
repeats. The checks of all other files need the base model. Each check names the earlier checks
after whose failure it cannot run.
"""
