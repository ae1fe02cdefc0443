"""A JSONL file -> one flat `Row` for each physical line, blank and bad ones included.

Never raises on content: what is wrong with a line stands in its row. Keeps no line in memory.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

from nested_core.data.decoding import LineProblem, strings
from nested_core.data.fields import Example, Features, calls_tools
from nested_core.data.parsing import parse_line
from nested_core.data.workers import Span
from nested_core.errors import DatasetError

NO_DIGEST = bytes(32)
_LETTERS = {"system": "s", "user": "u", "assistant": "a", "tool": "t"}
_CALL, _ORPHAN = "c", "o"
_CONTROL = re.compile("[\x01-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]")
_RARE_ESCAPE = re.compile(rb"\\[ubf]")  # the only way to a control character, but for DEL
_WHITE_SPACE = b" \t\n\r"


class Row(NamedTuple):
    """What the rules need to know of one line; the text itself is not kept."""

    line: int  # from 1
    format: str | None = None  # None: blank, or no example in it
    roles: str | None = None  # a letter a turn: system, user, assistant, tool, c(all), o(rphan)
    content: bytes = NO_DIGEST  # SHA-256 of all that is tokenised
    prompt: int | None = None  # equal for equal prompts
    folded: int | None = None  # equal for contents that differ in case and white space only
    blank_field: str | None = None
    unknown_keys: str | None = None
    has_control: bool = False
    has_replacement: bool = False
    has_crlf: bool = False
    has_mark: bool = False  # begins with a byte-order mark
    is_blank: bool = False
    check: str | None = None  # the failed check, where the line holds no example
    message: str | None = None


def read_rows(path: Path, features: Features) -> Iterator[Row]:
    """Yield the row of each line of a JSONL file, in order; OSError is the only error."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            yield read_line(raw, line, features)


def read_examples(
    path: Path, features: Features, skip: set[int], span: Span | None = None, first_line: int = 1
) -> Iterator[tuple[int, Example]]:
    """Yield (line, example) for each sound line: not blank, not one to skip; of a range, or all.

    `first_line` is the number of the range's first line. Raises DatasetError where such a line is
    sound no more: the file changed since it was judged.
    """
    with path.open("rb") as file:
        file.seek(span.start if span else 0)
        left = span.end - span.start if span else None
        for line, raw in enumerate(file, start=first_line):
            if left is not None and (left := left - len(raw)) < 0:
                return
            body = _body(raw, line)
            if not body or line in skip:
                continue
            try:
                yield line, parse_line(body, features)
            except LineProblem as problem:
                reason = f"{path}:{line} changed while it was read: {problem}. Start again."
                raise DatasetError(reason) from None


def read_line(raw: bytes, line: int, features: Features) -> Row:
    """Flatten one line with its line end into a row; never raises."""
    row = _row_of(_body(raw, line), line, features)
    if raw.endswith(b"\r\n"):
        row = row._replace(has_crlf=True)
    if line == 1 and raw.startswith(codecs.BOM_UTF8):
        row = row._replace(has_mark=True)
    return row


def _row_of(body: bytes, line: int, features: Features) -> Row:
    if not body:
        return Row(line, is_blank=True)
    try:
        example = parse_line(body, features)
    except LineProblem as problem:
        return Row(line, check=problem.check, message=problem.message)
    return _flatten(example, body, line, features)


def _body(raw: bytes, line: int) -> bytes:
    if line == 1:
        raw = raw.removeprefix(codecs.BOM_UTF8)
    return raw.strip(_WHITE_SPACE)


def _flatten(example: Example, body: bytes, line: int, features: Features) -> Row:
    roles = role_letters(example)
    content, prompt = _content(example, roles)
    digest = sha256(content.encode()).digest()
    folded = content.casefold().encode().translate(None, _WHITE_SPACE)
    blank = _blank_field(example, features)
    row = Row(line, example.format, roles, digest, _key(prompt), _key(folded), blank)
    if example.unknown_keys:
        row = row._replace(unknown_keys=", ".join(sorted(example.unknown_keys)))
    if body.isascii() and not _RARE_ESCAPE.search(body) and b"\x7f" not in body:
        return row
    shown = content if example.is_plain else "\n".join(strings([example.messages, example.tools]))
    has_control = _CONTROL.search(shown) is not None
    return row._replace(has_control=has_control, has_replacement="\ufffd" in shown)


def _key(value: str | bytes | None) -> int | None:
    """A 64-bit key that tells values apart within this process, at a fifth of a digest's cost."""
    return None if value is None else hash(value)


def role_letters(example: Example) -> str:
    """One letter a turn; a tool's result whose id no call before it has is an orphan."""
    if example.is_plain:
        return "".join([_LETTERS[message["role"]] for message in example.messages])
    letters, ids = "", set[str]()
    for message in example.messages:
        letter = _LETTERS[message["role"]]
        if calls_tools(message):
            letter, ids = _CALL, _ids(message["tool_calls"])
        elif letter == "t" and ids and message.get("tool_call_id") not in ids | {None}:
            letter = _ORPHAN
        letters += letter
    return letters


def _ids(calls: list[dict[str, Any]]) -> set[str]:
    return {str(call["id"]) for call in calls if call.get("id") is not None}


def _content(example: Example, roles: str) -> tuple[str, str | None]:
    """All that is tokenised as one text, and the part before the last turn; NUL is in neither.

    Fields are joined by NUL, which no sound line contains, so that unequal examples stay unequal.
    """
    if example.format == "text":
        return example.text, None
    if example.is_plain:
        content = "\0".join([roles, *[message["content"] for message in example.messages]])
        return content, content.rpartition("\0")[0]
    before = json.dumps([example.tools, example.messages[:-1]], ensure_ascii=False)
    return f"{before}\0{json.dumps(example.messages[-1:], ensure_ascii=False)}", before


def _blank_field(example: Example, features: Features) -> str | None:
    """The name of the first field without any text; a system's or a tool's turn may be empty."""
    if example.format == "text":
        return None if example.text.strip() else features.text
    for index, message in enumerate(example.messages):
        content = message.get("content")
        if content and not content.isspace():
            continue
        if message["role"] in ("user", "assistant") and not calls_tools(message):
            if example.format == "completion":
                return (features.prompt, features.completion)[index]
            return f"{features.chat}[{index}].content"
    return None
