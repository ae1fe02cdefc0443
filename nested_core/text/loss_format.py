"""Formatting of losses: four significant digits wherever one is printed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

NATS_PER_TOKEN = "nats/token"


def format_loss(loss: float | None) -> str:
    """Format a loss with 4 significant digits: "0.0184", "3.142".

    "not finite" for NaN and infinity, and for None, which stands for them in JSON files.
    """
    return "not finite" if loss is None or not math.isfinite(loss) else f"{loss:.4g}"


def format_change(before: float | None, after: float | None) -> str:
    """Format a loss before and after: "0.0184 -> 0.0213"."""
    return f"{format_loss(before)} -> {format_loss(after)}"


def format_difference(difference: float, interval: Sequence[float] | None = None) -> str:
    """Format a difference with its sign, and its interval: "+0.0029 (-0.0004 to +0.0062)"."""
    within = "" if interval is None else f" ({format_interval(interval)})"
    return f"{difference:+.4g}{within}"


def format_interval(interval: Sequence[float], digits: int = 4) -> str:
    """Format the ends of a difference's interval: "-0.0004 to +0.0062".

    digits: significant ones, so that an end that is not 0 is never shown as 0. "exactly 0" is the
    interval of examples none of which changed.
    """
    low, high = interval
    return f"{low:+.{digits}g} to {high:+.{digits}g}" if low or high else "exactly 0"


def loss_name_for_file(file: str | None) -> str:
    """Return the name of a loss by the file that it was measured on, such as "test loss"."""
    names = {None: "validation loss", "valid.jsonl": "validation loss", "test.jsonl": "test loss"}
    return names.get(file, "held-out loss")


def join_units(units: Iterable[str | None]) -> str:
    """Join the units of several losses: `nats/example and nats/token`.

    None counts as no unit; without any unit it is nats/token.
    """
    return " and ".join(sorted({unit for unit in units if unit is not None})) or NATS_PER_TOKEN
