"""JSON that means one thing: each key once, finite numbers, nothing nested without end.

Refuses with ValueError what json.loads takes: duplicate keys, NaN, infinity, numbers that overflow;
`finite_or_none` makes a value ready to be written so.
"""

from __future__ import annotations

import json
import math
from typing import Any


def parse_json(content: bytes) -> Any:
    """The value that UTF-8 JSON stands for, or ValueError saying why it has none."""
    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object,
            parse_constant=_refuse_constant,
            parse_float=_finite,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in fields if names.count(name) > 1)
        raise ValueError(f"the key {twice!r:.80} appears twice")
    return fields


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is beyond any float")
    return number


def finite_or_none(value: Any) -> Any:
    """The value, with None for every float in it that is not finite: JSON has no word for those."""
    if isinstance(value, dict):
        return {key: finite_or_none(each) for key, each in value.items()}
    if isinstance(value, list):
        return [finite_or_none(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
