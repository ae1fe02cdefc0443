"""The losses of a run over its steps: in bounded memory, drawn as a picture, and in numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from nested_core.text.loss_format import format_loss
from nested_core.text.markdown_page import MarkdownPage
from nested_core.text.svg_chart import STANDALONE, Chart, Point, draw_chart
from nested_core.text.svg_chart import Curve as ChartCurve
from nested_core.training.loss_sentences import (
    StepLoss,
    describe_training_loss,
    describe_validation_loss,
)
from nested_core.training.training_plan import TrainingPlan

MAX_CURVE_POINTS = 400  # of a curve; above it every second one is dropped
MAX_SHOWN_EVALUATIONS = 12


class Curve:
    """Losses by step; of many, the first, the last and evenly spaced ones between them."""

    def __init__(self) -> None:
        self.points: list[tuple[int, float]] = []
        self.last: StepLoss | None = None
        self.lowest: tuple[int, float] | None = None
        self._last_point: tuple[int, float] | None = None
        self._every = 1
        self._added = 0

    def add(self, step: int, loss: float | None) -> None:
        """Add a loss in nats a token; one that is not finite has no place on the curve."""
        if loss is None or not math.isfinite(loss):
            self.last = (step, None)
            return
        point = (step, loss)
        self.last = self._last_point = point
        if self.lowest is None or loss < self.lowest[1]:
            self.lowest = point
        if self._added % self._every == 0:
            self.points.append(point)
        self._added += 1
        if len(self.points) > MAX_CURVE_POINTS:
            self.points = self.points[::2]
            self._every *= 2

    def points_to_draw(self) -> list[tuple[int, float]]:
        """The points to draw: what is kept, and the last one."""
        points = list(self.points)
        if self._last_point is not None and points[-1] != self._last_point:
            points.append(self._last_point)
        return points


@dataclass(frozen=True)
class LossCurves:
    """The training loss and the validation loss of a run."""

    training: Curve
    validation: Curve

    @classmethod
    def of_records(cls, records: Iterable[Mapping[str, Any]]) -> LossCurves:
        """The losses that metrics.jsonl holds."""
        curves = cls(Curve(), Curve())
        for record in records:
            for key, curve in (("loss", curves.training), ("val_loss", curves.validation)):
                if key in record:
                    curve.add(record["step"], record[key])
        return curves

    def describe(self, plan: TrainingPlan | None = None) -> str:
        """The last losses with their steps, and the lowest; with a plan, each with its data."""
        parts = []
        if self.training.last is not None:
            parts.append(f"training loss {describe_training_loss(self.training.last, plan)}")
        if self.validation.last is not None:
            last, lowest = self.validation.last, self.validation.lowest
            parts.append(f"validation loss {describe_validation_loss(last, lowest, plan)}")
        return "; ".join(parts) or "no report yet"


def describe_curves(curves: LossCurves, steps: int, dataset: str) -> MarkdownPage:
    """A page of the losses: the latest in words, the picture, and the last evaluations."""
    page = MarkdownPage("Loss while training")
    page.add_paragraph(
        f"{curves.describe()}. In nats a token, of {steps:,} steps; training loss on the train "
        f"split, validation loss on the valid split of {dataset}."
    )
    picture = draw_curves(curves, steps)
    if picture:
        page.add_picture(picture, "training and validation loss over steps")
    rows = curves.validation.points_to_draw()[-MAX_SHOWN_EVALUATIONS:]
    if rows:
        page.add_table(("step", "validation loss"), rows)
    return page


def draw_curves(curves: LossCurves, steps: int) -> str:
    """Both losses over the steps so far as SVG, "" before the first; our own words alone."""
    named = (("training loss", curves.training), ("validation loss", curves.validation))
    drawn = [
        ChartCurve(
            f"{name} {format_loss(points[-1][1])}" if points else f"{name}: none yet",
            [Point(step, loss) for step, loss in points],
            has_dots=True,
        )
        for name, curve in named
        for points in [curve.points_to_draw()]
    ]
    return draw_chart(Chart("Loss", f"step, of {steps:,}", "nats a token", drawn), STANDALONE)
