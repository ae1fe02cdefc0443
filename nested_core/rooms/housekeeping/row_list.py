"""The rows that `nested-tune gc --forget` takes out of the data store, as a person lists them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nested_core.data.example_rows import RowKeys, row_of, short_hash
from nested_core.data.lines.example_parsing import (
    ANY_ROLE,
    Example,
    find_row_format,
    parse_line,
    strip_line,
)
from nested_core.data.lines.json_decoding import LineProblem
from nested_core.data.lines.line_rows import fold_turns, leave_out_settings, parse_row
from nested_core.errors import ConfigError
from nested_core.storage.untrusted_files import read_regular


def read_row_list(path: Path) -> Callable[[Mapping[str, Any]], bool]:
    """Read a list of rows, one JSON line each: a row of any format, or a prompt without an answer.

    A prompt is a text, `{"prompt": TEXT}`, or `messages` that do not end with the assistant's turn.
    It stands for every row with it. Raises ConfigError for an empty file, and for a line that is
    neither.

    Returns a function that says whether a row, the beginning of its chat, or a turn of its user is
    listed.
    """
    rows = set[bytes]()  # the folded keys of rows, see RowKeys
    # The keys of prompts, and of rows that are no pair or rated answer, see `fold_turns`
    all_turns = set[bytes]()
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
                rows.add(RowKeys.of(row_of(example)).folded)
            is_asked = any(turn["role"] != "assistant" for turn in turns)
            if is_asked and find_row_format(example.format).write is None:
                all_turns.add(short_hash(fold_turns(turns)))
        except (LineProblem, ValueError, RecursionError) as problem:
            raise ConfigError(
                f"{path}:{number} is neither a row nor a prompt: {problem}. Expected a line of a "
                f"data set, or the same without its answer."
            ) from None
    if not rows and not all_turns:
        raise ConfigError(f"{path} lists no rows. Expected a row or a prompt a line, as JSON.")

    def is_listed(row: Mapping[str, Any]) -> bool:
        """Return whether the list has the row, or a prompt of it."""
        if RowKeys.of(row).folded in rows:
            return True
        turns = leave_out_settings(parse_row(row)).messages  # of a pair with the chosen answer
        parts = [turns[: end + 1] for end in range(len(turns))]
        parts += [[turn] for turn in turns if turn["role"] == "user"]
        return any(short_hash(fold_turns(part)) in all_turns for part in parts)

    return is_listed


def _read_listed_row(line: bytes) -> Example:
    """Parse a line of the list: a row, or a prompt, whose last turn is not the assistant's."""
    value = json.loads(line)
    prompt = value.get("prompt") if isinstance(value, dict) and len(value) == 1 else value
    if isinstance(prompt, str):
        return Example("chat", [{"role": "user", "content": prompt}])
    if prompt is not value and isinstance(prompt, list):  # the turns of one, as a pair has them
        line = json.dumps({"messages": prompt}).encode()
    return parse_line(line, ANY_ROLE)
