"""Find in a run's metrics whether, and from which step on, its training diverged."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from statistics import fmean, pstdev
from typing import Any

from nested_core.text.loss_format import format_loss

# A loss has diverged if it is above the first one by more than half of it and a nat a token.
DIVERGED_LOSS_FACTOR = 1.5
DIVERGED_LOSS_NATS = 1.0
MIN_LASTING_REPORTS = 3  # fewer reports of a risen training loss may be noise of the batches
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Divergence:
    """The first of the reports from which on a run's training loss or gradients had diverged.

    step: the optimizer step of that report.
    learning_rate: the highest that the run was trained with.
    first_loss: the loss of the run's first report; None if not finite.
    loss: the loss of the diverged report; None if not finite.
    has_risen: whether the loss diverged; otherwise only the gradient vanished or was not finite.
    reports: how many reports in a row say so until the end, of whichever loss says it longer.
    """

    step: int
    learning_rate: float
    first_loss: float | None
    loss: float | None
    has_risen: bool
    reports: int

    @property
    def is_certain(self) -> bool:
        """Whether the metrics alone prove the divergence, without held-out losses."""
        return self.has_risen and self.reports >= MIN_LASTING_REPORTS

    def __str__(self) -> str:
        """Say in one sentence what happened, at which step and at which learning rate."""
        event = f"from step {self.step} on no gradient was left"
        if self.has_risen:
            event = f"the loss left by step {self.step}: {format_loss(self.loss)}"
            if self.first_loss is not None:
                event += f" after {format_loss(self.first_loss)} at first"
        is_shown = not self.has_risen or self.loss is None or self.is_certain
        did = "diverged" if is_shown else "may have diverged"
        return f"training {did} at learning_rate {self.learning_rate:g}: {event}; lower the rate"


def find_divergence(
    records: Sequence[Report], adapter_step: int, learning_rate: float
) -> Divergence | None:
    """Return the divergence that lasted until `adapter_step`, the step that the adapter comes from.

    Training diverges if a loss rises far above its first value or is not finite (None in a record),
    or if the gradients are not finite or all zero.

    records: the lines of metrics.jsonl.

    Validation losses are looked at first, then training losses, then gradient norms. Training
    losses are of other rows at each step: they count only after the last validation loss, and where
    they are above what the earlier ones spread over. The rate is the highest of `learning_rate`,
    the configured one, and the reported ones. None if training never diverged, or recovered.
    """
    reports = [record for record in records if record["step"] <= adapter_step]
    rate = max([learning_rate, *(record.get("learning_rate") or 0.0 for record in reports)])
    validated, first, risen = _find_risen(reports, "val_loss")
    trained, first_trained, risen_trained = _find_risen(reports, "loss")
    if risen:
        count = max(len(risen), len(risen_trained))
        return Divergence(risen[0]["step"], rate, first, risen[0]["val_loss"], True, count)
    later = [r for r in risen_trained if not validated or r["step"] > validated[-1]["step"]]
    if later and _is_above_spread(trained, len(later)):
        return Divergence(later[0]["step"], rate, first_trained, later[0]["loss"], True, len(later))
    steps = [record for record in reports if "grad_norm" in record]
    diverged = _diverged_at_end(steps, [record["grad_norm"] in (None, 0.0) for record in steps])
    if not diverged:
        return None
    step, loss = diverged[0]["step"], diverged[0].get("loss")
    return Divergence(step, rate, None, loss, False, len(diverged))


def _find_risen(
    reports: Sequence[Report], key: str
) -> tuple[Sequence[Report], float | None, Sequence[Report]]:
    """Return the reports of a loss, the first finite one, and the diverged reports at the end."""
    losses = [record for record in reports if key in record]
    first = next((record[key] for record in losses if record[key] is not None), None)
    return losses, first, _diverged_at_end(losses, [_has_diverged(r[key], first) for r in losses])


def _is_above_spread(reports: Sequence[Report], count: int) -> bool:
    """Whether the mean loss of the last `count` is above the earlier ones' mean and deviation.

    A loss that is not finite (None) is above all others.
    """
    earlier = [r["loss"] for r in reports[:-count] if r["loss"] is not None]
    last = [math.inf if r["loss"] is None else r["loss"] for r in reports[-count:]]
    return not earlier or fmean(last) > fmean(earlier) + pstdev(earlier)


def _has_diverged(loss: float | None, first_loss: float | None) -> bool:
    """Whether a loss is not finite (None), or far above the run's first loss."""
    return loss is None or (
        first_loss is not None and loss > DIVERGED_LOSS_FACTOR * first_loss + DIVERGED_LOSS_NATS
    )


def _diverged_at_end(reports: Sequence[Report], flags: Sequence[bool]) -> Sequence[Report]:
    """Return the reports at the end whose flags all say diverged, oldest first."""
    count = len(list(takewhile(bool, reversed(flags))))
    return reports[len(reports) - count :]
