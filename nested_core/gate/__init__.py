"""The gate: compares a run's trained adapter with its initial adapter, from the files on disk.

judge.py lists the checks in order, checks/ implements them, and checks/judged.py defines what a
check is and the state that checks share. records/verdict.py defines gate.json, the result.
evidence/ reads what the run and the registry recorded, tensors/ compares adapters without a model,
nested_core/measure computes losses and answers, and proof/ judges what a fresh process computes.
recheck.py compares a recorded verdict with its files again, for `promote`.
"""
