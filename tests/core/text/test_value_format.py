"""Values in tables, on the terminal and on pages."""

from __future__ import annotations

import pytest

from nested_core.text.value_format import format_passes, format_speed, format_value


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.123456, "0.1235"),
        (float("nan"), "not finite"),
        (float("inf"), "not finite"),
        (-float("inf"), "not finite"),
        (7, "7"),
        (True, "yes"),
        (None, "-"),
    ],
)
def test_a_cell_has_four_digits_of_a_number_and_says_what_is_not_finite(value, shown) -> None:
    assert format_value(value) == shown


@pytest.mark.parametrize(
    ("passes", "shown"),
    [(1, "1 pass"), (0.125, "0.125 passes"), (2.5, "2.5 passes"), (1633.4, "1,633 passes")],
)
def test_passes_have_three_digits_and_no_exponent(passes, shown) -> None:
    assert format_passes(passes) == shown


@pytest.mark.parametrize(
    ("tokens", "shown"), [(0.28, "0.3"), (9.5, "9.5"), (12.7, "13"), (1234.4, "1,234")]
)
def test_a_speed_has_one_decimal_below_ten(tokens: float, shown: str) -> None:
    assert format_speed(tokens) == shown
