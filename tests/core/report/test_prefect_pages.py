"""The curves of a training as a page of Prefect."""

from __future__ import annotations

import base64
import re
from typing import Any

from nested_core.records.plan import join_last_losses
from nested_core.report.curves import chart_losses, describe_curves
from nested_core.text.svg_chart import STANDALONE, draw_chart


def plain(page: object) -> str:
    """A page without the backslashes of markdown."""
    return str(page).replace("\\", "")


def facts_of(page: object) -> dict[str, str]:
    return dict(re.findall(r"^- \*\*(.*?)\*\*: (.*)$", plain(page), re.MULTILINE))


def picture_of(page: object) -> str:
    data = re.search(r"base64,([A-Za-z0-9+/=]+)\)", str(page))
    assert data is not None
    return base64.b64decode(data[1]).decode()


def curves_of(count: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"step": s, "loss": 4.0 / (s + 1)} for s in range(count)]
    return [*records, {"step": count, "val_loss": 0.123456789}]


def test_the_curves_name_their_latest_values_and_need_no_network() -> None:
    page = str(describe_curves(curves_of(50), 50, "examples/*bold*", "nats/token"))
    drawn = picture_of(page)
    assert drawn.count('fill="none"') == 1  # a line; the one evaluation is a dot
    assert "training loss 0.08<" in drawn
    assert "validation loss 0.1235<" in drawn
    assert "http" not in page
    assert "validation loss 0.1235 (step 50)" in page.replace("\\", "")
    assert r"examples/\*bold\*" in page
    assert join_last_losses(curves_of(50), None) in page.replace("\\", "")


def test_the_first_report_is_a_picture_and_nothing_before_it_and_no_loss_that_is_not_finite() -> (
    None
):
    records: list[dict[str, Any]] = [{"step": 1, "loss": 2.5}, {"step": 2, "loss": None}]
    drawn = draw_chart(chart_losses(records, 100, "nats/token"), STANDALONE)
    assert drawn.count("<circle") == 1
    assert "training loss 2.5<" in drawn
    assert "validation loss: none yet<" in drawn
    assert "data:image" not in str(describe_curves([], 50, "data", "nats/token"))


def test_a_picture_of_many_steps_is_as_small_as_one_of_few() -> None:
    drawn = draw_chart(chart_losses(curves_of(100_000), 100_000, "nats/token"), STANDALONE)
    assert len(drawn) < 12_000
    assert "nats/token (logarithmic)<" in drawn
