"""What the progress bar says, and when the pages are due."""

from __future__ import annotations

from typing import Any

from tasks.training_progress import TrainingPages
from tests.example import example_config


class Clock:
    """Time that a test moves."""

    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


def report(step: int) -> dict[str, Any]:
    return {"iteration": step, "step": step, "train_loss": 2.0, "tokens_per_second": 1234.56}


def test_progress_says_the_step_of_how_many_the_time_left_and_the_speed() -> None:
    clock = Clock()
    pages = TrainingPages(example_config(), steps=1200, clock=clock)
    assert pages.describe(0) == "Step 0 of 1,200"
    clock.now += 60.0
    pages.add_training_loss(report(100))
    assert pages.describe(100) == "Step 100 of 1,200; 11 min left; 1,235 tokens/s"
    assert pages.describe(1200) == "Step 1,200 of 1,200; 1,235 tokens/s"


def test_the_time_left_of_a_resumed_run_counts_its_own_steps_alone() -> None:
    clock = Clock()
    pages = TrainingPages(example_config(), steps=1000, first_step=900, clock=clock)
    clock.now += 50.0
    assert pages.describe(950) == "Step 950 of 1,000; 50 s left"


def test_a_resumed_run_shows_its_earlier_losses_up_to_where_it_goes_on() -> None:
    pages = TrainingPages(example_config(), steps=10, first_step=4)
    pages.add_earlier_reports([{"step": step, "loss": float(step)} for step in range(8)])
    assert [record["step"] for record in pages.records] == [0, 1, 2, 3, 4]


def test_a_loss_that_is_not_finite_is_kept_as_none() -> None:
    pages = TrainingPages(example_config(), steps=10, clock=Clock())
    pages.add_training_loss(report(1) | {"train_loss": float("nan")})
    pages.add_validation_loss(1, float("inf"))
    assert pages.records[0]["loss"] is None
    assert pages.records[1] == {"step": 1, "val_loss": None}


def test_pages_are_due_at_the_first_report_and_not_before() -> None:
    pages = TrainingPages(example_config(), steps=10, clock=Clock())
    assert not pages.is_due()
    pages.add_training_loss(report(1))
    assert pages.is_due()
