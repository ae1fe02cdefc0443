"""Figures of a page: charts of the same numbers, a legend, and the numbers themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from nested_core.text.html_markup import Html, collapsed, element, join, table
from nested_core.text.svg_chart import ON_PAGE, Chart, Curve, draw_chart

MAX_TABLE_ROWS = 200  # of a table of a curve's numbers


def draw_figure(charts: Sequence[Chart]) -> Html:
    """A figure: charts of the same numbers, a legend, and the numbers themselves in a table.

    The table is of the first chart: the others show its values over another x. Nothing where no
    curve has a finite point.
    """
    charts = [_without_empty_curves(chart) for chart in charts]
    first = charts[0]
    if not first.curves:
        return Html("")
    drawn = [draw_chart(chart) for chart in charts]
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
    colours = [ON_PAGE.curve_colour(number) for number in range(len(curves))]
    return join(
        join((Html(f'<span class="key" style="background:{colour}"></span>'), curve.name))
        for colour, curve in zip(colours, curves, strict=True)
    )


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
        [
            int(x) if float(x).is_integer() else x,
            *(cells.get(x, Html("")) for cells in (*further, *values)),
        ]
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
