"""The learning rate that `init` writes, and what is said of rank x scale x rate at six settings."""

from __future__ import annotations

from typing import Any

import pytest

from nested_core import FineTuneConfig
from nested_core.rooms.planning.learning_rate_rule import (
    describe_learning_rate,
    warn_of_learning_rate,
)


def configured(**values: Any) -> FineTuneConfig:
    return FineTuneConfig.model_validate(values)


@pytest.mark.parametrize(
    ("values", "product", "advice"),
    [
        ({}, "0.0016", "1e-04"),  # mlx_lm.lora's defaults
        ({"learning_rate": 1e-4, "lora_parameters": {"rank": 64}}, "0.13", "1e-05"),
        ({"learning_rate": 1e-4, "lora_parameters": {"rank": 64, "alpha": 160}}, "0.016", None),
        ({"learning_rate": 2e-4, "lora_parameters": {"rank": 4, "scale": 1.0}}, "0.0008", "0.004"),
        ({"learning_rate": 3e-5}, "0.0048", "0.0001"),
        (
            {"lr_schedule": {"name": "linear_schedule", "arguments": [1e-7, 1e-3, 100]}},
            "0.16",
            "0.0001",
        ),
    ],
    ids=["mlx_lm", "rank alone", "rank with alpha", "scale 1", "continuing", "schedule"],
)
def test_where_a_setting_lies_is_said_with_what_to_try(values, product, advice) -> None:
    said = describe_learning_rate(configured(**values))
    assert said is not None
    assert said.startswith(f"rank x scale x rate is {product}; 0.01 to 0.03 was best for 34 of")
    assert "tinker-cookbook" in said
    found = said.partition(": try --learning-rate ")[2]
    assert (float(found) if found else None) == (None if advice is None else float(advice))


@pytest.mark.parametrize(
    ("rate", "share", "product", "advice"),
    [(1e-4, 0.3, "0.0048", "1"), (1e-3, 0.5, "0.08", "0.1"), (1e-5, 0.3, "0.00048", "1")],
)
def test_the_advice_for_a_night_is_another_share_of_the_rate(rate, share, product, advice) -> None:
    said = describe_learning_rate(configured(learning_rate=rate), share)
    assert said is not None
    assert said.startswith(f"rank x scale x rate is {product}; ")
    assert said.endswith(f": try continual.rate: {advice}")


@pytest.mark.parametrize(
    ("rate", "is_warned_of"),
    [(1.8e-5, True), (2e-5, False), (1e-4, False), (3e-4, False), (3.2e-4, True)],
)
def test_a_run_is_warned_only_far_from_the_best_settings(rate: float, is_warned_of: bool) -> None:
    assert len(warn_of_learning_rate(configured(learning_rate=rate))) == is_warned_of


@pytest.mark.parametrize("values", [{"fine_tune_type": "full"}, {"optimizer": "sgd"}])
def test_nothing_is_said_of_what_the_figures_are_not_of(values: dict[str, Any]) -> None:
    assert describe_learning_rate(configured(**values)) is None
    assert warn_of_learning_rate(configured(**values)) == []
