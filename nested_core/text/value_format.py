"""Formatting of table values, the same on a terminal and on a page."""

from __future__ import annotations

import math


def format_value(value: object) -> str:
    """Format a table value: yes or no, 4 significant digits of a float, `-` for None, its text."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "not finite"
    return "-" if value is None else str(value)


def format_count(count: int, noun: str) -> str:
    """`1 step` or `1,200 steps`, of a noun that takes an s, or es after ch."""
    return f"{count:,} {noun}{'' if count == 1 else 'es' if noun.endswith('ch') else 's'}"


def format_passes(passes: float) -> str:
    """Format how often data is read, such as `1 pass`, `2.5 passes` or `1,630 passes`."""
    number = f"{passes:,.0f}" if passes >= 100 else f"{passes:.3g}"
    return f"{number} {'pass' if number == '1' else 'passes'}"


def format_speed(tokens: float) -> str:
    """Format tokens a second: `1,234`, or `0.3` with one decimal below 10."""
    return f"{tokens:,.0f}" if tokens >= 10 else f"{tokens:.1f}"


def format_bytes(count: int) -> str:
    """Format a size: 4.1 GB, 63.2 MB or 8.4 kB."""
    scale, unit = (1e9, "GB") if count >= 1e8 else (1e6, "MB") if count >= 1e5 else (1e3, "kB")
    return f"{count / scale:.1f} {unit}"
