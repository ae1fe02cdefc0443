"""Held-out rows read again: a few prompts, the field that groups rows, a separate file.

`data_policy.group` names a field: rows with equal values count as one independent example.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.data.data_settings import DataSettings
from nested_core.data.lines.example_parsing import Example, read_examples
from nested_core.data.sources.split_files import SplitFile, open_splits
from nested_core.errors import DatasetError, naming_as_given
from nested_core.records.dataset import find_place
from nested_core.storage.addresses import is_in_bucket
from nested_core.storage.atomic import canonical_json
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular, regular_sha256

WHOLE_NUMBER = re.compile(r"^([+-]?[0-9]+)\.0+$")


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt of a held-out split.

    messages: the turns before the answer, for a chat template.
    text: the last of these turns, to display.
    expected: the answer in the data set.
    file, line: where the row is.
    """

    messages: tuple[dict[str, object], ...]
    text: str
    expected: str
    file: str
    line: int


def read_held_out_prompts(
    settings: DataSettings, count: int, held_out: str = "auto"
) -> list[HeldOutPrompt]:
    """Read at most `count` prompts of the split that `gate.held_out` names.

    If it names a separate file, they are of valid, or else of test. Empty for a data set of the
    hub, which would have to be read whole, and for plain text, which has no prompts.
    """
    is_folder = is_in_bucket(settings.data) or Path(settings.data).is_dir()
    if settings.hf_dataset or not is_folder:
        return []
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        splits = open_splits(settings, Path(spool))
        names = SPLITS_BY_HELD_OUT_CHOICE.get(held_out, ("valid", "test"))
        file = next((splits[name] for name in names if name in splits), None)
        return [] if file is None else list(islice(_read_prompts(file, settings), count))


def digest_held_out_file(choice: str) -> str | None:
    """Return the SHA-256 of the file that `gate.held_out` names; None if it names a split.

    Returns None as well if the file is gone.
    """
    path = Path(choice)
    if choice in SPLITS_BY_HELD_OUT_CHOICE or not path.is_file():
        return None
    return regular_sha256(path, follow_links=True)


def _read_prompts(file: SplitFile, settings: DataSettings) -> Iterator[HeldOutPrompt]:
    """Yield the prompts of a split's conversations that end with an answer."""
    for line, example in read_examples(file.path, settings.field_names):
        if _ends_with_answer(example):
            *turns, answer = example.messages
            text, expected = str(turns[-1].get("content")), str(answer["content"])
            place = find_place(file.parts, file.name, file.number_of(line))
            yield HeldOutPrompt(tuple(turns), text, expected, *place)


def _ends_with_answer(example: Example) -> bool:
    """Return whether an example ends with a learnt text answer of the assistant, without tools."""
    turns = example.messages
    is_answer = len(turns) > 1 and turns[-1].get("role") == "assistant"
    is_answer = is_answer and len(turns) - 1 not in example.masked
    return is_answer and isinstance(turns[-1].get("content"), str) and example.tools is None


@contextmanager
def as_test_set_alone(path: Path, settings: DataSettings) -> Iterator[DataSettings]:
    """Yield settings that read a single file, of any format, as the test set of a data set."""
    with TemporaryDirectory(prefix="nested-tune-held-out-") as folder:
        Path(folder, "test.jsonl").symlink_to(path.resolve())
        with naming_as_given("test.jsonl", str(path)):
            yield replace(settings, data=folder, data_format="auto", hf_dataset=())


def read_group_values(settings: DataSettings, split: str, lines: Sequence[int]) -> list[str | None]:
    """Read the field `data_policy.group` of rows of a split, by `group_key`.

    Args:
        settings: where the data is, and in `policy` the field's name.
        split: train, valid or test.
        lines: the rows' numbers in their file, ascending.

    Raises DatasetError if no row has the field.
    """
    field = settings.policy.group
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        file = open_splits(settings, Path(spool))[split]
        values = _read_field(file.path, sorted(file.physical_lines_of(set(map(int, lines)))), field)
    if not any(value is not None for value in values):
        raise DatasetError(
            f"data_policy.group: no row of {file.name} has a field {field!r}. Give one that rows "
            f"have, such as a document or a conversation's id, or leave it out."
        )
    return values


def _read_field(path: Path, numbers: Sequence[int], field: str | None) -> list[str | None]:
    """Read a field of physical lines (numbers from 1, ascending) of a file of JSON lines."""
    values: list[str | None] = []
    remaining = iter(numbers)
    following = next(remaining, None)
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, _):
        for number, line in enumerate(file, 1):
            if number != following:
                continue
            following = next(remaining, None)
            row = json.loads(line.removeprefix(b"\xef\xbb\xbf"))
            values.append(group_key(row.get(field) if isinstance(row, dict) else None))
    return values


def group_key(value: Any) -> str | None:
    """Return the value of a group as text; None for null and a blank text.

    27, 27.0, "27.0" and " 27 " are one group: a file of JSON, a table and what pandas wrote may
    have the same id as any of them.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = (value if isinstance(value, str) else canonical_json(value).decode()).strip()
    return None if value is None or not text else WHOLE_NUMBER.sub(r"\1", text)
