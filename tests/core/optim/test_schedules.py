"""The learning rate of a run is mlx-lm's schedule, step by step, with a warm-up on top."""

from __future__ import annotations

import itertools
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx_lm.tuner.utils import build_schedule

from nested_core import FineTuneConfig, NestedAdam
from nested_core.optim.learning_rate_schedules import add_warmup, build_learning_rate

SCHEDULES: list[dict[str, Any]] = [
    {"name": "linear_schedule", "arguments": [1e-2, 1e-4, 100]},
    {"name": "exponential_decay", "arguments": [1e-2, 0.99]},
    {"name": "step_decay", "arguments": [1e-2, 0.5, 7]},
    {"name": "cosine_decay", "arguments": [1e-2, 100, 1e-3]},
    {"name": "cosine_decay", "arguments": [1e-2, 100], "warmup": 10, "warmup_init": 1e-4},
]


def rates(schedule: Any, steps: int = 130) -> list[float]:
    """The rates that an optimizer uses at its first steps."""
    optimizer = NestedAdam(schedule)
    found = []
    for _ in range(steps):
        optimizer.apply_gradients({}, {})
        found.append(optimizer.learning_rate.item())
    return found


def configured(**values: Any) -> Any:
    return build_learning_rate(FineTuneConfig.model_validate(values), steps=100)


def test_without_a_schedule_it_is_the_number() -> None:
    assert configured(learning_rate=3e-4) == 3e-4


@pytest.mark.parametrize("section", SCHEDULES, ids=lambda section: section["name"])
def test_a_schedule_is_mlx_lm_own_bit_for_bit(section: dict[str, Any]) -> None:
    assert rates(configured(lr_schedule=section)) == rates(build_schedule(section))


def test_a_schedule_wins_over_the_number() -> None:
    section = {"name": "linear_schedule", "arguments": [1.0, 0.0, 4]}
    assert rates(configured(learning_rate=7.0, lr_schedule=section), 6) == [
        *(1.0, 0.75, 0.5, 0.25, 0.0, 0.0)
    ]


def test_warm_up_climbs_from_the_first_step_to_the_whole_rate() -> None:
    warmed = configured(learning_rate=0.5, training={"warmup_steps": 4})
    assert rates(warmed, 6) == [0.125, 0.25, 0.375, 0.5, 0.5, 0.5]


def test_warm_up_over_a_schedule_multiplies_it() -> None:
    section = {"name": "linear_schedule", "arguments": [1.0, 0.0, 8]}
    warmed = configured(lr_schedule=section, training={"warmup_steps": 4})
    assert rates(warmed, 6) == [0.25, 0.875 * 0.5, 0.75 * 0.75, 0.625, 0.5, 0.375]


@pytest.mark.parametrize(
    "values",
    [
        {"learning_rate": 0.5},
        {"learning_rate": 0.5, "training": {"warmup_steps": 4, "decay": "cosine"}},
        {"lr_schedule": {"name": "linear_schedule", "arguments": [1.0, 0.0, 8]}},
    ],
)
def test_a_share_of_the_rate_is_one_of_each_step_s(values: dict[str, Any]) -> None:
    config = FineTuneConfig.model_validate(values)
    whole, part = (rates(build_learning_rate(config, 100, share), 9) for share in (1.0, 0.3))
    assert part == pytest.approx([0.3 * rate for rate in whole], rel=1e-6)


def test_a_cosine_falls_from_the_end_of_the_warm_up_to_a_tenth_at_the_last_step() -> None:
    section = {"warmup_steps": 0.2, "decay": "cosine"}  # of the 100 steps
    found = rates(configured(learning_rate=0.5, training=section), 110)
    assert found[:20] == pytest.approx([0.5 * n / 20 for n in range(1, 21)])
    assert found[59] == pytest.approx(0.5 * (0.1 + 0.9 * 0.5))  # halfway
    assert found[99:] == pytest.approx([0.05] * 11)
    assert all(later < earlier for earlier, later in itertools.pairwise(found[19:100]))


def test_a_share_of_warm_up_is_one_step_at_least() -> None:
    assert rates(configured(learning_rate=0.5, training={"warmup_steps": 0.001}), 2) == [0.5, 0.5]


@given(rate=st.floats(1e-6, 1.0), steps=st.integers(1, 1000), n=st.integers(1, 2000))
def test_warm_up_is_the_rate_times_n_over_steps_until_one(rate: float, steps: int, n: int) -> None:
    found = add_warmup(rate, steps)(mx.array(n - 1, mx.uint64)).item()
    assert found == pytest.approx(rate * min(1.0, n / steps), rel=1e-6)
    if n >= steps:
        assert found == mx.array(rate).item()
