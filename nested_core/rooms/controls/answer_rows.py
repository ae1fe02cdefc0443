"""Rows of a tokenized split as a prompt and its answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from os.path import commonprefix
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.data.tokens.tokenized_split import Int32, TokenizedSplit
from nested_core.gate.checks.judged import CheckedRun
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.measure.losses.prediction_comparison import ExamplePredictions
from nested_core.models.generation import encode_prompt
from nested_core.records.dataset import FilePart, find_place
from nested_core.rooms.controls.results import SuspectLine

SHOWN_CHARACTERS = 80
GIVEN_AWAY = 0.5  # share of answers that their own prompts have, and other prompts do not
NO_ANSWERS = "no row has a prompt that can be told from its answer"
Pair = tuple[Sequence[int] | Int32, Sequence[int] | Int32]  # prompt and answer, as token ids
# Letters of scripts without blanks between words: Thai, Lao, Burmese, Khmer, Japanese, Chinese
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3041-\u30ff\u3400-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_UNSPACED}](?=([{_UNSPACED}]?))|[^\W{_UNSPACED}]+")


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

    def read_train(self, most: int) -> list[AnswerRow]:
        """Return at most `most` training rows, as `_read` does."""
        stats = self.judged.evidence.dataset.splits["train"]
        return self._read(self.train, most, stats.file, stats.parts)

    def read_held_out(self, most: int) -> list[AnswerRow]:
        """Return at most `most` of the held-out rows that count, as `_read` does."""
        held_out, losses = self.judged.held_out, self.judged.losses
        if held_out is None or losses is None:
            return []
        parts: Sequence[FilePart] = ()
        if self.judged.bounds.held_out in SPLITS_BY_HELD_OUT_CHOICE:  # else it names a file
            stem = held_out.file.removesuffix(".jsonl")
            parts = self.judged.evidence.dataset.splits[stem].parts
        split, counted = held_out.split, set(losses.counted().lines.tolist())
        rows = self._read(split, most, Path(held_out.file).name, parts)
        return [row for row in rows if split.lines[row.index] in counted]

    def _read(
        self, split: TokenizedSplit, most: int, file: str, parts: Sequence[FilePart]
    ) -> list[AnswerRow]:
        """Return at most `most` rows of a split, spread evenly over it.

        Left out are rows without a prompt, such as plain text, and rows that are learnt whole, if
        the chat template writes nothing between prompt and answer.

        file, parts: the file of the split, and the files that it has if there are several.
        """
        spread = np.linspace(0, len(split) - 1, min(len(split), most)).astype(int).tolist()
        pairs = ((index, _split_row(split, index, self.around_prompt[2])) for index in spread)
        found = [(index, *pair) for index, pair in pairs if pair is not None]
        split.release_pages()
        return [
            AnswerRow(
                *(index, *find_place(parts, file, int(split.lines[index])), prompt, answer),
                *(decode(self.judged.base.tokenizer, part) for part in (prompt, answer)),
            )
            for index, prompt, answer in found
        ]

    @cached_property
    def around_prompt(self) -> tuple[str, str, list[int]]:
        """What the chat template writes before and after a prompt; and the latter as tokens."""
        with suppress(Exception):  # a template is its author's program: it may raise anything
            asked_as = self.judged.evidence.dataset.prompt_format
            tokenizer = self.judged.base.tokenizer
            asked = [encode_prompt(tokenizer, text, asked_as) for text in ("?", "a b")]
            begin, _, end = decode(tokenizer, asked[0]).rpartition("?")
            return begin, end, commonprefix([one[::-1] for one in asked])[::-1]
        return "", "", []


def _split_row(
    split: TokenizedSplit, index: int, after_prompt: list[int]
) -> tuple[Int32, Int32] | None:
    """Return the last answer of a row, and what is before it; None if that cannot be told."""
    learnt, tokens = np.flatnonzero(split.example_mask(index)), np.array(split.example(index))
    [*_, last] = np.split(learnt, np.flatnonzero(np.diff(learnt) > 1) + 1)
    first, end = (int(last[0]), int(last[-1]) + 1) if last.size else (0, 0)
    if first < 2 and after_prompt:  # it is learnt whole
        row, size = tokens[:end].tolist(), len(after_prompt)
        ends = (
            one for one in range(end - 1, 1, -1) if row[max(0, one - size) : one] == after_prompt
        )
        first = next(ends, 0)
    return None if first < 2 else (tokens[:first], tokens[first:end])


def measure_losses(
    base: LoadedBase, adapters: Sequence[Mapping[str, mx.array]], pairs: Iterable[Pair]
) -> ExamplePredictions:
    """Compute the losses of answers after prompts, each of which is a row; see `make_split`."""
    return base.compare_predictions(adapters, make_split(pairs, base.config.max_seq_length))


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


def fold(text: str) -> str:
    """Return a text without case, and with one blank where it has white space, to compare."""
    return " ".join(text.casefold().split())


def share_given_away(texts: Iterable[tuple[str, str]]) -> float:
    """Return the share of answers in their own prompts, less that in other rows' prompts.

    It is high where a task is to find them there, too.

    texts: prompts, each with its answer.
    """
    rows = [(fold(asked), fold(given)) for asked, given in texts]
    others = [asked for asked, _ in rows[len(rows) // 2 :] + rows[: len(rows) // 2]]
    pairs = zip(rows, others, strict=True)
    return sum((own in asked) - (own in other) for (asked, own), other in pairs) / max(1, len(rows))


def find_words(text: str) -> list[str]:
    """Return the words of a text without case: of scripts without blanks, pairs of letters."""
    return [found[0] + (found[1] or "") for found in _WORD.finditer(text.casefold())]


def list_words(text: str) -> list[str]:
    """Return the distinct words of a text without case, in their order."""
    return list(dict.fromkeys(find_words(text)))


def decode(tokenizer: Any, tokens: Sequence[int] | Int32) -> str:
    """Decode token ids to text without special tokens, stripped."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
