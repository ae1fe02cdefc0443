"""Losses in messages: four significant digits, the same everywhere."""

from __future__ import annotations

import pytest

from nested_core.text.loss_format import format_change, format_interval, format_loss


@pytest.mark.parametrize(
    ("loss", "expected"),
    [
        (0.01841696910560131, "0.01842"),
        (7.961234, "7.961"),
        (12.0, "12"),
        (0.0, "0"),
        (0.028, "0.028"),
        (None, "not finite"),
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
    ],
)
def test_a_loss_has_four_significant_digits(loss: float | None, expected: str) -> None:
    assert format_loss(loss) == expected


def test_a_change_has_both_losses_and_an_interval_its_signs() -> None:
    assert format_change(0.018416969, None) == "0.01842 -> not finite"
    assert format_interval((-0.00041234, 0.0062)) == "-0.0004123 to +0.0062"


def test_an_interval_whose_ends_are_not_0_never_reads_as_if_they_were() -> None:
    assert format_interval((-0.00001, 0.00002)) == "-1e-05 to +2e-05"
    assert format_interval((-1.23e-9, 0.0), 2) == "-1.2e-09 to +0"
    assert format_interval((0.0, 0.0)) == "exactly 0"
