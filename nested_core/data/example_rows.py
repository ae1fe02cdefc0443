"""Rows of a data set, read again in one form that every reader accepts, and compared with others.

Rows of other programs' formats become conversations under our own keys. Rows are compared as the
validation compares duplicates: without what `fold_text` removes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nested_core.data.data_settings import DataSettings
from nested_core.data.lines.example_parsing import (
    ANY_ROLE,
    Example,
    find_row_format,
    parse_plain_row,
    read_completion,
    read_examples,
)
from nested_core.data.lines.line_rows import (
    encode_content,
    fold_questions,
    fold_text,
    leave_out_settings,
    parse_row,
)
from nested_core.data.sources.split_files import open_splits

KEY_BYTES = 8
Rows = Iterator[dict[str, object]]


@dataclass(frozen=True)
class SplitRows:
    """The rows of a split that are valid examples, and the split's digest as in dataset.json.

    rows: what `take` of `read_split_rows` returned, which is a list of them by default.
    """

    rows: list[dict[str, object]]
    digest: str


def read_split_rows(
    settings: DataSettings, split: str, take: Callable[[Rows], Any] = list
) -> SplitRows | None:
    """Read the valid examples of a split; None if the data set has no such split.

    take: is given the rows one by one, so that memory need not hold all of them.

    Raises ConfigError if there is no such data set, and OSError.
    """
    hasher = sha256()  # of the hashes of all examples
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        file = open_splits(settings, Path(spool)).get(split)
        if file is None:
            return None

        def hash_and_convert(read: tuple[int, Example]) -> dict[str, object]:
            hasher.update(sha256(encode_content(read[1])).digest())
            return row_of(read[1])

        rows = take(map(hash_and_convert, read_examples(file.path, settings.field_names)))
    return SplitRows(rows, hasher.hexdigest())


def row_of(example: Example) -> dict[str, object]:
    """Convert an example to a row under the default keys, with its marks of turns not to learn."""
    if example.format == "text":
        return {"text": example.text}
    rest: dict[str, object] = {} if example.tools is None else {"tools": example.tools}
    if (write := find_row_format(example.format).write) is not None:
        return write(example) | rest
    if example.masked:
        turns = range(len(example.messages))
        rest["loss_mask"] = [int(turn not in example.masked) for turn in turns]
    if example.format == "completion":
        prompt, completion = (turn["content"] for turn in example.messages)
        return {"prompt": prompt, "completion": completion, **rest}
    return {"messages": example.messages, **rest}


@dataclass(frozen=True)
class RowKeys:
    """Keys by which rows are compared.

    content: SHA-256 of everything that is tokenized.
    folded: the key of the same as `fold_text` returns it.
    bare: that of a row with a question without system turns, tools and marks of turns not to learn.
    questions: the key of what was asked before each answer, see `fold_questions`.
    """

    content: bytes
    folded: bytes
    bare: bytes
    questions: tuple[bytes, ...]

    @classmethod
    def of(cls, row: Mapping[str, Any]) -> RowKeys:
        """Compute the keys of a row as `read_split_rows` returns it."""
        line = json.dumps(row).encode()
        if (plain := None if rb"\u0000" in line else parse_plain_row(line, ANY_ROLE)) is not None:
            turns = read_completion(row).messages if "prompt" in row else row.get("messages", [])
            example = Example(plain[0], turns, text=plain[2])
        else:
            example = parse_row(row)
        questions = tuple(map(short_hash, fold_questions(example.messages)))
        content = encode_content(example)
        bare = folded = short_hash(fold_text(content))
        if questions and (short := leave_out_settings(example)) != example:
            bare = short_hash(fold_text(encode_content(short)))
        return cls(sha256(content).digest(), folded, bare, questions)


def short_hash(text: bytes) -> bytes:
    """Return the first KEY_BYTES bytes of a SHA-256."""
    return sha256(text).digest()[:KEY_BYTES]
