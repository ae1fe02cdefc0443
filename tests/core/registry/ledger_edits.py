"""Edits of history.jsonl and champion.json: every line, field and value, and lines moved about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

Outcome = Literal["refused", "mended", "torn", "crash", "same"]
OTHER = "f" * 64


@dataclass(frozen=True)
class Edit:
    """New contents of the two files (None: removed), and what must become of them.

    refused: audit and every writer name the file.
    mended: audit finds it, and the next writer leaves the bytes that were there before.
    crash: what a crash before champion.json leaves; mended without a finding.
    torn: a line that was never finished, which the next writer cuts.
    same: the file means what it meant.
    """

    name: str
    history: bytes | None
    record: bytes | None
    outcome: Outcome = "refused"


def ledger_edits(history: bytes, record: bytes) -> Iterator[Edit]:
    """Every edit of a sound pair of files."""
    lines = history.splitlines(keepends=True)
    for number, line in enumerate(lines):
        for name, edited in _edited_lines(line, lines):
            content = b"".join([*lines[:number], edited, *lines[number + 1 :]])
            yield Edit(f"line {number + 1}: {name}", content, record)
    for name, content in _moved_lines(lines):
        yield Edit(name, content, record)
    yield Edit("history removed", None, record)
    for added in (b"{", b"{}", b"\0" * 64, lines[-1][:-1], lines[-1][: len(lines[-1]) // 2]):
        yield Edit(f"torn: {added[:9]!r}", history + added, record, "torn")
    for added in (b"\n", b"{}\n", b"\0" * 64 + b"\n", b"[" * 100_000 + b"\n", b" \n"):
        yield Edit(f"added: {added[:9]!r}", history + added, record)
    for name, edited_record in _edited_records(record, lines):
        outcome = _outcome(edited_record, record, lines)
        yield Edit(f"champion.json: {name}", history, edited_record, outcome)


def _outcome(content: bytes | None, record: bytes, lines: list[bytes]) -> Outcome:
    """Whether the hash in champion.json is what it was, and all else too."""
    try:
        now, before = json.loads(content or b""), json.loads(record)
    except (ValueError, RecursionError):
        return "refused"
    if now == before:
        return "same"
    if now == before | {"last_line_sha256": hashlib.sha256(lines[-2]).hexdigest()}:
        return "crash"  # the last line changes no champion
    is_recorded = (
        isinstance(now, dict) and now.get("last_line_sha256") == before["last_line_sha256"]
    )
    return "mended" if is_recorded else "refused"


def _edited_lines(line: bytes, lines: list[bytes]) -> Iterator[tuple[str, bytes]]:
    entry = json.loads(line)
    for field, value in entry.items():
        for edited in _other_values(field, value, lines):
            yield f"{field} = {edited!r:.40}", _encode(entry | {field: edited})
        yield f"{field} removed", _encode({k: v for k, v in entry.items() if k != field})
        twice = json.dumps({field: value}).encode()[1:-1]
        yield f"{field} twice", line.replace(b"{", b"{" + twice + b", ", 1)
    yield "all chain fields removed", _encode(entry | {"previous_line_sha256": None})
    yield "a field added", _encode(entry | {"note": "mine"})
    yield "fields in another order", _encode(dict(reversed(entry.items())))
    yield "a space more", line.replace(b", ", b",  ", 1)
    yield "a space before", b" " + line
    yield "a space after", line[:-1] + b" \n"
    yield "carriage return", line[:-1] + b"\r\n"
    yield "another escape", line.replace(b'"ann"', b'"\\u0061nn"').replace(b'"bob"', b'"\\u0062ob"')
    for size in (0, 1, len(line) // 2, len(line) - 2):
        yield f"cut to {size} bytes", line[:size] + b"\n"
    for at in range(0, len(line) - 1, 17):
        yield f"bit flipped at {at}", line[:at] + bytes([line[at] ^ 1]) + line[at + 1 :]


def _other_values(field: str, value: Any, lines: list[bytes]) -> list[Any]:
    values: list[Any] = [None, "", OTHER, 7, [], {}, True, False]
    if field == "action":
        values += ["promote", "rollback", "judged", "collected", "Promote"]
    if field in ("version", "previous", "manifest"):
        values += [json.loads(line).get(field) for line in lines]
    if field == "time":
        values += ["2001-01-01T00:00:00.000000+00:00", "2099-01-01T00:00:00.000000+00:00"]
    if field == "by":
        values += ["eve", value + " "]
    if field == "previous_line_sha256":
        values += [hashlib.sha256(line).hexdigest() for line in lines]
    different = [v for v in values if v != value or type(v) is not type(value)]
    return [v for n, v in enumerate(different) if v not in different[:n]]


def _moved_lines(lines: list[bytes]) -> Iterator[tuple[str, bytes]]:
    count = len(lines)
    whole = b"".join(lines)
    for a in range(count):
        yield f"line {a + 1} removed", b"".join(lines[:a] + lines[a + 1 :])
        yield f"line {a + 1} doubled", b"".join([*lines[: a + 1], lines[a], *lines[a + 1 :]])
        yield f"line {a + 1} again at the end", whole + lines[a]
        yield f"line {a + 1} first", lines[a] + whole
        yield f"lines from {a + 1} removed", b"".join(lines[:a])
        yield f"lines to {a + 1} removed", b"".join(lines[a + 1 :])
        yield f"empty line before {a + 1}", b"".join([*lines[:a], b"\n", *lines[a:]])
        for b in range(a + 1, count):
            swapped = list(lines)
            swapped[a], swapped[b] = swapped[b], swapped[a]
            yield f"lines {a + 1} and {b + 1} swapped", b"".join(swapped)
            yield f"lines {a + 1} to {b + 1} removed", b"".join(lines[:a] + lines[b + 1 :])
        if a + 1 < count:
            joined = [*lines[:a], lines[a][:-1], *lines[a + 1 :]]
            yield f"line {a + 1} joined to the next", b"".join(joined)
    for cut in (1, 2, 20, len(lines[-1]) - 1):
        yield f"last {cut} bytes cut", whole[:-cut]
    yield "first byte cut", whole[1:]
    yield "zeroed", bytes(len(whole))
    yield "a byte order mark", b"\xef\xbb\xbf" + whole


def _edited_records(record: bytes, lines: list[bytes]) -> Iterator[tuple[str, bytes | None]]:
    content = json.loads(record)
    for field, value in content.items():
        values: list[Any] = [None, "", OTHER, 7, [], {}, True, "2001-01-01T00:00:00+00:00"]
        if field == "last_line_sha256":
            values += [hashlib.sha256(line).hexdigest() for line in lines]
        for edited in values:
            if edited != value:
                yield f"{field} = {edited!r:.40}", json.dumps(content | {field: edited}).encode()
        left = {k: v for k, v in content.items() if k != field}
        yield f"{field} removed", json.dumps(left).encode()
    yield "removed", None
    for broken in (b"", b"{", b"[]", b"null", b"7", b'"x"', b"\0" * 99, b"[" * 100_000):
        yield f"= {broken[:9]!r}", broken
    yield "a field added", json.dumps(content | {"note": "mine"}).encode()
    yield "written otherwise", json.dumps(content).encode()
    for size in range(0, len(record), 19):
        yield f"cut to {size} bytes", record[:size]


def _encode(entry: dict[str, Any]) -> bytes:
    return json.dumps(entry).encode() + b"\n"
