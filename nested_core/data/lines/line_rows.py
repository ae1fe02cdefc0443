"""One line of JSONL -> one flat `LineRow`: what the rules need to know, and its text to compare.

Never raises on content: what is wrong with a line stands in its row. Knows no other line.
"""

from __future__ import annotations

import json
from functools import lru_cache
from operator import itemgetter
from typing import Any, NamedTuple

from pydantic import ValidationError

from nested_core.data.lines.example_parsing import (
    Example,
    FieldNames,
    is_tool_calling_message,
    parse_line,
    parse_plain_chat,
    parse_plain_fields,
    strip_line,
)
from nested_core.data.lines.json_decoding import LineProblem, collect_strings

_LETTER_BY_ROLE = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}
# A turn without a text, in the content of a plain row: all that str.isspace takes for space.
BLANK_TURN_PATTERN = r"\x00[\s\x1c-\x1f]*(?:\x00|$)"
_TOOL_CALL_LETTER = "c"
_ORPHAN_RESULT_LETTER = "o"
_OTHER_ROLE_LETTER = "x"
_as_json = json.JSONEncoder(ensure_ascii=False).encode
_role_of = itemgetter("role")
_content_of = itemgetter("content")


class LineRow(NamedTuple):
    """One line. `content` is all that is tokenised as one text, `shown` the texts in it."""

    format: str | None = None  # None: blank, or no example in it
    # A letter a turn: s(ystem), u(ser), a(ssistant), t(ool), c(all), o(rphan result), x (other).
    roles: str | None = None
    content: str | None = None
    shown: str | None = None
    blank_field: str | None = None
    unknown_keys: str | None = None
    is_blank: bool = False
    check: str | None = None  # the failed check, where the line holds no example
    message: str | None = None


def parse_plain_row(raw: bytes, field_names: FieldNames) -> tuple[str, str, str] | None:
    """(format, roles, content) of a line as almost all are, in one pass; None for all others.

    Its caller looks at many lines at once for what is left out here: the line must not hold an
    escaped NUL, and a content in which BLANK_TURN_PATTERN is found is for `parse_line_to_row` to
    judge.
    """
    try:
        if raw.startswith(b'{"messages"') or b'"role"' in raw:
            messages = parse_plain_chat(raw, field_names.chat)
            if not messages:
                return None
            letters = _letters_of_roles("".join(map(_role_of, messages)))
            return "chat", letters, "\0".join((letters, *map(_content_of, messages)))
        fields = parse_plain_fields(raw, field_names)
    except ValidationError:
        return None
    if fields is None:
        return None
    name, roles, texts = fields
    if name == "text":
        return None if not texts[0] or texts[0].isspace() else (name, roles, texts[0])
    return name, roles, "\0".join((roles, *texts))


@lru_cache(maxsize=10_000)
def _letters_of_roles(roles: str) -> str:
    """The letters of role names that stand one after the other."""
    for name, letter in _LETTER_BY_ROLE.items():
        roles = roles.replace(name, letter)
    return roles


def parse_line_to_row(raw: bytes, field_names: FieldNames, *, is_first: bool = False) -> LineRow:
    """Flatten one line, with or without its line end, into a row; never raises."""
    body = strip_line(raw, is_first=is_first)
    if not body:
        return LineRow(is_blank=True)
    try:
        example = parse_line(body, field_names)
    except LineProblem as problem:
        return LineRow(check=problem.check, message=problem.message)
    return _flatten_example(example, field_names)


def _flatten_example(example: Example, field_names: FieldNames) -> LineRow:
    roles = _letters_of_turns(example)
    content = _text_to_compare(example, roles)
    shown = (
        content
        if example.is_plain
        else "\n".join(collect_strings([example.messages, example.tools]))
    )
    unknown = ", ".join(sorted(example.unknown_keys)) or None
    return LineRow(
        example.format,
        roles,
        content,
        shown,
        _name_first_blank_field(example, field_names),
        unknown,
    )


def _letters_of_turns(example: Example) -> str:
    """One letter a turn; a tool's result whose id no call before it has is an orphan."""
    letters = ""
    ids: set[str] = set()
    for message in example.messages:
        letter = _LETTER_BY_ROLE.get(message["role"], _OTHER_ROLE_LETTER)
        if is_tool_calling_message(message):
            letter = _TOOL_CALL_LETTER
            ids = _tool_call_ids(message["tool_calls"])
        elif letter == "t" and ids and message.get("tool_call_id") not in ids | {None}:
            letter = _ORPHAN_RESULT_LETTER
        letters += letter
    return letters


def _tool_call_ids(calls: list[dict[str, Any]]) -> set[str]:
    return {str(call["id"]) for call in calls if call.get("id") is not None}


def _text_to_compare(example: Example, roles: str) -> str:
    """All that is tokenised as one text; the last NUL in it ends the prompt.

    Fields are joined by NUL, which no sound line contains, so that unequal examples stay unequal.
    """
    if example.format == "text":
        return example.text
    if example.is_plain:
        return "\0".join([roles, *[message["content"] for message in example.messages]])
    before = _as_json([example.tools, example.messages[:-1]])
    return f"{before}\0{_as_json(example.messages[-1:])}"


def _name_first_blank_field(example: Example, field_names: FieldNames) -> str | None:
    """The name of the first field without any text; a system's or a tool's turn may be empty."""
    if example.format == "text":
        return None if example.text.strip() else field_names.text
    for index, message in enumerate(example.messages):
        content = message.get("content")
        if content and not content.isspace():
            continue
        if message["role"] in ("user", "assistant") and not is_tool_calling_message(message):
            if example.format == "completion":
                return (field_names.prompt, field_names.completion)[index]
            return f"{field_names.chat}[{index}].content"
    return None
