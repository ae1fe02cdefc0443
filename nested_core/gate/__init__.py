"""The gate: compares a run's trained adapter with its initial adapter, from the files on disk.

judge.py lists the checks in order, checks/ implements them, and checks/judged.py defines what a
check is and the state that checks share. records/verdict.py defines gate.json, the result.
evidence/ reads what the run and the registry recorded, tensors/ compares adapters without a model,
nested_core/measure computes losses and answers, and proof/ judges what a fresh process computes.
recheck.py compares a recorded verdict with its files again, for `promote`.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nested_core.gate.evidence.run_evidence import digests_for_result
from nested_core.records.verdict import Reason, Verdict

if TYPE_CHECKING:  # `promote` judges nothing anew, and need not wait for mlx-lm
    from nested_core.gate.judge import judge_run, verify_adapters

__all__ = ["Reason", "Verdict", "digests_for_result", "judge_run", "verify_adapters"]


def __getattr__(name: str) -> Any:
    """Import judge.py, and with it mlx-lm, only when one of its functions is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.judge"), name)
