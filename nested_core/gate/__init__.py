"""The gate: what is on disk before and after training, compared by code that can say no."""

from nested_core.gate.evidence import describe_evidence
from nested_core.gate.judge import confirm_run, judge_run, verify_adapters
from nested_core.gate.losses import measure_test
from nested_core.gate.verdict import Reason, Verdict

__all__ = [
    "Reason",
    "Verdict",
    "confirm_run",
    "describe_evidence",
    "judge_run",
    "measure_test",
    "verify_adapters",
]
