"""The gate: judges the adapter that a run offers, from the files on disk, against the initial one.

`judge.py` holds the order of the checks, and `verdict.py` what gate.json says. Each other file is
one check: the run's files, the tensors, the LoRA products, the tiers' updates, the fit to the base
model, losses on held-out examples, fusing, and the proof from a fresh process. The audit of one
adapter without an initial one is adapter_audit.py, with adapter_layout.py for what it should hold.
"""

from nested_core.gate.judge import judge_run, recheck_verdict, verify_adapters
from nested_core.gate.run_evidence import digests_for_result
from nested_core.gate.verdict import Reason, Verdict

__all__ = [
    "Reason",
    "Verdict",
    "recheck_verdict",
    "digests_for_result",
    "judge_run",
    "verify_adapters",
]
