"""Durations as a person reads them: in words for a forecast, as a clock for what is timed."""

from __future__ import annotations


def format_duration(seconds: float) -> str:
    """Format a duration in its largest two units: "45 s", "12 min", "3 h 20 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"


def format_clock(seconds: float) -> str:
    """Format a duration like a clock: "0:07", "12:05", "3:12:05"; below ten seconds "0.4 s"."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
