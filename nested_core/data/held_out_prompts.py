"""A few held-out prompts to look at: the turns before an example's last answer, and that answer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nested_core.config.gate import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.data.data_settings import DataSettings
from nested_core.data.lines.example_parsing import Example, read_examples
from nested_core.data.sources.split_files import SplitFile, open_splits
from nested_core.errors import DatasetError


@dataclass(frozen=True)
class HeldOutPrompt:
    """A prompt of the data set.

    messages: the turns up to the answer, for a chat template.
    text: the last of them as it is shown.
    expected: the answer that the data set gives.
    file, line: where it stands.
    """

    messages: tuple[dict[str, Any], ...]
    text: str
    expected: str
    file: str
    line: int


def read_held_out_prompts(
    settings: DataSettings, count: int, held_out: str = "auto"
) -> list[HeldOutPrompt]:
    """The first prompts of the split that `gate.held_out` names; at most `count`.

    Where it names a file of its own they are of valid, or without it of test.

    Empty for a data set of the hub, which would have to be read whole, and for plain text, which
    has no prompts.
    """
    if settings.hf_dataset or not Path(settings.data).is_dir():
        return []
    with TemporaryDirectory(prefix="nested-tune-") as spool:
        splits = open_splits(settings, Path(spool))
        names = SPLITS_BY_HELD_OUT_CHOICE.get(held_out, ("valid", "test"))
        file = next((splits[name] for name in names if name in splits), None)
        return [] if file is None else list(islice(_read_prompts(file, settings), count))


def _read_prompts(file: SplitFile, settings: DataSettings) -> Iterator[HeldOutPrompt]:
    try:
        for line, example in read_examples(file.path, settings.field_names, skip=set()):
            if _ends_with_answer(example):
                *turns, answer = example.messages
                text, expected = str(turns[-1].get("content")), str(answer["content"])
                yield HeldOutPrompt(tuple(turns), text, expected, file.name, line)
    except DatasetError:  # a line that the validation left out: those before it are enough
        return


def _ends_with_answer(example: Example) -> bool:
    turns = example.messages
    is_answer = len(turns) > 1 and turns[-1].get("role") == "assistant"
    return is_answer and isinstance(turns[-1].get("content"), str) and example.tools is None
