"""Decode one line's bytes to a JSON object, or raise a `LineProblem` that says why not.

It refuses what a lenient reader accepts: repeated keys, halves of surrogate pairs, NUL, NaN,
    Infinity, and numbers too large for a float.
"""

from __future__ import annotations

import json
import math
import re
import sys
from typing import NoReturn

from pydantic import ConfigDict, TypeAdapter, ValidationError

from nested_core.errors import shorten
from nested_core.storage.untrusted_files import collect_strings, has_repeated_key

# Outside of the texts; one that never ends is passed over whole, so that none is looked at twice.
_NAN_OR_INFINITY_PATTERN = re.compile(
    r'"[^"\\]*+(?:\\.[^"\\]*+)*+(?:"|\\?\Z)|(NaN|-?Infinity)', re.DOTALL
)
# In the JSON of any number that no float can hold, and in few other lines.
_LARGE_NUMBER_PATTERN = re.compile(rb"[0-9][eE]\+?[0-9]{2}|[0-9]{300}")
MAX_SEPARATORS = 1_000_000  # of a line: a value takes some 100 bytes of memory
_NUL_ADVICE = "; where every other byte is one, the file is UTF-16: save it as UTF-8"
SAVE_AS_UTF8 = (
    'Save the file as UTF-8 (in a spreadsheet: "CSV UTF-8"), or convert what Windows wrote: '
    "iconv -f WINDOWS-1252 -t UTF-8 FILE > NEW"
)
_JSON_OBJECT_VALIDATOR = TypeAdapter(dict[str, object], config=ConfigDict(strict=True))


class LineProblem(Exception):
    """Why a line is not a valid example: the name of the failed check and a sentence."""

    def __init__(self, check: str, message: str) -> None:
        """Create the problem from the name of the failed check and a sentence."""
        super().__init__(message)
        self.check = check
        self.message = message


def decode_json_object(raw: bytes) -> dict[str, object]:
    """Decode one strict JSON object; raise LineProblem for anything else."""
    if has_too_many_values(raw):
        raise LineProblem(
            "bad-json",
            f"it has more than {MAX_SEPARATORS:,} commas and brackets, which as values take more "
            f"memory than an example may",
        )
    try:
        row = _JSON_OBJECT_VALIDATOR.validate_json(raw)
    except ValidationError as error:
        raise _explain_decoding_error(raw, error) from None
    if has_repeated_key(raw, len(collect_strings(row))):
        _refuse_repeated_key(raw)
    if b"NaN" in raw or b"Infinity" in raw:
        _refuse_nan_and_infinity(raw.decode())
    if _LARGE_NUMBER_PATTERN.search(raw):
        decode_json_text(raw.decode())
    if b"\\u0000" in raw and any("\0" in text for text in collect_strings(row)):
        raise LineProblem("nul-character", f"a text holds a NUL character (\\u0000){_NUL_ADVICE}")
    return row


def has_too_many_values(raw: bytes, most: int = MAX_SEPARATORS) -> bool:
    """Return whether a JSON text may hold more than `most` values; texts count as well."""
    return len(raw) > most and sum(map(raw.count, (b",", b"{", b"["))) > most


def decode_json_text(text: str) -> object:
    """Decode a JSON text to its value.

    Raises ValueError or RecursionError if it is not JSON. Raises LineProblem for NaN and Infinity,
    and for a number too large for a float, such as 1e999, which Python reads as Infinity.
    """
    return json.loads(text, parse_float=_read_finite_float, parse_constant=_refuse_constant)


def parse_json_text(value: object, place: str) -> object:
    """Decode a text that is JSON, as in cells of tables; any other value is returned as it is.

    Raises LineProblem for a text that begins like a list or an object of JSON, but is invalid.
    """
    if not isinstance(value, str):
        return value
    if not value or value.isspace():
        return None
    try:
        return decode_json_text(value)
    except (ValueError, RecursionError) as error:
        if value.lstrip()[0] not in "[{":
            return value  # judged as a text in the place of something else
        raise LineProblem(
            "bad-json",
            f"{place} is text that is not valid JSON: {error}. Write it as json.dumps does in "
            f"Python, not as str does",
        ) from None


def _read_finite_float(digits: str) -> float:
    """Parse a number; LineProblem if it is too large for a float."""
    number = float(digits)
    if math.isinf(number):
        message = f"the number {shorten(digits)} is beyond any float"
        raise LineProblem("bad-json", f"{message}, which is at most {sys.float_info.max:.1e}")
    return number


def _refuse_constant(word: str) -> NoReturn:
    """Raise LineProblem for NaN or Infinity."""
    raise LineProblem("bad-json", f"not valid JSON: {word} is no JSON number")


def _refuse_repeated_key(raw: bytes) -> None:
    """Raise LineProblem with the key that one object of the line has twice."""

    def refuse(pairs: list[tuple[str, object]]) -> None:
        """Raise LineProblem if a key occurs twice in one object."""
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise LineProblem("duplicate-key", f"the key {shorten(key)!r} is there twice")
            seen.add(key)

    json.loads(raw, object_pairs_hook=refuse)


def _refuse_nan_and_infinity(json_line: str) -> None:
    """Raise LineProblem if the line has NaN or Infinity outside of its texts."""
    for match in _NAN_OR_INFINITY_PATTERN.finditer(json_line):
        if word := match[1]:
            where = f"column {match.start() + 1}"
            raise LineProblem("bad-json", f"not valid JSON at {where}: {word} is no JSON number")


def _explain_decoding_error(raw: bytes, error: ValidationError) -> LineProblem:
    """Convert a pydantic error to a LineProblem."""
    first = error.errors(include_url=False)[0]
    if first["type"] == "json_invalid":
        return _explain_invalid_json(raw, str(first["ctx"]["error"]))
    name = type(first["input"]).__name__
    return LineProblem("not-an-object", f"expected a JSON object {{...}}, found a {name}")


def _explain_invalid_json(raw: bytes, reason: str) -> LineProblem:
    """Build the LineProblem for invalid JSON, with the column and the likely cause."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        where = f"byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        return LineProblem("not-utf8", f"{where} is not UTF-8. {SAVE_AS_UTF8}")
    if "\0" in text:
        return LineProblem(
            "nul-character", f"a NUL byte at column {text.index(chr(0)) + 1}{_NUL_ADVICE}"
        )
    what, _, position = reason.partition(" at line 1 column ")
    before = raw[: max(int(position) - 1, 0)] if position.isdecimal() else b""
    column = len(before.decode(errors="ignore")) + 1  # of the character that the byte belongs to
    if _has_lone_surrogate(text):
        return LineProblem("lone-surrogate", f"half of a surrogate pair before column {column}")
    return LineProblem("bad-json", f"not valid JSON at column {column}: {what}")


def _has_lone_surrogate(text: str) -> bool:
    """Return whether the line is JSON except for a half of a surrogate pair."""
    try:
        json.dumps(json.loads(text), ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except (ValueError, RecursionError):
        return False
    return False
