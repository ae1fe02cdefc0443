"""The gate: judges the adapter that a run offers, from the files on disk, against the initial one.

`judge.py` holds the order of the checks, `checks/` each of them, and `judged.py` what a check is
and what is known between two of them; what gate.json says is records/verdict.py. The others
measure: the run's files, the tensors, the LoRA products, the tiers' updates, losses on held-out
examples, answers, fusing, and the fresh process. The audit of one adapter without
an initial one is adapter_audit.py, with adapter_layout.py for what it should hold.
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
