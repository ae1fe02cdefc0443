"""The sentences of a run's last losses, with and without its plan."""

from __future__ import annotations

from nested_core.records.plan import describe_training_loss, describe_validation_loss


def test_a_loss_that_is_not_finite_is_said_and_the_lowest_is_told_beside_it() -> None:
    assert describe_training_loss((1200, None), None) == (
        "not finite (mean since the last report, step 1,200)"
    )
    assert describe_validation_loss((40, None), (30, 0.19994), None) == (
        "not finite (step 40), lowest 0.1999 (step 30)"
    )


def test_the_lowest_loss_is_not_told_twice_where_it_is_the_last() -> None:
    assert describe_validation_loss((40, 0.5), (40, 0.5), None) == "0.5 (step 40)"
