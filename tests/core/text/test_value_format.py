"""Values in tables, on the terminal and on pages."""

from __future__ import annotations

import pytest

from nested_core.text.value_format import format_value


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
