"""Charts: few points with every peak, the page's colours, and the numbers in a table."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ET

import pytest

from nested_core.text.document import Figures, to_html
from nested_core.text.svg_chart import MAX_POINTS, Chart, Curve, Point, decimate, draw_chart


def parse(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314, for it is our own


def draw_figure(charts: list[Chart]) -> str:
    """What a page has of charts of the same numbers."""
    text = to_html(Figures([charts]))
    return text.removeprefix('<div class="charts">').removesuffix("</div>")


def spiky(count: int, spike: int) -> list[Point]:
    return [Point(i, 100.0 if i == spike else 1.0 + math.sin(i) / 10) for i in range(count)]


@pytest.mark.parametrize("spike", [1, 4_999, 9_998])
def test_ten_thousand_points_become_five_hundred_and_a_spike_stays(spike: int) -> None:
    points = decimate(spiky(10_000, spike))
    assert len(points) <= MAX_POINTS
    assert Point(spike, 100.0) in points
    assert (points[0].x, points[-1].x) == (0, 9_999)
    assert [p.x for p in points] == sorted({p.x for p in points})


def test_few_points_stay_as_they_are_and_gaps_stay_gaps() -> None:
    points = [Point(0, 1.0), Point(1, None), Point(2, 3.0)]
    assert decimate(points) == points
    holes = [Point(i, None if 2_000 <= i < 4_000 else 1.0) for i in range(10_000)]
    assert any(point.y is None for point in decimate(holes))


def chart(points: list[Point], **changes: object) -> Chart:
    return Chart("Loss", "step", "nats/token", [Curve("training", points)], **changes)  # type: ignore[arg-type]


def test_a_chart_is_well_formed_svg_with_a_title_and_the_pages_colours() -> None:
    root = parse(draw_chart(chart(spiky(1_000, 300))))
    assert root.get("role") == "img"
    words = "Loss: nats/token (logarithmic) by step"
    assert root.get("aria-label") == words
    assert root[0].tag == "title"
    assert root[0].text == words
    colours = {value for e in root.iter() for key in ("fill", "stroke") if (value := e.get(key))}
    assert all(value == "none" or value.startswith("var(--") for value in colours), colours
    assert {element.tag for element in root.iter()}.isdisjoint({"script", "style", "image", "a"})
    (path,) = (e for e in root.iter("path"))
    assert len(path.attrib["d"].split("L")) <= MAX_POINTS


@pytest.mark.parametrize(
    "values",
    [[0.0], [5.0, 5.0], [0.0, 0.0], [-3.0, -3.0], [1e-12, 1e12], [1e-5, 1e-5, 0.0], [3.0, None]],
)
def test_any_finite_values_can_be_drawn(values: list[float | None]) -> None:
    for from_zero in (True, False):
        points = [Point(i, value) for i, value in enumerate(values)]
        svg = draw_chart(chart(points, from_zero=from_zero))
        assert parse(svg).tag == "svg"
        assert "nan" not in svg.lower()


@pytest.mark.parametrize("values", [[-3.4e38, 1.0, 3.4e38], [-3.4e38, None], [3.4e38, 0.0, 2.0]])
def test_values_beyond_what_a_linear_axis_can_show_are_gaps(values: list[float | None]) -> None:
    points = [Point(10.0**number * 1e9, value) for number, value in enumerate(values, start=1)]
    drawn = draw_chart(chart([*points, Point(1e60, 1.0)], from_zero=True))
    assert parse(drawn).get("role") == "img"
    assert draw_chart(chart([Point(1.0, -1e30)])) == ""


def test_labels_of_a_logarithmic_axis_keep_their_digits() -> None:
    svg = draw_chart(chart([Point(i, 10.0**-i) for i in range(4)]))
    labels = [element.text for element in parse(svg).iter("text")]
    assert {"1", "0.1", "0.01", "0.001"} <= set(labels)


def test_the_table_under_a_chart_holds_its_numbers_and_the_other_axis() -> None:
    points = [Point(step, 8.0 / step) for step in (10, 20, 40)]
    seconds = [Point(step / 2, p.y) for step, p in zip((10, 20, 40), points, strict=True)]
    other = Chart("Loss", "seconds", "nats/token", [Curve("training", seconds)])
    text = draw_figure([chart(points), other])
    assert text.count("<svg") == 2
    rows = re.findall(r"<tr><th scope=row>(.*)", text)
    assert rows == [
        "10<td class=n>5<td class=n>0.8",
        "20<td class=n>10<td class=n>0.4",
        "40<td class=n>20<td class=n>0.2",
    ]


def test_a_long_table_is_thinned_and_says_so() -> None:
    text = draw_figure([chart(spiky(10_000, 5))])
    assert text.count("scope=row") <= 201
    assert "of 10,000; all: metrics.jsonl" in text
    assert ">9,999<" in text


def test_a_chart_without_a_finite_value_is_left_out() -> None:
    assert draw_figure([chart([Point(1, None)])]) == ""
    assert draw_figure([chart([])]) == ""


def test_a_gap_breaks_the_line_and_a_point_alone_is_a_dot() -> None:
    values = [1.0, 2.0, None, 3.0, None, 4.0, 5.0]
    root = parse(draw_chart(chart([Point(i, y) for i, y in enumerate(values)])))
    assert [path.attrib["d"].count("M") for path in root.iter("path")] == [2]
    assert len([*root.iter("circle")]) == 1


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([0.0, 10.0], ["0", "2", "4", "6", "8", "10"]),
        ([2.31, 2.87], ["2.4", "2.6", "2.8"]),
        ([3, 4], ["3", "4"]),
        ([4_000.0, 5_000.0], ["4,000", "4,200", "4,400", "4,600", "4,800", "5,000"]),
        ([7.0], ["0", "2", "4", "6"]),
    ],
)
def test_the_axis_is_labelled_at_round_values(values: list[float], labels: list[str]) -> None:
    drawn = parse(draw_chart(chart([Point(0, y) for y in values])))
    found = [e.text for e in drawn.iter("text") if e.get("text-anchor") == "end"]
    assert found == labels
