"""Rows of a tokenized split as a prompt and its answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any

import numpy as np

from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.data.tokens.tokenized_split import Int32, TokenizedSplit, draw_rows
from nested_core.gate.checks.judged import CheckedRun
from nested_core.measure.losses.prediction_comparison import ExamplePredictions
from nested_core.models.generation import encode_prompt
from nested_core.records.dataset import FilePart, find_place
from nested_core.rooms.controls.results import NotApplicableError, SuspectLine

SHOWN_CHARACTERS = 80
NO_ANSWERS = "no row has a prompt that can be told from its answer"
Pair = tuple[Sequence[int] | Int32, Sequence[int] | Int32]  # prompt and answer, as token ids


@dataclass(frozen=True, eq=False)
class AnswerRow:
    """A row as its last answer and what is before it.

    index: its number in the split. file, line: where it is.
    prompt: the tokens before the answer. answer: its tokens, with the end of the turn.
    asked, given: prompt and answer as texts without special tokens.
    """

    index: int
    file: str
    line: int
    prompt: Int32
    answer: Int32
    asked: str
    given: str

    def tell(self, text: str, figure: float | None = None, said: str | None = None) -> SuspectLine:
        """Return the row as one that a warning is about; `said` is what the adapter answers."""
        return SuspectLine(self.file, self.line, text[:SHOWN_CHARACTERS], figure, said)


Rows = Sequence[AnswerRow]


@dataclass(frozen=True)
class RunRows:
    """The rows of a run that is judged. train: its training rows."""

    judged: CheckedRun
    train: TokenizedSplit

    def read_train(self, most: int, least: int = 1) -> list[AnswerRow]:
        """Return at most `most` training rows; NotApplicableError if they are less than `least`."""
        stats = self.judged.evidence.dataset.splits["train"]
        rows = self._read(self.train, draw_rows(len(self.train), most), stats.file, stats.parts)
        if len(rows) < least:
            raise NotApplicableError(f"fewer than {least} training rows" if rows else NO_ANSWERS)
        return rows

    def read_held_out(self, most: int) -> list[AnswerRow]:
        """Return at most `most` of the held-out rows that count."""
        held_out, losses = self.judged.held_out, self.judged.losses
        if held_out is None or losses is None:
            return []
        parts: Sequence[FilePart] = ()
        if self.judged.bounds.held_out in SPLITS_BY_HELD_OUT_CHOICE:  # else it names a file
            stem = held_out.file.removesuffix(".jsonl")
            parts = self.judged.evidence.dataset.splits[stem].parts
        counted = np.flatnonzero(np.isin(held_out.split.lines, losses.counted().lines))
        drawn = counted[draw_rows(len(counted), most)].tolist()
        return self._read(held_out.split, drawn, Path(held_out.file).name, parts)

    def _read(
        self, split: TokenizedSplit, drawn: Sequence[int], file: str, parts: Sequence[FilePart]
    ) -> list[AnswerRow]:
        """Return the rows of a split with these numbers.

        Left out are rows without a prompt, such as plain text, and rows that are learnt whole, if
        the chat template writes nothing between prompt and answer.

        file, parts: the file of the split, and the files that it has if there are several.
        """
        pairs = ((index, _split_row(split, index, self.after_prompt)) for index in drawn)
        found = [(index, *pair) for index, pair in pairs if pair is not None]
        split.release_pages()
        return [
            AnswerRow(
                *(index, *find_place(parts, file, int(split.lines[index])), prompt, answer),
                *(decode(self.judged.base.tokenizer, part) for part in (prompt, answer)),
            )
            for index, prompt, answer in found
        ]

    def measure(self, pairs: Iterable[Pair], *, with_base: bool = False) -> ExamplePredictions:
        """Compute the adapter's losses of answers after prompts, each of which is a row.

        with_base: those of the base come first.
        """
        base, adapter = self.judged.base, self.judged.after.to_mlx()
        split = make_split(pairs, base.config.max_seq_length)
        return base.compare_predictions([base.parameters, adapter][not with_base :], split)

    @cached_property
    def after_prompt(self) -> Sequence[int]:
        """The tokens that the chat template writes after a prompt."""
        with suppress(Exception):  # a template is its author's program: it may raise anything
            asked_as = self.judged.evidence.dataset.prompt_format
            tokenizer = self.judged.base.tokenizer
            asked = [encode_prompt(tokenizer, text, asked_as) for text in ("?", "a b")]
            return commonprefix([one[::-1] for one in asked])[::-1]
        return []


def _split_row(
    split: TokenizedSplit, index: int, after_prompt: Sequence[int]
) -> tuple[Int32, Int32] | None:
    """Return the last answer of a row, and what is before it; None if that cannot be told."""
    learnt, tokens = np.flatnonzero(split.example_mask(index)), np.array(split.example(index))
    [*_, last] = np.split(learnt, np.flatnonzero(np.diff(learnt) > 1) + 1)
    first, end = (int(last[0]), int(last[-1]) + 1) if last.size else (0, 0)
    if first < 2 and after_prompt:  # it is learnt whole
        row, size = tokens[:end].tolist(), len(after_prompt)
        ends = range(end - 1, size, -1)
        first = next((one for one in ends if row[one - size : one] == after_prompt), 0)
    return None if first < 2 else (tokens[:first], tokens[first:end])


def make_split(pairs: Iterable[Pair], max_length: int) -> TokenizedSplit:
    """Build a split from prompts and answers, as token ids, of which the answers are learnt.

    max_length: a longer row loses the beginning of its prompt.
    """
    kept = [(prompt[-max(1, max_length - len(answer)) :], answer) for prompt, answer in pairs]
    parts = [np.asarray(part, np.int32) for row in kept for part in row]
    lengths = np.array([len(part) for part in parts], np.int64)
    return TokenizedSplit(
        tokens=np.concatenate([*parts, np.zeros(0, np.int32)]),
        target_mask=np.tile([False, True], len(kept)).repeat(lengths),
        starts=np.concatenate([[0], lengths.cumsum()[1::2]]),
        lines=np.arange(1, len(kept) + 1, dtype=np.int32),
        contents=np.zeros(len(kept), np.uint64),
    )


def decode(tokenizer: Any, tokens: Sequence[int] | Int32) -> str:
    """Decode token ids to text without special tokens, stripped."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
