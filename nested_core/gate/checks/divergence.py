"""The checks for training that diverged: by the trainer's last logits and its training loss."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from nested_core.gate.checks.base import WITHOUT_MODEL
from nested_core.gate.checks.judged import Check, CheckedRun
from nested_core.gate.checks.losses import LOSSES
from nested_core.gate.checks.tensors import CHANGE
from nested_core.gate.proof.fresh_process_check import is_constant
from nested_core.records.verdict import Code, Reason


def _find_collapse(judged: CheckedRun) -> Iterator[Reason]:
    """Yield a reason if the trainer's logits are all non-finite, or the same for every token."""
    values = np.array(judged.evidence.record.logits.values, np.float64)  # None becomes NaN
    if values.ndim != 2 or not values.size:
        return
    if not np.isfinite(values).any():
        yield Reason("non_finite", "no logit that the trainer computed with it is finite")
    elif is_constant(values):
        message = "every logit that the trainer computed with it is the same: numbers overflowed"
        yield Reason("non_finite", message)


def _find_risen_training_loss(judged: CheckedRun) -> Iterator[Reason]:
    """Yield a reason if the training loss diverged and no held-out losses were measured."""
    divergence = judged.divergence
    if divergence is not None and divergence.is_certain and judged.verdict.validation is None:
        code: Code = "non_finite" if divergence.loss is None else "loss_regressed"
        yield Reason(code, "the training loss is far above where it began")


COLLAPSE = Check(
    "trainer's logits", _find_collapse, stopped_by=(*WITHOUT_MODEL, *CHANGE, LOSSES), is_cause=True
)
TRAINING_LOSS = Check(
    "training loss", _find_risen_training_loss, stopped_by=(*WITHOUT_MODEL, *CHANGE, COLLAPSE)
)
