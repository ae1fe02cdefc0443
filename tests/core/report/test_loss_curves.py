"""The picture of the losses: from the first report on, of bounded size, with what both came to."""

from __future__ import annotations

import base64
import re
from typing import Any

import pytest

from nested_core.records.plan import TrainingPlan, join_last_losses
from nested_core.report.loss_curves import describe_curves, draw_curves


def curves_of(count: int) -> list[dict[str, Any]]:
    records: list[dict[str, Any]] = [{"step": s, "loss": 4.0 / (s + 1)} for s in range(count)]
    return [*records, {"step": count, "val_loss": 0.123456789}]


def test_the_first_report_is_a_picture_already() -> None:
    drawn = draw_curves([{"step": 1, "loss": 2.5}], steps=100)
    assert drawn.count("<circle") == 1
    assert "training loss 2.5<" in drawn
    assert "validation loss: none yet<" in drawn


def test_both_losses_are_drawn_with_their_latest_value_in_four_digits() -> None:
    drawn = draw_curves(curves_of(50), steps=50)
    assert drawn.count('fill="none"') == 1  # a line; the one evaluation is a dot
    assert drawn.count("<circle") == 51
    assert "training loss 0.08<" in drawn
    assert "validation loss 0.1235<" in drawn


def test_a_picture_of_many_steps_is_as_small_as_one_of_few() -> None:
    assert len(draw_curves(curves_of(100_000), steps=100_000)) < 12_000


def test_a_loss_that_is_not_finite_has_no_place_on_the_curve() -> None:
    records: list[dict[str, Any]] = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": None}]
    drawn = draw_curves(records, steps=3)
    assert drawn.count("<circle") == 1
    assert "training loss 2<" in drawn


def test_before_the_first_finite_loss_the_page_has_no_picture() -> None:
    assert "data:image" not in str(describe_curves([], 50, "data"))


def test_losses_that_differ_by_much_are_drawn_on_a_logarithmic_axis() -> None:
    records = [{"step": 1, "loss": 10.0}, {"step": 2, "loss": 1.0}, {"step": 3, "loss": 0.1}]
    drawn = draw_curves(records, steps=3)
    heights = [float(y) for y in re.findall(r'cy="([\d.]+)" r', drawn)]
    assert heights[1] - heights[0] == pytest.approx(heights[2] - heights[1], abs=0.15)
    assert "nats a token (logarithmic)<" in drawn


def test_with_the_plan_each_loss_names_its_data_and_step() -> None:
    plan = TrainingPlan(
        steps=50,
        iterations=50,
        epochs=2.0,
        first_step=0,
        frequencies=(1,),
        offers_best=True,
        training_file="train.jsonl",
        validation_file="valid.jsonl",
        validation_examples=10,
        memory_forecast_gb=1.0,
        memory_limit_gb=2.0,
    )
    assert join_last_losses(curves_of(50), plan) == (
        "training loss 0.08 (train.jsonl, mean since the last report, step 49); "
        "validation loss 0.1235 (valid.jsonl, 10 examples, step 50)"
    )


def test_the_page_holds_the_picture_and_needs_no_network() -> None:
    page = str(describe_curves(curves_of(50), 50, "examples/*bold*"))
    picture = re.search(r"!\[[^\]]*\]\(data:image/svg\+xml;base64,([^)]*)\)", page)
    assert picture is not None
    assert base64.b64decode(picture[1]).startswith(b"<svg")
    assert "http" not in page
    assert "validation loss 0.1235 (step 50)" in page
    assert r"examples/\*bold\*" in page
