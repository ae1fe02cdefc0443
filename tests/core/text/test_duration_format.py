"""Durations in words, and on a clock."""

from __future__ import annotations

from nested_core.text.duration_format import format_clock, format_duration


def test_durations_have_their_largest_two_units() -> None:
    shown = [format_duration(seconds) for seconds in (5.4, 99, 720, 6_000, 12_000)]
    assert shown == ["5 s", "99 s", "12 min", "1 h 40 min", "3 h 20 min"]


def test_what_is_timed_is_shown_as_on_a_clock() -> None:
    shown = [format_clock(seconds) for seconds in (0.44, 9.9, 75, 3725)]
    assert shown == ["0.4 s", "9.9 s", "1:15", "1:02:05"]
