"""One line of JSONL -> one `Example`, or a `LineProblem` that names the check it failed.

Knows no other line, no file and no tokenizer.
"""

from __future__ import annotations

from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nested_core.data.lines.decoding import LineProblem, decode_object, repeats_a_key
from nested_core.data.lines.fields import (
    Example,
    Features,
    Format,
    PlainMessage,
    as_messages,
    check_types,
)
from nested_core.errors import shorten

# The validators inside the adapters: on this path an adapter's own call costs a tenth of the time.
_PLAIN_CHAT = TypeAdapter(dict[str, list[PlainMessage]]).validator
_PLAIN_FIELDS = TypeAdapter(dict[str, str], config=ConfigDict(strict=True)).validator


def parse_line(raw: bytes, features: Features) -> Example:
    """Parse one line (no byte-order mark, no line end); raises LineProblem, nothing else."""
    return _parse_plain(raw, features) or parse_exactly(raw, features)


def parse_exactly(raw: bytes, features: Features) -> Example:
    """As `parse_line`, for a line that is known not to be plain."""
    row = decode_object(raw)
    return check_types(row, _choose_format(row, features), features)


def _parse_plain(raw: bytes, features: Features) -> Example | None:
    """Most lines, in one pass: the known fields only, and nothing wrong. None for all others."""
    if b"\\u0000" in raw:
        return None
    try:
        if b'"role"' in raw:
            messages = plain_chat(raw, features.chat)
            return None if messages is None else Example("chat", messages)
        fields = plain_fields(raw, features)
    except ValidationError:
        return None
    if fields is None:
        return None
    kind, _, texts = fields
    if kind == "text":
        return Example("text", [], text=texts[0])
    return Example("completion", as_messages(*texts))


def plain_chat(raw: bytes, key: str) -> list[dict[str, Any]] | None:
    """The turns of a chat without tools and extras, else None; ValidationError for the rest."""
    row: dict[str, Any] = _PLAIN_CHAT.validate_json(raw)
    messages: list[dict[str, Any]] | None = row.get(key)
    if messages is None or len(row) != 1:
        return None
    strings = 1 + 4 * len(messages)
    if raw.count(b'"') != 2 * strings and repeats_a_key(raw, strings):  # most need no call
        return None
    return messages


def plain_fields(raw: bytes, features: Features) -> tuple[Format, str, list[str]] | None:
    """Format, roles and texts of a completion or a text without extras; as `plain_chat`."""
    row = _PLAIN_FIELDS.validate_json(raw)
    if repeats_a_key(raw, 2 * len(row)):
        return None
    if len(row) == 2 and features.prompt in row and features.completion in row:
        return "completion", "ua", [row[features.prompt], row[features.completion]]
    if len(row) == 1 and features.text in row:
        return "text", "", [row[features.text]]
    return None


def _choose_format(row: dict[str, Any], features: Features) -> Format:
    """The format by the keys that are there, in mlx-lm's order (tuner/datasets.py)."""
    has_prompt, has_completion = features.prompt in row, features.completion in row
    if has_prompt and has_completion:
        return "completion"
    if features.chat in row:
        return "chat"
    if features.text in row:
        return "text"
    if has_prompt or has_completion:
        missing = features.completion if has_prompt else features.prompt
        raise LineProblem("missing-field", f"{missing} is missing")
    wanted = f"{features.prompt!r} and {features.completion!r}, {features.chat!r} or "
    found = shorten(", ".join(row) or "nothing")
    raise LineProblem("unknown-format", f"expected {wanted}{features.text!r}; found {found}")
