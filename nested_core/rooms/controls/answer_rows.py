"""Rows of a tokenized split as a prompt and its answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from nested_core.data.tokens.tokenized_split import Int32, TokenizedSplit
from nested_core.gate.checks.judged import CheckedRun
from nested_core.records.dataset import find_place


@dataclass(frozen=True, eq=False)
class AnswerRow:
    """A row whose learnt tokens are one answer at its end.

    index: its number in the split. line: its line in the file.
    prompt: the tokens before the answer. answer: the learnt tokens, with the end of the turn.
    """

    index: int
    line: int
    prompt: Int32
    answer: Int32

    @cached_property
    def prompt_key(self) -> bytes:
        """The prompt, to compare."""
        return self.prompt.tobytes()

    @cached_property
    def answer_key(self) -> bytes:
        """The answer, to compare."""
        return self.answer.tobytes()


def read_answer_rows(split: TokenizedSplit, most: int) -> list[AnswerRow]:
    """Return at most `most` rows of a split, spread evenly over it.

    Left out are rows without a prompt, such as plain text, and rows that learn several answers.
    """
    spread = np.linspace(0, len(split) - 1, min(len(split), most)).astype(int).tolist()
    rows = [row for index in spread if (row := _read_row(split, index)) is not None]
    split.release_pages()
    return rows


def _read_row(split: TokenizedSplit, index: int) -> AnswerRow | None:
    learnt = np.flatnonzero(split.example_mask(index))
    if not learnt.size:
        return None
    first, end = int(learnt[0]), int(learnt[-1]) + 1
    if first < 2 or end - first != learnt.size:  # prompts are learnt too, or several answers are
        return None
    tokens = np.array(split.example(index)[:end])
    return AnswerRow(index, int(split.lines[index]), tokens[:first], tokens[first:])


def make_split(
    pairs: Iterable[tuple[Sequence[int] | Int32, Sequence[int] | Int32]], max_length: int
) -> TokenizedSplit:
    """Build a split from prompts and answers, as token ids, of which the answers are learnt.

    max_length: a longer row loses the beginning of its prompt.
    """
    rows, masks = [], []
    for prompt, answer in pairs:
        kept = prompt[-max(1, max_length - len(answer)) :]
        rows.append(np.concatenate([kept, answer]).astype(np.int32))
        masks.append(np.arange(len(rows[-1])) >= len(kept))
    starts = np.cumsum([0, *map(len, rows)]).astype(np.int64)
    return TokenizedSplit(
        tokens=np.concatenate(rows) if rows else np.zeros(0, np.int32),
        target_mask=np.concatenate(masks) if masks else np.zeros(0, np.bool_),
        starts=starts,
        lines=np.arange(1, len(rows) + 1, dtype=np.int32),
        contents=np.zeros(len(rows), np.uint64),
    )


def find_training_row(judged: CheckedRun, row: AnswerRow) -> tuple[str, int]:
    """Return the file of the training data that a row is from, and its line there, from 1."""
    train = judged.evidence.dataset.splits["train"]
    return find_place(train.parts, train.file, row.line)


def fold(text: str) -> str:
    """Return a text without case, and with one blank where it has white space, to compare."""
    return " ".join(text.casefold().split())


def decode(tokenizer: Any, rows: Iterable[Int32]) -> list[str]:
    """Decode token ids to text without special tokens, stripped."""
    return [text.strip() for text in tokenizer.batch_decode(list(rows), skip_special_tokens=True)]
