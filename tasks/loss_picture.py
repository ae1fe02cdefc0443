"""The losses of a run over its steps: in bounded memory, drawn as a picture, and in numbers.

Drawn here and not by nested_core/report/line_charts.py: that needs the extra `report`, which a
worker may lack, and takes its colours from a page, which a picture in Prefect's pages cannot.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from nested_core.text.loss_format import format_loss
from nested_core.training.loss_sentences import (
    StepLoss,
    describe_training_loss,
    describe_validation_loss,
)
from nested_core.training.training_plan import TrainingPlan
from tasks.markdown_page import MarkdownPage

MAX_CURVE_POINTS = 400  # of a curve; above it every second one is dropped
MAX_SHOWN_EVALUATIONS = 12
WIDTH, HEIGHT = 720, 300
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 34, 40  # margins of the drawing
LOG_AXIS_MIN_LOSS_RATIO = 20.0  # largest over smallest loss, from which the axis shows powers
AXIS_INTERVALS = 4
TRAINING_COLOUR, VALIDATION_COLOUR, GRID_COLOUR = "#1f77b4", "#d62728", "#d8d8d8"

Point = tuple[int, float]


class Curve:
    """Losses by step; of many, the first, the last and evenly spaced ones between them."""

    def __init__(self) -> None:
        self.points: list[Point] = []
        self.last: StepLoss | None = None
        self.lowest: Point | None = None
        self._last_point: Point | None = None
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

    def points_to_draw(self) -> list[Point]:
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
            parts.append(describe_training_loss(self.training.last, plan))
        if self.validation.last is not None:
            parts.append(
                describe_validation_loss(self.validation.last, self.validation.lowest, plan)
            )
        return "; ".join(parts) or "no report yet"


def describe_curves(curves: LossCurves, steps: int, dataset: str) -> MarkdownPage:
    """A page of the losses: the latest in words, the picture, and the last evaluations."""
    page = MarkdownPage("Loss while training")
    page.add_paragraph(
        f"{curves.describe()}. In nats a token, of {steps:,} steps; training loss on the train "
        f"split, validation loss on the valid split of {dataset}."
    )
    page.add_picture(draw_curves(curves, steps), "training and validation loss over steps")
    rows = curves.validation.points_to_draw()[-MAX_SHOWN_EVALUATIONS:]
    if rows:
        page.add_table(("step", "validation loss"), rows)
    return page


def draw_curves(curves: LossCurves, steps: int) -> str:
    """Both losses over the steps so far as SVG; numbers and our own words alone."""
    training, validation = curves.training.points_to_draw(), curves.validation.points_to_draw()
    losses = [loss for _, loss in (*training, *validation)]
    axis = _LossAxis.over(losses)
    last_step = max([1, *(step for step, _ in (*training, *validation))])

    def to_xy(point: Point) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * point[0] / last_step
        return f"{x:.1f},{axis.y_of(point[1]):.1f}"

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        *axis.draw_grid(),
        *_draw_step_axis(last_step, steps),
        *_draw_curve(training, to_xy, TRAINING_COLOUR, "training loss", LEFT),
        *_draw_curve(validation, to_xy, VALIDATION_COLOUR, "validation loss", LEFT + 200),
        "</svg>",
    ]
    return "".join(parts)


@dataclass(frozen=True)
class _LossAxis:
    """The vertical axis: linear, or logarithmic where the losses differ by much."""

    low: float
    high: float
    is_logarithmic: bool

    @classmethod
    def over(cls, losses: Sequence[float]) -> _LossAxis:
        """From the lowest to the highest loss; a linear axis begins at zero or below."""
        low, high = min(losses, default=0.0), max(losses, default=1.0)
        is_logarithmic = low > 0 and high / low >= LOG_AXIS_MIN_LOSS_RATIO
        if is_logarithmic:
            return cls(low, high, is_logarithmic)
        low = min(low, 0.0)
        return cls(low, high if high > low else low + 1.0, is_logarithmic)

    def y_of(self, loss: float) -> float:
        """The distance from the upper edge."""
        share = self._share_of_height(loss)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - share)

    def _share_of_height(self, loss: float) -> float:
        if self.is_logarithmic:
            return math.log(loss / self.low) / math.log(self.high / self.low)
        return (loss - self.low) / (self.high - self.low)

    def draw_grid(self) -> Iterable[str]:
        """A line and its loss, a few times, and which kind of axis it is."""
        kind = "logarithmic" if self.is_logarithmic else "linear"
        yield f'<text x="{WIDTH - RIGHT}" y="20" text-anchor="end">loss axis: {kind}</text>'
        for index in range(AXIS_INTERVALS + 1):
            share = index / AXIS_INTERVALS
            loss = self.low + (self.high - self.low) * share
            if self.is_logarithmic:
                loss = self.low * (self.high / self.low) ** share
            y = self.y_of(loss)
            yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{GRID_COLOUR}"/>'
            yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{loss:.3g}</text>'


def _draw_step_axis(last_step: int, steps: int) -> Iterable[str]:
    """The steps so far, and of how many."""
    for index in range(AXIS_INTERVALS + 1):
        x = LEFT + (WIDTH - LEFT - RIGHT) * index / AXIS_INTERVALS
        step = f"{round(last_step * index / AXIS_INTERVALS):,}"
        anchor = "end" if index == AXIS_INTERVALS else "middle"
        yield f'<text x="{x:.1f}" y="{HEIGHT - 20}" text-anchor="{anchor}">{step}</text>'
    yield f'<text x="{(LEFT + WIDTH) // 2}" y="{HEIGHT - 4}" text-anchor="middle">'
    yield f"step, of {steps:,}</text>"


def _draw_curve(
    points: Sequence[Point], to_xy: Any, colour: str, name: str, legend_x: int
) -> Iterable[str]:
    """The curve with a dot at its end, a dot a point where they are few, and its legend."""
    yield f'<path d="M{legend_x} 16h18" stroke="{colour}" stroke-width="3"/>'
    latest = f" {format_loss(points[-1][1])}" if points else ": none yet"
    yield f'<text x="{legend_x + 24}" y="20">{name}{latest}</text>'
    if not points:
        return
    line = " ".join(map(to_xy, points))
    yield f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>'
    dotted = points if len(points) <= MAX_SHOWN_EVALUATIONS else points[-1:]
    for point in dotted:
        x, _, y = to_xy(point).partition(",")
        yield f'<circle cx="{x}" cy="{y}" r="3.5" fill="{colour}"/>'
