"""Line charts as SVG for pages: drawn by leather, coloured by the page's variables.

Leather is the extra `report`; without it there is no chart, and pages show their tables alone. The
colours are CSS variables, with a fallback for a chart that stands by itself. docs/report.md says
why it is not matplotlib.
"""

from __future__ import annotations

import functools
import importlib.util
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from nested_core.report.curve_points import Point, decimate
from nested_core.text.html_markup import Html, collapsed, element, escaped_html, join, table

MAX_TABLE_ROWS = 200  # of a table of a curve's numbers
MAX_POINTS_WITH_DOTS = 60
WIDTH, HEIGHT = 420, 250  # legible at a phone's width, several beside each other on a screen
LAST_LABEL_MARGIN = 16  # room for the half of the last label that stands beyond its axis
LARGEST_DRAWN_VALUE = 1e15  # leather places ticks with 28 decimal digits
LOGARITHMIC_AXIS_RATIO = 10.0  # largest over smallest value
HOW_TO_GET_CHARTS = "No charts here: pip install 'nested-tune[report]' draws them."
_COLOURS = ("#1f5fbf", "#b8500b", "#0b7a3e", "#8a3ab9", "#5f5a00")
_LONG_FRACTION_PATTERN = re.compile(r'(?<=[ "-])(\d+\.\d)\d+(?=[ "])')  # of a pixel; labels stay
_ZERO_WITH_EXPONENT_PATTERN = re.compile(r'(?<=[ "])0E[-+]\d+(?=[ "])')  # as Decimal writes it
_SVG_OPENING_TAG_PATTERN = re.compile(r"^<svg[^>]*>")


@dataclass(frozen=True)
class Curve:
    """A named line of a chart."""

    name: str
    points: Sequence[Point]
    has_dots: bool = False


@dataclass(frozen=True)
class Chart:
    """What a chart shows; `x` and `y` name its axes."""

    title: str
    x: str
    y: str
    curves: Sequence[Curve]
    from_zero: bool = False


def can_draw_charts() -> bool:
    """Whether the extra `report` is installed."""
    return importlib.util.find_spec("leather") is not None


def draw_figure(charts: Sequence[Chart]) -> Html:
    """A figure: charts of the same numbers, a legend, and the numbers themselves in a table.

    The table is of the first chart: the others show its values over another x. Nothing where no
    curve has a finite point.
    """
    charts = [_without_empty_curves(chart) for chart in charts]
    first = charts[0]
    if not first.curves:
        return Html("")
    drawn = [draw_chart(chart) for chart in charts] if can_draw_charts() else []
    caption = element("figcaption", first.title, _draw_legend(first.curves))
    pictures = element("div", *drawn, class_="charts")
    numbers = collapsed("The numbers", _numbers_table(charts))
    return element("figure", caption, pictures, numbers, class_="wide" if len(charts) > 1 else "")


def _without_empty_curves(chart: Chart) -> Chart:
    curves = [curve for curve in chart.curves if any(p.y is not None for p in curve.points)]
    return replace(chart, curves=curves)


def _draw_legend(curves: Sequence[Curve]) -> Html:
    if len(curves) < 2:
        return Html("")
    keys = [
        join(
            (
                Html(f'<span class="key" style="background:{_curve_colour(number)}"></span>'),
                curve.name,
            )
        )
        for number, curve in enumerate(curves)
    ]
    return join(keys)


def _curve_colour(number: int) -> str:
    place = number % len(_COLOURS)
    return f"var(--curve-{place + 1},{_COLOURS[place]})"


def _numbers_table(charts: Sequence[Chart]) -> Html:
    """A row for each x of the first chart, with the x of the others as further columns.

    Of more than MAX_TABLE_ROWS those are shown, evenly spaced, at which all curves have a value.
    """
    chart, *others = charts
    values = [{point.x: point.y for point in curve.points} for curve in chart.curves]
    further = [_match_x_in_other_chart(chart, other) for other in others]
    places = sorted({x for curve in values for x in curve})
    total = len(places)
    if total > MAX_TABLE_ROWS:
        complete = [x for x in places if all(x in curve for curve in values)]
        places = complete if len(complete) > 1 else places
        places = [*places[: -1 : -(-len(places) // MAX_TABLE_ROWS)], places[-1]]
    rows = [
        [_to_int_if_whole(x), *(cells.get(x, Html("")) for cells in (*further, *values))]
        for x in places
    ]
    caption = f"{chart.title}: {chart.y} by {chart.x}"
    if len(places) < total:
        caption += f", {len(places)} of {total:,}; all: metrics.jsonl"
    names = [chart.x, *(other.x for other in others), *(curve.name for curve in chart.curves)]
    return table(caption, names, rows)


def _match_x_in_other_chart(chart: Chart, other: Chart) -> dict[float, float | None]:
    """Where the points of a chart stand in another one of the same points over another x."""
    pairs = zip(chart.curves, other.curves, strict=True)
    return {p.x: q.x for one, two in pairs for p, q in zip(one.points, two.points, strict=True)}


def _to_int_if_whole(x: float) -> float | int:
    return int(x) if float(x).is_integer() else x


def draw_chart(chart: Chart) -> Html:
    """The chart as an SVG element with a title; it needs the extra `report`.

    A vertical axis over more than a factor of LOGARITHMIC_AXIS_RATIO is logarithmic, unless the
    chart begins at zero. A value beyond LARGEST_DRAWN_VALUE is a gap, and nothing is drawn where no
    other is left.
    """
    curves = [
        replace(curve, points=decimate([_drawable_point(p) for p in curve.points]))
        for curve in chart.curves
    ]
    values = [p.y for curve in curves for p in curve.points if p.y is not None]
    if not values:
        return Html("")
    places = [p.x for curve in curves for p in curve.points]
    is_logarithmic = (
        not chart.from_zero
        and min(values) > 0
        and max(values) >= LOGARITHMIC_AXIS_RATIO * min(values)
    )
    leather = _load_leather()
    drawing = leather.chart()
    drawing.add_x_scale(min(places), max(places) if max(places) > min(places) else min(places) + 1)
    drawing.add_x_axis(tick_formatter=_format_tick, name=chart.x)
    if is_logarithmic:
        ticks = _logarithmic_ticks(min(values), max(values))
        drawing.add_y_scale(math.log10(min(values)), math.log10(max(values)))
        drawing.add_y_axis(ticks=[math.log10(tick) for tick in ticks], tick_formatter=_format_power)
    else:
        low, high = _axis_range(values, from_zero=chart.from_zero)
        drawing.add_y_scale(low, high)
        drawing.add_y_axis(tick_formatter=_format_tick)
    for number, curve in enumerate(curves):
        data = [(p.x, _axis_value(p.y, is_logarithmic=is_logarithmic)) for p in curve.points]
        series = leather.series(data)
        drawing.add_series(series, leather.line(_curve_colour(number), width=1.2))
        if len(data) == 1 or (curve.has_dots and len(data) <= MAX_POINTS_WITH_DOTS):
            drawing.add_series(series, leather.dots(_curve_colour(number), radius=2.5))
    scale = " (logarithmic)" if is_logarithmic else ""
    words = escaped_html(f"{chart.title}: {chart.y}{scale} by {chart.x}")
    opening = (
        f'<svg viewBox="0 0 {WIDTH + LAST_LABEL_MARGIN} {HEIGHT}" role="img" aria-label="{words}">'
    )
    written = io.StringIO()  # in a notebook, what `to_svg` returns is no text
    drawing.to_svg(written, width=WIDTH, height=HEIGHT)
    _, tag, drawn = written.getvalue().partition("<svg")  # after the header of a file
    svg = _ZERO_WITH_EXPONENT_PATTERN.sub("0", _LONG_FRACTION_PATTERN.sub(r"\1", tag + drawn))
    return Html(_SVG_OPENING_TAG_PATTERN.sub(f"{opening}<title>{words}</title>", svg))


def _drawable_point(point: Point) -> Point:
    x = min(point.x, LARGEST_DRAWN_VALUE)
    is_beyond = point.y is not None and abs(point.y) > LARGEST_DRAWN_VALUE
    return Point(x, None) if is_beyond else Point(x, point.y)


def _axis_value(value: float | None, *, is_logarithmic: bool) -> float | None:
    return math.log10(value) if is_logarithmic and value is not None else value


def _axis_range(values: Sequence[float], *, from_zero: bool) -> tuple[float, float]:
    """The ends of a linear axis: never the same."""
    low, high = min(values), max(values)
    if from_zero:
        low = min(low, 0.0)
    if high > low:
        return low, high
    return (low - 1, high + 1) if high == 0 else (min(low, 0.0), high + abs(high))


def _logarithmic_ticks(low: float, high: float) -> list[float]:
    """Round numbers within a range for a logarithmic axis: powers of ten, and 2 and 5 between."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    ticks = [factor * 10.0**power for power in powers for factor in factors]
    inside = [tick for tick in ticks if low <= tick <= high]
    every = max(1, len(inside) // 6)
    return inside[::every]


def _format_tick(value: Any, _index: int, _tick_count: int) -> str:
    number = float(value)
    return f"{number:,.0f}" if abs(number) >= 1000 else f"{number:.4g}"


def _format_power(value: Any, _index: int, _tick_count: int) -> str:
    return _format_tick(10.0 ** float(value), _index, _tick_count)


@dataclass(frozen=True)
class _LeatherLibrary:
    """What of leather a chart is made of; its shapes draw no legend, for the figure has one."""

    chart: Any
    series: Any
    line: Any
    dots: Any


@functools.cache
def _load_leather() -> _LeatherLibrary:
    """Leather, with its theme set: it is the library's own and there is one a process."""
    import leather
    from leather import theme

    class Line(leather.Line):  # type: ignore[misc]
        """A line without an entry in the legend."""

        def legend_to_svg(self, series: Any, palette: Any) -> list[Any]:
            """No entries."""
            return []

    class Dots(leather.Dots):  # type: ignore[misc]
        """Dots without an entry in the legend."""

        def legend_to_svg(self, series: Any, palette: Any) -> list[Any]:
            """No entries."""
            return []

    theme.background_color = "none"
    theme.margin = 0.03  # of the width
    theme.tick_color = theme.zero_color = "var(--line,#d5d9de)"
    theme.label_color = theme.axis_title_color = "var(--soft,#57606a)"
    theme.axis_title_gap = 8
    theme.legend_gap = 0
    for part in ("tick", "legend", "axis_title"):
        setattr(theme, f"{part}_font_family", "inherit")
        setattr(theme, f"{part}_font_size", 12)
        setattr(theme, f"{part}_font_char_height", 12)
        setattr(theme, f"{part}_font_char_width", 7)
    return _LeatherLibrary(leather.Chart, leather.Series, Line, Dots)
