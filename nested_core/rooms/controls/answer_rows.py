"""Rows of a tokenized split as a prompt and its answer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.data.tokens.tokenized_split import Int32, TokenizedSplit
from nested_core.gate.checks.judged import CheckedRun
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.measure.losses.prediction_comparison import ExamplePredictions
from nested_core.records.dataset import FilePart, find_place
from nested_core.rooms.controls.results import SuspectLine

SHOWN_CHARACTERS = 80
GIVEN_AWAY = 0.5  # share of answers that their own prompts have, and other prompts do not
Pair = tuple[Sequence[int] | Int32, Sequence[int] | Int32]  # prompt and answer, as token ids
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class AnswerRow:
    """A row whose learnt tokens are one answer at its end.

    index: its number in the split. file, line: where it is.
    prompt: the tokens before the answer. answer: the learnt tokens, with the end of the turn.
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


def read_training_rows(judged: CheckedRun, train: TokenizedSplit, most: int) -> list[AnswerRow]:
    """Return at most `most` training rows, as `read_answer_rows` does."""
    stats = judged.evidence.dataset.splits["train"]
    return read_answer_rows(train, judged.base.tokenizer, most, stats.file, stats.parts)


def read_held_out_rows(judged: CheckedRun, most: int) -> list[AnswerRow]:
    """Return at most `most` of the held-out rows that count, as `read_answer_rows` does."""
    held_out, losses = judged.held_out, judged.losses
    if held_out is None or losses is None:
        return []
    split, counted = held_out.split, set(losses.counted().lines.tolist())
    parts: Sequence[FilePart] = ()
    if judged.bounds.held_out in SPLITS_BY_HELD_OUT_CHOICE:  # else it names a file
        parts = judged.evidence.dataset.splits[held_out.file.removesuffix(".jsonl")].parts
    rows = read_answer_rows(split, judged.base.tokenizer, most, held_out.file, parts)
    return [row for row in rows if split.lines[row.index] in counted]


def read_answer_rows(
    split: TokenizedSplit, tokenizer: Any, most: int, file: str, parts: Sequence[FilePart] = ()
) -> list[AnswerRow]:
    """Return at most `most` rows of a split, spread evenly over it.

    Left out are rows without a prompt, such as plain text, and rows that learn several answers.

    file, parts: the file of the split, and the files that it has if there are several.
    """
    spread = np.linspace(0, len(split) - 1, min(len(split), most)).astype(int).tolist()
    found = {index: pair for index in spread if (pair := _split_row(split, index)) is not None}
    split.release_pages()
    places = {index: find_place(parts, file, int(split.lines[index])) for index in found}
    return [
        AnswerRow(index, *places[index], *pair, *(decode(tokenizer, part) for part in pair))
        for index, pair in found.items()
    ]


def _split_row(split: TokenizedSplit, index: int) -> tuple[Int32, Int32] | None:
    """Return prompt and answer of a row; None if it has no prompt or learns several answers."""
    learnt = np.flatnonzero(split.example_mask(index))
    first, count = int(learnt[0]) if learnt.size else 0, learnt.size
    if first < 2 or learnt[-1] + 1 - first != count:
        return None
    tokens = np.array(split.example(index)[: first + count])
    return tokens[:first], tokens[first:]


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


def share_given_away(rows: Rows) -> float:
    """Return the share of answers in their own prompts, less that in other rows' prompts.

    It is high where a task is to find them there, too.
    """
    texts = [(fold(row.asked), fold(row.given)) for row in rows]
    others = [asked for asked, _ in texts[len(rows) // 2 :] + texts[: len(rows) // 2]]
    pairs = zip(texts, others, strict=True)
    return sum((own in asked) - (own in other) for (asked, own), other in pairs) / max(1, len(rows))


def find_words(text: str) -> list[str]:
    """Return the words of a text without case."""
    return _WORD.findall(text.casefold())


def list_words(text: str) -> list[str]:
    """Return the distinct words of a text without case, in their order."""
    return list(dict.fromkeys(find_words(text)))


def decode(tokenizer: Any, tokens: Sequence[int] | Int32) -> str:
    """Decode token ids to text without special tokens, stripped."""
    return str(tokenizer.decode(list(tokens), skip_special_tokens=True)).strip()
