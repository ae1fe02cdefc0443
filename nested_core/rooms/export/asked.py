"""What base, adapter and an exported model are asked: texts, prompts, held-out rows and suites."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.gate.proof.fresh_process_check import PROMPTS_WITHOUT_DATA
from nested_core.measure.answers.suite_answers import EncodedSuite
from nested_core.measure.losses.held_out_loss import HeldOutExamples, HeldOutLoss, PairLoss
from nested_core.records.dataset import PromptFormat
from nested_core.records.losses import Vector
from nested_core.records.paired_difference import Indices
from nested_core.text.loss_format import NATS_PER_TOKEN

TEXTS = 200  # beside those of rows
MAX_TEXT_ROWS = 10_000  # at even distances
COMPARED_ROWS = 16  # held-out rows whose logits are compared
MAX_ROWS = 256  # held-out rows whose losses are compared, one at a time
MAX_COLUMNS = 256  # tokens of the vocabulary whose logits are compared
PIECES = (
    *("Hello, world!", " leading space", "trailing space ", "two  spaces", "a\nb", "tab\there"),
    *("\n\nparagraph\n", "I'll say they've won, it's 9 o'clock", "DON'T SHOUT, WE'RE HERE"),
    *("1 22 333 4444 55555", "3.14159", "-17,000.50", "2026-11-24T23:59:59Z", "x = y ** 2 + 1"),
    *("def f(x):\n    return x\n", '{"key": [1, 2.5, null]}', "<b>bold</b> &amp; more", "a/b\\c"),
    *("C++ & C#", "user@example.org", "https://example.org/a?b=c#d", "snake_case camelCase"),
    *("naïve café", "Zürich, Straße", "Ångström", "¿Qué?", "Łódź", "İstanbul", "žluťoučký kůň"),
    *("Москва", "Ελλάδα", "القاهرة", "שלום", "नमस्ते", "ไทย"),
    *("日本語のテキスト", "中文字符", "한국어"),
    *("🙂🙃", "👩‍💻", "🇫🇷", "½ × ²", "“quotes” — dash…", "€5 £6 ¥7", "\u00a0nbsp", "...", "!!!???"),
    *("<|im_start|>", "<s>", "[INST]", "zzzzzzzzzz", "aA1!", "  ", "A"),
)


@dataclass(frozen=True)
class HeldOutRows:
    """The held-out rows whose losses are compared.

    tokens: the tokens of each row; for pairs, of all chosen answers and then of all rejected ones.
    targets: the indices of the tokens in each row that the loss counts.
    clusters: the cluster of each row, None if each row is one by itself.
    loss: computes the losses of pairs from log-likelihoods; None for the cross-entropy.
    unit: the unit of the losses.
    """

    file: str
    tokens: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]
    clusters: Indices | None
    loss: PairLoss | None = None
    unit: str = NATS_PER_TOKEN

    @property
    def counts(self) -> Vector:
        """Return each row's weight in a mean: its counted tokens, or 1 for a pair; float64 (n,)."""
        tokens = np.array([len(places) for places in self.targets], np.float64)
        return tokens if self.loss is None else np.ones(len(tokens) // 2)

    def compute_losses(self, likelihoods: Vector, of_base: Vector) -> Vector:
        """Return each row's loss, float64 (n,), from log-likelihoods of the targets.

        likelihoods: of the model; of_base: of the base, which some losses of pairs need.
        """
        tokens = np.array([len(places) for places in self.targets], np.float64)
        of_pairs = None if self.loss is None else self.loss.of_pairs
        return -likelihoods / tokens if of_pairs is None else of_pairs(likelihoods, of_base, tokens)

    @classmethod
    def choose(cls, held_out: HeldOutExamples, config: FineTuneConfig) -> HeldOutRows:
        """Return up to MAX_ROWS held-out examples at even distances, each cut at `max_seq_length`.

        Rows of which nothing is supervised after the cut are left out.
        """
        loss = config.training.loss
        of_pairs = None if loss is None else seams.load_for_loss(loss, HeldOutLoss).pairs(config)
        split = held_out.split
        supervised = np.flatnonzero(held_out.is_example_supervised)
        count = min(MAX_ROWS, len(supervised))
        places = np.unique(np.linspace(0, len(supervised) - 1, count).round()).astype(np.int64)
        rows, chosen_places = [], []
        for place in places.tolist():
            row = int(supervised[place])
            tokens = split.example(row)[: config.max_seq_length]
            mask = split.example_mask(row)[: config.max_seq_length]
            texts = (
                [(tokens, np.flatnonzero(mask).tolist())]
                if of_pairs is None
                else of_pairs.split(tokens, mask)
            )
            if all(len(targets) for _, targets in texts):
                rows.append(texts)
                chosen_places.append(place)
        texts = [text for answer in zip(*rows, strict=True) for text in answer]
        return cls(
            held_out.file,
            tokens=tuple(tuple(tokens.tolist()) for tokens, _ in texts),
            targets=tuple(tuple(targets) for _, targets in texts),
            clusters=None if held_out.clusters is None else held_out.clusters[chosen_places],
            loss=of_pairs,
            unit=seams.unit_of_loss(loss),
        )


@dataclass(frozen=True)
class Asked:
    """What base, adapter and exported model are all asked, to be compared.

    base: the base's folder.
    tokenizer: the base's tokenizer, which encoded prompts and rows.
    texts: texts whose token ids are compared.
    prompts: prompts, as tokens, whose next token's logits are compared.
    columns: the token ids whose logits are compared.
    rows: rows whose losses are compared; None without held-out rows.
    suites: questions whose answers are compared.
    continued: prompts after which a file and the program that serves it go on with the same tokens.
    prompt_format: how the rows begin that the adapter was trained on; None if unknown.
    dtype: the dtype in which mlx_lm computes; None is the one that a model is stored in.
    trusts_remote_code: whether code that the base brings may run.
    """

    base: Path
    tokenizer: Any
    texts: tuple[str, ...] = ()
    prompts: tuple[tuple[int, ...], ...] = ()
    columns: tuple[int, ...] = ()
    rows: HeldOutRows | None = None
    suites: tuple[EncodedSuite, ...] = ()
    continued: tuple[tuple[int, ...], ...] = ()
    prompt_format: PromptFormat | None = None
    dtype: str | None = None
    trusts_remote_code: bool = False

    @classmethod
    def choose(
        cls,
        base: Path,
        tokenizer: Any,
        rows: HeldOutRows | None,
        texts: Sequence[Sequence[int]] = (),
        *,
        is_continued: bool = False,
        **more: Any,
    ) -> Asked:
        """Return the questions: texts of this project and of rows, and prompts from `rows`.

        A prompt is a row up to half of its targets. Without rows fixed prompts are used.

        texts: the tokens of all rows, whose texts are encoded again.
        is_continued: whether texts are continued after rows up to their answers; after prompts
            where the rows have none, or there are no rows.
        more: the other fields.
        """
        pairs = [] if rows is None else [*zip(rows.tokens, rows.targets, strict=True)]
        halves = tuple(row[: places[len(places) // 2]] for row, places in pairs[:COMPARED_ROWS])
        prompts = halves or tuple(map(tuple, PROMPTS_WITHOUT_DATA))
        starts = tuple(row[: places[0]] for row, places in pairs[:COMPARED_ROWS])
        if min(map(len, starts), default=0) < 2:
            starts = prompts
        size = len(tokenizer)
        return cls(
            base,
            tokenizer,
            texts=_choose_texts(tokenizer, texts),
            prompts=prompts,
            columns=tuple(range(0, size, max(1, size // MAX_COLUMNS)))[:MAX_COLUMNS],
            rows=rows,
            continued=starts if is_continued else (),
            **more,
        )


def _choose_texts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Choose TEXTS texts, of many scripts and joined ones, and those of the rows.

    All are in normal form C, for llama.cpp takes texts as they stand where some tokenizers do not.
    """
    texts, step = [*PIECES], 1
    while len(texts) < TEXTS:
        texts += [f"{a} {b}" for a, b in zip(PIECES, PIECES[step:], strict=False)]
        step += 1
    texts[TEXTS:] = [tokenizer.decode(list(tokens)) for tokens in rows]
    return tuple(unicodedata.normalize("NFC", text) for text in texts)
