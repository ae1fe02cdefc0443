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
    parse_line,
    parse_plain_row,
    read_completion,
    read_examples,
    strip_line,
)
from nested_core.data.lines.json_decoding import LineProblem
from nested_core.data.lines.line_rows import (
    encode_content,
    fold_questions,
    fold_text,
    fold_turns,
    leave_out_settings,
    parse_row,
)
from nested_core.data.sources.split_files import open_splits
from nested_core.errors import ConfigError
from nested_core.storage.untrusted_files import read_regular

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
            return _row_of(read[1])

        rows = take(map(hash_and_convert, read_examples(file.path, settings.field_names)))
    return SplitRows(rows, hasher.hexdigest())


def _row_of(example: Example) -> dict[str, object]:
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
        questions = tuple(map(_key, fold_questions(example.messages)))
        content = encode_content(example)
        bare = folded = _key(fold_text(content))
        if questions and (short := leave_out_settings(example)) != example:
            bare = _key(fold_text(encode_content(short)))
        return cls(sha256(content).digest(), folded, bare, questions)


def _key(text: bytes) -> bytes:
    """Return the first KEY_BYTES bytes of a SHA-256."""
    return sha256(text).digest()[:KEY_BYTES]


@dataclass(frozen=True)
class RowList:
    """A person's list of rows, and of prompts that stand for every row with them.

    rows: the folded keys of the rows, see RowKeys.
    turns: the keys of prompts, and of rows that are no pair or rated answer, see `fold_turns`.
    """

    rows: frozenset[bytes]
    turns: frozenset[bytes]

    def has(self, row: Mapping[str, Any]) -> bool:
        """Return whether a row, the beginning of its chat, or a turn of its user is listed."""
        if RowKeys.of(row).folded in self.rows:
            return True
        turns = leave_out_settings(parse_row(row)).messages  # of a pair with the chosen answer
        parts = [turns[: end + 1] for end in range(len(turns))]
        parts += [[turn] for turn in turns if turn["role"] == "user"]
        return any(_key(fold_turns(part)) in self.turns for part in parts)


def read_row_list(path: Path) -> RowList:
    """Read a list of rows, one JSON line each: a row of any format, or a prompt without an answer.

    A prompt is a text, `{"prompt": TEXT}`, or `messages` that do not end with the assistant's turn.
    Raises ConfigError for an empty file, and for a line that is neither.
    """
    rows, all_turns = set[bytes](), set[bytes]()
    for number, line in enumerate(read_regular(path, follow_links=True).splitlines(), 1):
        if not (body := strip_line(line, is_first=number == 1)):
            continue
        try:
            example = _read_listed_row(body)
            turns = leave_out_settings(example).messages
            texts = [example.text, *(turn.get("content") for turn in turns)]
            if not any(text and text.strip() for text in texts):
                raise LineProblem("no-question", "it has no text but that of system turns")
            if not turns or turns[-1]["role"] == "assistant":
                rows.add(RowKeys.of(_row_of(example)).folded)
            is_asked = any(turn["role"] != "assistant" for turn in turns)
            if is_asked and find_row_format(example.format).write is None:
                all_turns.add(_key(fold_turns(turns)))
        except (LineProblem, ValueError, RecursionError) as problem:
            raise ConfigError(
                f"{path}:{number} is neither a row nor a prompt: {problem}. Expected a line of a "
                f"data set, or the same without its answer."
            ) from None
    if not rows and not all_turns:
        raise ConfigError(f"{path} lists no rows. Expected a row or a prompt a line, as JSON.")
    return RowList(frozenset(rows), frozenset(all_turns))


def _read_listed_row(line: bytes) -> Example:
    """Parse a line of the list: a row, or a prompt, whose last turn is not the assistant's."""
    value = json.loads(line)
    prompt = value.get("prompt") if isinstance(value, dict) and len(value) == 1 else value
    if isinstance(prompt, str):
        return Example("chat", [{"role": "user", "content": prompt}])
    if prompt is not value and isinstance(prompt, list):  # the turns of one, as a pair has them
        line = json.dumps({"messages": prompt}).encode()
    return parse_line(line, ANY_ROLE)
