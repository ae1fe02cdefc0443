"""What base, adapter and an exported model are asked: texts, prompts, held-out rows and suites."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nested_core.gate.proof.fresh_process_check import PROMPTS_WITHOUT_DATA
from nested_core.measure.answers.suite_answers import EncodedSuite
from nested_core.measure.losses.held_out_loss import HeldOutExamples
from nested_core.records.losses import Vector
from nested_core.records.paired_difference import Indices

TEXTS = 200
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
    *(
        "Москва",
        "Ελλάδα",
        "القاهرة",
        "שלום",
        "नमस्ते",
        "ไทย",
        "日本語のテキスト",
        "中文字符",
        "한국어",
    ),
    *("🙂🙃", "👩‍💻", "🇫🇷", "½ × ²", "“quotes” — dash…", "€5 £6 ¥7", "\u00a0nbsp", "...", "!!!???"),
    *("<|im_start|>", "<s>", "[INST]", "zzzzzzzzzz", "aA1!", "  ", "A"),
)


@dataclass(frozen=True)
class HeldOutRows:
    """The rows whose losses are compared.

    tokens: of each row. targets: the places in it that the loss counts. counts: how many.
    clusters: the cluster of each row, None if each is its own.
    """

    file: str
    tokens: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]
    clusters: Indices | None

    @property
    def counts(self) -> Vector:
        """The tokens of each row that the loss counts, float64 (rows)."""
        return np.array([len(places) for places in self.targets], np.float64)

    @classmethod
    def choose(cls, held_out: HeldOutExamples, max_length: int) -> HeldOutRows:
        """Choose up to MAX_ROWS of the held-out examples, evenly, each cut at `max_length`."""
        split = held_out.split
        supervised = np.flatnonzero(held_out.is_example_supervised)
        count = min(MAX_ROWS, len(supervised))
        chosen = np.unique(np.linspace(0, len(supervised) - 1, count).round()).astype(np.int64)
        tokens, targets, kept = [], [], []
        for place in chosen.tolist():
            row = int(supervised[place])
            counted = np.flatnonzero(split.example_mask(row)[:max_length]).tolist()
            if counted:
                tokens.append(tuple(split.example(row)[:max_length].tolist()))
                targets.append(tuple(counted))
                kept.append(place)
        clusters = None if held_out.clusters is None else held_out.clusters[kept]
        return cls(held_out.file, tuple(tokens), tuple(targets), clusters)


@dataclass(frozen=True)
class Asked:
    """What every model is asked.

    base: the base's folder. tokenizer: the base's, by which prompts and rows were encoded.
    texts: to be encoded. prompts: those whose next token's logits are compared.
    columns: the token ids whose logits are.
    rows: whose losses are compared; None without held-out rows.
    """

    base: Path
    tokenizer: Any
    texts: tuple[str, ...]
    prompts: tuple[tuple[int, ...], ...]
    columns: tuple[int, ...]
    rows: HeldOutRows | None
    suites: tuple[EncodedSuite, ...]

    @classmethod
    def choose(
        cls,
        base: Path,
        tokenizer: Any,
        rows: HeldOutRows | None,
        suites: tuple[EncodedSuite, ...] = (),
    ) -> Asked:
        """Choose texts, and the beginnings of held-out rows as prompts."""
        pairs = [] if rows is None else zip(rows.tokens, rows.targets, strict=True)
        prompts = tuple(tokens[: places[len(places) // 2]] for tokens, places in pairs)
        size = len(tokenizer)
        return cls(
            base,
            tokenizer,
            texts=_choose_texts(tokenizer, () if rows is None else rows.tokens),
            prompts=prompts[:COMPARED_ROWS] or tuple(map(tuple, PROMPTS_WITHOUT_DATA)),
            columns=tuple(range(0, size, max(1, size // MAX_COLUMNS)))[:MAX_COLUMNS],
            rows=rows,
            suites=suites,
        )


def _choose_texts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Choose TEXTS texts: of many scripts, joined ones, and those of the rows.

    All are in normal form C, for llama.cpp takes texts as they stand where some tokenizers do not.
    """
    texts = [*PIECES, *(tokenizer.decode(list(tokens)) for tokens in rows[: TEXTS // 4])]
    step = 1
    while len(texts) < TEXTS:
        texts += [f"{a} {b}" for a, b in zip(PIECES, PIECES[step:], strict=False)]
        step += 1
    return tuple(unicodedata.normalize("NFC", text) for text in texts[:TEXTS])
