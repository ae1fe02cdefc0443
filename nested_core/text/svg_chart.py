"""Line charts as SVG, for the report's page and for Prefect's pages.

Long curves are thinned so that every peak is still visible. On a page, colours are CSS variables
with a fallback, so that a chart can be dark with the page; a standalone picture has its own
background and legend.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from nested_core.text.html_markup import Html, escaped_html

MAX_POINTS = 500  # of a curve
MAX_POINTS_WITH_DOTS = 60
LARGEST_DRAWN_VALUE = 1e15  # beside a larger one nothing else could be seen
LOGARITHMIC_AXIS_RATIO = 10.0  # largest over smallest value
TICKS = 5  # about so many an axis
CHARACTER_WIDTH, LINE_HEIGHT = 7, 16  # of labels, in the chart's units
RIGHT_MARGIN = 20  # room for the half of the last label that stands beyond its axis
LEGEND_WIDTH = 200  # of a curve's entry


@dataclass(frozen=True, slots=True)
class Point:
    """A point of a curve; `y` is None if the value was not finite."""

    x: float
    y: float | None


@dataclass(frozen=True)
class Curve:
    """A named line of a chart; `has_dots` marks its points if there are few."""

    name: str
    points: Sequence[Point]
    has_dots: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart's curves and titles; `x` and `y` name its axes."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    from_zero: bool = False


@dataclass(frozen=True)
class ChartStyle:
    """How a chart looks: its size in CSS pixels, and its colours in CSS.

    background: None if the page is to be seen behind it.
    has_legend: whether the curves' names are drawn in the chart.
    """

    width: int
    height: int
    label: str
    grid: str
    curves: Sequence[str]
    background: str | None = None
    has_legend: bool = False

    def curve_colour(self, number: int) -> str:
        """Return the colour of a curve by its index in the chart."""
        return self.curves[number % len(self.curves)]


STANDALONE_ATTRIBUTES = 'xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" '
CURVE_COLOURS = (
    *("#1f5fbf", "#b8500b", "#0b7a3e", "#8a3ab9", "#5f5a00"),
    *("#b3246b", "#00707a", "#6b4a2b"),
)
ON_PAGE = ChartStyle(
    width=436,  # legible at a phone's width, several beside each other on a screen
    height=250,
    label="var(--soft,#57606a)",
    grid="var(--line,#d5d9de)",
    curves=[f"var(--curve-{n},{colour})" for n, colour in enumerate(CURVE_COLOURS, start=1)],
)
STANDALONE = ChartStyle(
    width=720,
    height=300,
    label="#57606a",
    grid="#d5d9de",
    curves=CURVE_COLOURS,
    background="#ffffff",
    has_legend=True,
)


def decimate(points: Sequence[Point], limit: int = MAX_POINTS) -> list[Point]:
    """Thin a curve to at most `limit` points, keeping first, last and every extreme.

    The points between are cut into (limit - 2) / 2 stretches of equal length, and of each the
    lowest and the highest point are kept, so a single spike among 10,000 values stays. A stretch
    without a finite value keeps one point, as a gap.
    """
    if len(points) <= limit:
        return list(points)
    inner = points[1:-1]
    stretches = (limit - 2) // 2
    kept = [points[0]]
    for number in range(stretches):
        first = number * len(inner) // stretches
        stretch = inner[first : (number + 1) * len(inner) // stretches]
        finite = [(point.y, i) for i, point in enumerate(stretch) if point.y is not None]
        kept_indices = {min(finite)[1], max(finite)[1]} if finite else {0}
        kept += [stretch[index] for index in sorted(kept_indices)]
    return [*kept, points[-1]]


def draw_chart(chart: Chart, style: ChartStyle = ON_PAGE) -> Html:
    """Draw a chart as an SVG element; "" if it has no finite value.

    The vertical axis is logarithmic if its values span more than a factor of
    LOGARITHMIC_AXIS_RATIO, unless the chart begins at zero. A value that is None or beyond
    LARGEST_DRAWN_VALUE is a gap.
    """
    curves = [
        replace(curve, points=decimate([_drawable_point(p) for p in curve.points]))
        for curve in chart.curves
    ]
    values = [p.y for curve in curves for p in curve.points if p.y is not None]
    if not values:
        return Html("")
    x_axis = _linear_axis([p.x for curve in curves for p in curve.points])
    y_axis = _value_axis(values, from_zero=chart.from_zero)
    area = _Area.within(style, y_axis)
    unit = f"{chart.y} (logarithmic)" if y_axis.is_logarithmic else chart.y
    words = escaped_html(f"{chart.title}: {unit} by {chart.x}")
    parts = [
        f"<svg {'' if style.background is None else STANDALONE_ATTRIBUTES}"
        f'viewBox="0 0 {style.width} {style.height}" font-size="12" '
        f'role="img" aria-label="{words}"><title>{words}</title>'
    ]
    if style.background is not None:
        parts.append(f'<rect width="100%" height="100%" fill="{style.background}"/>')
    parts += _draw_axes(area, x_axis, y_axis, style, chart.x)
    if style.has_legend:
        parts += _draw_legend(curves, style, unit)
    for number, curve in enumerate(curves):
        parts += _draw_curve(curve, area, x_axis, y_axis, style.curve_colour(number))
    return Html("".join([*parts, "</svg>"]))


@dataclass(frozen=True)
class _Axis:
    """A range of values with the round ones that are labelled."""

    low: float
    high: float
    ticks: Sequence[float]
    is_logarithmic: bool = False

    def share(self, value: float) -> float:
        """Return a value's position along the axis, from 0 to 1."""
        if self.is_logarithmic:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


@dataclass(frozen=True)
class _Area:
    """The rectangle of the curves within the chart, in CSS pixels."""

    left: float
    right: float
    top: float
    bottom: float

    @classmethod
    def within(cls, style: ChartStyle, y_axis: _Axis) -> _Area:
        """Return the area that is left for the curves beside the labels of the y axis."""
        widest = max((len(_format_tick(tick)) for tick in y_axis.ticks), default=0)
        return cls(
            left=widest * CHARACTER_WIDTH + LINE_HEIGHT,
            right=style.width - RIGHT_MARGIN,
            top=LINE_HEIGHT * (2 if style.has_legend else 1),
            bottom=style.height - 2.5 * LINE_HEIGHT,
        )

    def x(self, share: float) -> float:
        """Convert a position along the x axis (0 to 1) to pixels from the chart's left edge."""
        return self.left + (self.right - self.left) * share

    def y(self, share: float) -> float:
        """Convert a position along the y axis (0 to 1) to pixels from the chart's upper edge."""
        return self.bottom - (self.bottom - self.top) * share


def _drawable_point(point: Point) -> Point:
    """Limit a point to LARGEST_DRAWN_VALUE: a larger y becomes a gap."""
    is_within = point.y is None or abs(point.y) <= LARGEST_DRAWN_VALUE
    if is_within and point.x <= LARGEST_DRAWN_VALUE:
        return point
    return Point(min(point.x, LARGEST_DRAWN_VALUE), point.y if is_within else None)


def _value_axis(values: Sequence[float], *, from_zero: bool) -> _Axis:
    """Choose the vertical axis: logarithmic for a wide range of positive values, else linear."""
    low, high = min(values), max(values)
    if not from_zero and low > 0 and high >= LOGARITHMIC_AXIS_RATIO * low:
        return _Axis(low, high, _logarithmic_ticks(low, high), is_logarithmic=True)
    return _linear_axis([*values, 0.0] if from_zero else values)


def _linear_axis(values: Sequence[float]) -> _Axis:
    """Return a linear axis over the values; if all are equal, the axis includes zero."""
    low, high = min(values), max(values)
    if low == high:
        low, high = (-1.0, 1.0) if low == 0 else (min(low, 0.0), max(high, 0.0))
    step = _round_step((high - low) / TICKS)
    if all(value == int(value) for value in values):
        step = max(step, 1.0)
    first, last = math.ceil(low / step), math.floor(high / step)
    return _Axis(low, high, [number * step for number in range(first, last + 1)])


def _round_step(step: float) -> float:
    """Round a step up to 1, 2 or 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= step * 0.999)


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    """Return the labelled values of a logarithmic axis: powers of ten, and 2 and 5 between.

    low, high: the ends of the axis.
    """
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    return inside[:: max(1, len(inside) // 6)]


def _format_tick(value: float) -> str:
    """Format the label of an axis."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _draw_axes(
    area: _Area, x_axis: _Axis, y_axis: _Axis, style: ChartStyle, name: str
) -> Iterator[str]:
    """Yield the SVG of axes: a line and a label at each round value, and the x axis's name."""
    for tick in y_axis.ticks:
        y = area.y(y_axis.share(tick))
        yield _line(area.left, y, area.right, y, style.grid)
        yield _text(area.left - 6, y + 4, _format_tick(tick), style.label, "end")
    for tick in x_axis.ticks:
        x = area.x(x_axis.share(tick))
        yield _line(x, area.bottom, x, area.bottom + 4, style.grid)
        yield _text(x, area.bottom + LINE_HEIGHT, _format_tick(tick), style.label, "middle")
    middle = (area.left + area.right) / 2
    yield _text(middle, area.bottom + 2 * LINE_HEIGHT, name, style.label, "middle")


def _draw_legend(curves: Sequence[Curve], style: ChartStyle, unit: str) -> Iterator[str]:
    """Yield the SVG of the legend: the curves' names and colours, and the y axis's unit."""
    for number, curve in enumerate(curves):
        x = LINE_HEIGHT + number * LEGEND_WIDTH
        yield f'<path d="M{x} 14h18" stroke="{style.curve_colour(number)}" stroke-width="3"/>'
        yield _text(x + 24, 18, curve.name, style.label, "start")
    yield _text(style.width - RIGHT_MARGIN, 18, unit, style.label, "end")


def _draw_curve(
    curve: Curve, area: _Area, x_axis: _Axis, y_axis: _Axis, colour: str
) -> Iterator[str]:
    """Yield the SVG of a curve: a line between gaps, with dots for few or isolated points."""
    lines = [
        [f"{area.x(x_axis.share(x)):.1f} {area.y(y_axis.share(y)):.1f}" for x, y in points]
        for points in _split_at_gaps(curve.points)
    ]
    path = "".join(f"M{'L'.join(line)}" for line in lines if len(line) > 1)
    if path:
        yield f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="1.5"/>'
    is_dotted = curve.has_dots and len(curve.points) <= MAX_POINTS_WITH_DOTS
    for line in lines:
        for position in line if is_dotted or len(line) == 1 else ():
            x, y = position.split()
            yield f'<circle cx="{x}" cy="{y}" r="2.5" fill="{colour}"/>'


def _split_at_gaps(points: Iterable[Point]) -> list[list[tuple[float, float]]]:
    """Split points into stretches without a gap (a y of None); empty stretches are left out."""
    stretches: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point.y is None:
            stretches.append([])
        else:
            stretches[-1].append((point.x, point.y))
    return [stretch for stretch in stretches if stretch]


def _line(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    """Return the SVG of a line.

    x1, y1, x2, y2: start and end in CSS pixels from the chart's upper left corner.
    """
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}"/>'


def _text(x: float, y: float, words: str, colour: str, anchor: str) -> str:
    """Return the SVG of a text; `anchor` is SVG's text-anchor.

    x, y: position in CSS pixels from the chart's upper left corner.
    """
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}">'
        f"{escaped_html(words)}</text>"
    )
