"""One line's bytes -> one JSON object, or a `LineProblem` that says why there is none.

Refuses what a lenient reader would let pass: repeated keys, halves of surrogate pairs, NUL, and
numbers that are none.
"""

from __future__ import annotations

import json
import re
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nested_core.errors import shorten
from nested_core.storage.untrusted_files import collect_strings, has_repeated_key

# Outside of the texts; one that never ends is passed over whole, so that none is looked at twice.
_NAN_OR_INFINITY_PATTERN = re.compile(
    r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|(NaN|-?Infinity)', re.DOTALL
)
_JSON_OBJECT_VALIDATOR = TypeAdapter(dict[str, Any], config=ConfigDict(strict=True))


class LineProblem(Exception):
    """Why a line holds no example: the name of the failed check and a sentence."""

    def __init__(self, check: str, message: str) -> None:
        super().__init__(message)
        self.check = check
        self.message = message


def decode_json_object(raw: bytes) -> dict[str, Any]:
    """Decode one JSON object; raises LineProblem, nothing else."""
    try:
        row = _JSON_OBJECT_VALIDATOR.validate_json(raw)
    except ValidationError as error:
        raise _explain_decoding_error(raw, error) from None
    if has_repeated_key(raw, len(collect_strings(row))):
        _refuse_repeated_key(raw)
    if b"NaN" in raw or b"Infinity" in raw:
        _refuse_nan_and_infinity(raw.decode())
    if b"\\u0000" in raw and any("\0" in text for text in collect_strings(row)):
        raise LineProblem("nul-character", "a text holds a NUL character (\\u0000)")
    return row


def _refuse_repeated_key(raw: bytes) -> None:
    def refuse(pairs: list[tuple[str, Any]]) -> None:
        """See that no key of one object is there twice."""
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise LineProblem("duplicate-key", f"the key {shorten(key)!r} is there twice")
            seen.add(key)

    json.loads(raw, object_pairs_hook=refuse)


def _refuse_nan_and_infinity(json_line: str) -> None:
    """Python writes and reads NaN and Infinity, which JSON does not have."""
    for match in _NAN_OR_INFINITY_PATTERN.finditer(json_line):
        if word := match[1]:
            where = f"column {match.start() + 1}"
            raise LineProblem("bad-json", f"not valid JSON at {where}: {word} is no JSON number")


def _explain_decoding_error(raw: bytes, error: ValidationError) -> LineProblem:
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return _explain_invalid_json(raw, str(first["ctx"]["error"]))
    name = type(first["input"]).__name__
    return LineProblem("not-an-object", f"expected a JSON object {{...}}, found a {name}")


def _explain_invalid_json(raw: bytes, reason: str) -> LineProblem:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        where = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        return LineProblem("not-utf8", f"{where} is not UTF-8. Save the file as UTF-8")
    if "\0" in text:
        return LineProblem("nul-character", f"a NUL byte at column {text.index(chr(0)) + 1}")
    what, _, position = reason.partition(" at line 1 column ")
    before = raw[: max(int(position) - 1, 0)] if position.isdecimal() else b""
    column = len(before.decode(errors="ignore")) + 1  # of the character that the byte belongs to
    if _has_lone_surrogate(text):
        return LineProblem("lone-surrogate", f"half of a surrogate pair before column {column}")
    return LineProblem("bad-json", f"not valid JSON at column {column}: {what}")


def _has_lone_surrogate(text: str) -> bool:
    """Whether Python's lenient decoder reads the line, into a text that UTF-8 cannot hold."""
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        return False
    return False
