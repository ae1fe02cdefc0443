"""Read a suite's file, JSON Lines, a table or YAML, as one line of JSON for each question."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from io import BytesIO
from pathlib import Path

from nested_core.config.loading import parse_yaml, parse_yaml_with_lines
from nested_core.config.sections import Score
from nested_core.data.lines.example_parsing import strip_line
from nested_core.data.sources.file_formats import NumberedLine, TableReader
from nested_core.errors import ConfigError, DamagedError, DatasetError
from nested_core.seams import load_only
from nested_core.storage.untrusted_files import file_type, read_regular

MAX_SUITE_BYTES = 64 * 2**20
MAX_SUITE_LINES = 1_000_000  # including blank lines
MAX_YAML_SUITE_BYTES = 4 * 2**20  # YAML of this size takes some ten seconds to read
TABLE_SUFFIXES = (".csv", ".tsv")
YAML_SUFFIXES = (".yaml", ".yml")
SUITE_FORMS = "JSON Lines (.jsonl), a table (.csv, .tsv) or YAML (.yaml)"
_TEXT_SCORES = ("exact", "contains", "regex", "choice")
_ANSWERS_PATTERN = re.compile(r"[0-9]+\.(?:expected|choices)(?:\.[0-9]+)?")
_JSON_COLUMNS = frozenset({"messages", "choices", "schema", "tolerance"})


def holds_questions(path: Path) -> bool:
    """Whether a file is a suite rather than a configuration.

    True for JSON Lines and tables, and for YAML (or any other name) only if it holds a list.
    """
    if path.suffix.lower() in (".jsonl", *TABLE_SUFFIXES):
        return True
    with suppress(ConfigError, DamagedError, OSError):  # reading the file later reports the error
        content = read_regular(path, MAX_YAML_SUITE_BYTES, follow_links=True)
        return isinstance(parse_yaml(content), list)
    return False


def read_question_lines(path: Path, score: Score) -> Iterator[NumberedLine]:
    """Yield each question of a suite's file as JSON, with the line of the file where it begins.

    The suffix decides: .csv and .tsv are tables, .yaml and .yml hold a list, everything else is
    JSON Lines, whose lines are yielded unchanged. In a table the columns `messages`, `choices`,
    `schema` and `tolerance` hold JSON, and so does `expected` if the score is `number` or `json`.

    Raises ConfigError if there is no such file, or for a table if the room tables is not installed;
    DatasetError if it is too large for a suite or not
    valid YAML, and RestOfFileUnreadable if a table is damaged.
    """
    if file_type(path, follow_links=True) != "file":
        raise ConfigError(f"eval set: {path} is not a file. Expected {SUITE_FORMS}.")
    suffix = path.suffix.lower()
    try:
        content = read_regular(path, MAX_SUITE_BYTES, follow_links=True)
    except DamagedError as error:
        raise DatasetError(f"eval set: {error}") from error
    if content.count(b"\n") > MAX_SUITE_LINES:
        raise DatasetError(f"eval set: {path} has more than {MAX_SUITE_LINES:,} lines.")
    if suffix in YAML_SUFFIXES:
        yield from _read_yaml_questions(path, content, score)
    elif suffix in TABLE_SUFFIXES:
        columns = _JSON_COLUMNS | ({"expected"} if score in ("number", "json") else set())
        lines, _ = load_only(TableReader, str(path)).read(path, suffix, columns)
        yield from lines
    else:
        for number, line in enumerate(BytesIO(content), start=1):
            yield NumberedLine(number, strip_line(line, is_first=number == 1))


def _read_yaml_questions(path: Path, content: bytes, score: Score) -> Iterator[NumberedLine]:
    """Yield the questions of a suite in YAML as JSON, each with the line where it begins.

    For scores that compare text, an expected answer keeps its spelling: `expected: 1.50` is the
    text "1.50", not a number.
    """
    if len(content) > MAX_YAML_SUITE_BYTES:
        raise DatasetError(
            f"eval set: {path} is larger than {MAX_YAML_SUITE_BYTES:,} bytes, the most of an "
            f"eval set in YAML. Write it as JSON Lines, which may have {MAX_SUITE_BYTES:,}."
        )
    try:
        text_names = _ANSWERS_PATTERN if score in _TEXT_SCORES else None
        questions, lines = parse_yaml_with_lines(content, str(path), text_names)
    except ConfigError as error:
        raise DatasetError(f"eval set: {error}") from error
    if not isinstance(questions, list):
        raise DatasetError(
            f"eval set: {path} should be a list of questions, `- prompt: ...` and `expected: "
            f"...` each; found a {type(questions).__name__}."
        )
    for index, question in enumerate(questions):
        yield NumberedLine(lines[str(index)], json.dumps(question).encode())
