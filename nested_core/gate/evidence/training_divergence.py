"""Where a run's training diverged, from its metrics: at which step its loss left."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from nested_core.text.loss_format import format_loss

# A loss has diverged if it is above the first one by more than half of it and a nat a token.
DIVERGED_LOSS_FACTOR = 1.5
DIVERGED_LOSS_NATS = 1.0
MIN_LASTING_REPORTS = 3  # fewer reports of a risen training loss may be noise of the batches
Report = Mapping[str, Any]


@dataclass(frozen=True)
class Divergence:
    """The report from which on a run's losses or gradients are not those of training any more.

    step: the optimizer step of that report.
    first_loss, loss: of the first report, and of this one; None if not finite.
    has_risen: whether the loss left, and not the gradient alone.
    reports: how many reports there are from this one on.
    """

    step: int
    learning_rate: float
    first_loss: float | None
    loss: float | None
    has_risen: bool
    reports: int

    @property
    def is_certain(self) -> bool:
        """Whether the metrics alone show it, without held-out losses."""
        return self.has_risen and self.reports >= MIN_LASTING_REPORTS

    def __str__(self) -> str:
        """What happened, in one sentence that names the step and the learning rate."""
        if self.has_risen:
            loss = format_loss(self.loss)
            first = (
                "" if self.first_loss is None else f" after {format_loss(self.first_loss)} at first"
            )
            what = f"the loss left by step {self.step}: {loss}{first}"
        else:
            what = f"from step {self.step} on no gradient was left"
        return f"training diverged at learning_rate {self.learning_rate:g}: {what}; lower the rate"


def find_divergence(
    records: Sequence[Report], adapter_step: int, learning_rate: float
) -> Divergence | None:
    """The divergence that lasted to `adapter_step`, the step that the adapter comes from.

    `learning_rate` is the configured one, for a report that has none. None for training that came
    back, or never left.
    """
    reports = [record for record in records if record["step"] <= adapter_step]
    for key in ("val_loss", "loss"):
        losses = [record for record in reports if key in record]
        first = next((r[key] for r in losses if r[key] is not None), None)
        off = _diverged_reports_at_end(
            losses, [_has_diverged(record[key], first) for record in losses]
        )
        if off:
            rate = off[0].get("learning_rate") or learning_rate
            return Divergence(off[0]["step"], rate, first, off[0][key], True, len(off))
    steps = [record for record in reports if "grad_norm" in record]
    off = _diverged_reports_at_end(steps, [record["grad_norm"] in (None, 0.0) for record in steps])
    if not off:
        return None
    rate = off[0].get("learning_rate") or learning_rate
    return Divergence(off[0]["step"], rate, None, off[0].get("loss"), False, len(off))


def _has_diverged(loss: float | None, first_loss: float | None) -> bool:
    return loss is None or (
        first_loss is not None and loss > DIVERGED_LOSS_FACTOR * first_loss + DIVERGED_LOSS_NATS
    )


def _diverged_reports_at_end(
    reports: Sequence[Report], has_diverged: Sequence[bool]
) -> Sequence[Report]:
    """The reports at the end that have all diverged, oldest first."""
    count = len(list(takewhile(bool, reversed(has_diverged))))
    return reports[len(reports) - count :]
