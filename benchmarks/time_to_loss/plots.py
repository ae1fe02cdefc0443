"""A chart of losses as SVG, written by hand: a line and a band a series, a legend at the side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, LEGEND = 1180, 640, 330
LEFT, TOP, BOTTOM = 76, 48, 60
RIGHT, FLOOR = WIDTH - LEGEND, HEIGHT - BOTTOM
DASHES = {"": "none", "accumulate": "9 4", "scaled": "2 4", "accumulate+scaled": "9 4 2 4"}
MARKS = (1, 2, 5)


@dataclass(frozen=True)
class Series:
    """A line: its points, and the range about them."""

    name: str
    places: Sequence[float]
    means: Sequence[float]
    lows: Sequence[float]
    highs: Sequence[float]


@dataclass(frozen=True)
class Chart:
    """What is drawn; the losses on a logarithmic axis, `end` is the last place on the other."""

    title: str
    axis: str
    end: float
    series: Sequence[Series]
    target: float
    target_name: str


class Frame:
    """From places and losses to points of the picture."""

    def __init__(self, chart: Chart) -> None:
        self.end = chart.end
        shown = [
            loss
            for each in chart.series
            for place, *losses in zip(each.places, each.lows, each.highs, strict=True)
            for loss in losses
            if place <= chart.end and 0 < loss < math.inf
        ]
        self.low, self.high = min(*shown, chart.target) / 1.1, max(*shown, chart.target) * 1.1

    def x(self, place: float) -> float:
        """From the left edge of the picture."""
        return LEFT + (RIGHT - LEFT) * place / self.end

    def y(self, loss: float) -> float:
        """From its upper edge; what is off the axis lies on its end."""
        bounded = min(max(loss, self.low), self.high)
        share = math.log(bounded / self.low) / math.log(self.high / self.low)
        return FLOOR - (FLOOR - TOP) * share

    def points(self, places: Sequence[float], losses: Sequence[float]) -> str:
        """A path's points up to the end of the axis."""
        pairs = [(p, q) for p, q in zip(places, losses, strict=True) if p <= 1.0001 * self.end]
        return " ".join(f"{self.x(place):.1f},{self.y(loss):.1f}" for place, loss in pairs)


def draw(chart: Chart) -> str:
    """The chart as an SVG document."""
    frame = Frame(chart)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="13">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        text(LEFT, 28, chart.title, size=17),
        *axes(chart, frame),
        *(band(each, frame) for each in chart.series),
        *(line(each, frame) for each in chart.series),
        *target(chart, frame),
        *legend(chart.series),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def axes(chart: Chart, frame: Frame) -> list[str]:
    """Both axes with their marks and what they show."""
    parts = []
    for loss in marks_of_losses(frame.low, frame.high):
        y = frame.y(loss)
        parts.append(stroke(LEFT, y, RIGHT, y, "#e4e4e4"))
        parts.append(text(LEFT - 8, y + 4, f"{loss:g}", anchor="end"))
    for place in marks_of_places(chart.end):
        x = frame.x(place)
        parts.append(stroke(x, FLOOR, x, FLOOR + 5, "#444"))
        parts.append(text(x, FLOOR + 20, f"{place:g}", anchor="middle"))
    middle = (TOP + FLOOR) / 2
    parts += [stroke(LEFT, FLOOR, RIGHT, FLOOR, "#444"), stroke(LEFT, TOP, LEFT, FLOOR, "#444")]
    parts.append(text((LEFT + RIGHT) / 2, HEIGHT - 14, chart.axis, anchor="middle"))
    turned = f'<g transform="rotate(-90 20 {middle})">'
    parts.append(turned + text(20, middle, "validation loss, nats/token", anchor="middle") + "</g>")
    return parts


def marks_of_losses(low: float, high: float) -> list[float]:
    """1, 2 and 5 times powers of ten within a range."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    every = [mark * 10.0**power for power in powers for mark in MARKS]
    return [mark for mark in every if low <= mark <= high]


def marks_of_places(end: float) -> list[float]:
    """Round places from 0 to the end, ten at most."""
    power = 10.0 ** math.floor(math.log10(end / 10))
    step = next(power * mark for mark in (*MARKS, 10) if end / (power * mark) <= 10)
    return [round(step * n, 10) for n in range(int(end / step + 1e-9) + 1)]


def band(series: Series, frame: Frame) -> str:
    """The range over seeds."""
    there = frame.points(series.places, series.highs).split()
    back = frame.points(series.places, series.lows).split()
    points = " ".join([*there, *reversed(back)])
    return f'<polygon points="{points}" fill="{colour(series.name)}" opacity="0.09"/>'


def line(series: Series, frame: Frame) -> str:
    """The mean over seeds."""
    points = frame.points(series.places, series.means)
    return f'<polyline points="{points}" fill="none" {look(series.name)}/>'


def target(chart: Chart, frame: Frame) -> list[str]:
    """The loss that is to be reached."""
    y = frame.y(chart.target)
    words = f"{chart.target_name}, {chart.target:.3f}"
    return [stroke(LEFT, y, RIGHT, y, "#000", "3 3"), text(LEFT + 10, y - 6, words)]


def legend(series: Sequence[Series]) -> list[str]:
    """Each line with its name, in the order in which they end."""
    parts = []
    for row, each in enumerate(sorted(series, key=lambda each: -each.means[-1])):
        y = TOP + 14 + 24 * row
        parts.append(f'<path d="M {RIGHT + 18} {y - 4} h 44" fill="none" {look(each.name)}/>')
        parts.append(text(RIGHT + 70, y, each.name))
    return parts


def look(name: str) -> str:
    """Colour, width and dashes of an arm; the two uniform ones are thick."""
    mode = "+".join(word for word in ("accumulate", "scaled") if word in name.split("+"))
    width = 3.2 if "+" not in name else 1.8
    return f'stroke="{colour(name)}" stroke-width="{width}" stroke-dasharray="{DASHES[mode]}"'


def colour(name: str) -> str:
    """Black for the rival, blue for our uniform updates, reds for deep fast, greens for shallow."""
    if "+" not in name:
        return "#1f5fd6" if name == "ours" else "#000000"
    deep = {"1-2": "#f08c00", "1-4-16": "#7a1f1f", "frozen": "#b07aa1"}
    shallow = {"1-2": "#9acd32", "1-4-16": "#0b5345", "frozen": "#6f6f6f"}
    words = name.split("+")
    own = deep if "deep" in words else shallow
    usual = "#d62728" if "deep" in words else "#2ca02c"
    return next((own[word] for word in words if word in own), usual)


def stroke(x1: float, y1: float, x2: float, y2: float, ink: str, dashes: str = "none") -> str:
    """A straight line."""
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{ink}" stroke-dasharray="{dashes}"/>'


def text(x: float, y: float, words: str, *, anchor: str = "start", size: int = 13) -> str:
    """Words at a place."""
    where = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}"'
    return f"<text {where}>{escape(words)}</text>"
