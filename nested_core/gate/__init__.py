"""The gate: judges the adapter that a run offers, from the files on disk, against the initial one.

judge.py has the order of the checks, checks/ each of them, and checks/judged.py what a check is
and what is known between two of them; what gate.json says is records/verdict.py. For the checks
evidence/ reads what the run and the registry recorded, tensors/ compares adapters without a model,
nested_core/measure asks models, and proof/ judges what a fresh process computes.
recheck.py holds a verdict to its files again, for `promote`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nested_core.gate.evidence.run_evidence import digests_for_result
from nested_core.records.verdict import Reason, Verdict

if TYPE_CHECKING:  # `promote` judges nothing anew, and need not wait for mlx-lm
    from nested_core.gate.judge import judge_run, verify_adapters

__all__ = ["Reason", "Verdict", "digests_for_result", "judge_run", "verify_adapters"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.judge"), name)
