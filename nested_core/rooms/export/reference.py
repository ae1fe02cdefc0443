"""What an export is compared with: the base, and the base with the adapter, as they are trained.

Token ids of fixed texts, logits after the canary's prompts and after held-out rows, losses of those
rows, and the answers to suites.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from nested_core.config.schema import FineTuneConfig
from nested_core.gate.checks.tasks import AskedModel, ask_model
from nested_core.gate.proof.fresh_process_check import PROMPTS_WITHOUT_DATA
from nested_core.measure.answers.suite_answers import EncodedSuite, encode_suites, read_suites
from nested_core.measure.fresh_process.starting import Rows
from nested_core.measure.losses.held_out_loss import HeldOutExamples, LoadedBase
from nested_core.models.lora_attachment import load_adapter_tensors
from nested_core.models.parameters import in_evaluation_mode
from nested_core.records.answers import AnswerRecord
from nested_core.records.dataset import PromptFormat
from nested_core.records.losses import Vector
from nested_core.records.paired_difference import Indices
from nested_core.storage.adapter import Adapter
from nested_core.storage.canary_file import Canary
from nested_core.training.loss.loss_interface import extract_logits

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


@dataclass(frozen=True)
class Reference:
    """What was measured of base and adapter, and with which questions.

    folder: the base's.
    base_logits, adapter_logits: a row a prompt, in the order of the columns.
    base_losses, adapter_losses: mean loss of each row in nats a token; None without rows.
    suites, answers: the questions in token ids, and the adapter's scored answers by suite.
    """

    folder: Path
    tokenizer: Any
    texts: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    prompts: tuple[tuple[int, ...], ...]
    columns: tuple[int, ...]
    base_logits: Rows
    adapter_logits: Rows
    rows: HeldOutRows | None
    base_losses: Vector | None
    adapter_losses: Vector | None
    suites: tuple[EncodedSuite, ...]
    answers: Mapping[str, Sequence[AnswerRecord]]


def choose_texts(tokenizer: Any, rows: Sequence[Sequence[int]]) -> tuple[str, ...]:
    """Texts whose token ids are compared: of many scripts, joined ones, and those of the rows.

    All are in normal form C, for llama.cpp takes texts as they stand where some tokenizers do not.
    """
    own = [tokenizer.decode(list(tokens)) for tokens in rows[: TEXTS // 4]]
    plain = [*PIECES, *own]
    step = 1
    while len(plain) < TEXTS:
        plain += [f"{a} {b}" for a, b in zip(PIECES, PIECES[step:], strict=False)]
        step += 1
    return tuple(unicodedata.normalize("NFC", text) for text in plain[:TEXTS])


def choose_rows(held_out: HeldOutExamples, max_length: int) -> HeldOutRows:
    """Up to MAX_ROWS of the held-out examples, evenly, each cut at `max_length` tokens."""
    split = held_out.split
    supervised = np.flatnonzero(held_out.is_example_supervised)
    places = np.unique(np.linspace(0, len(supervised) - 1, min(MAX_ROWS, len(supervised))).round())
    chosen = places.astype(np.int64)
    tokens, targets, kept = [], [], []
    for place in chosen.tolist():
        row = int(supervised[place])
        own = split.example(row)[:max_length].tolist()
        counted = np.flatnonzero(split.example_mask(row)[:max_length]).tolist()
        if counted:
            tokens.append(tuple(own))
            targets.append(tuple(counted))
            kept.append(place)
    clusters = held_out.clusters
    return HeldOutRows(
        held_out.file, tuple(tokens), tuple(targets), None if clusters is None else clusters[kept]
    )


def measure_reference(
    config: FineTuneConfig,
    base: LoadedBase,
    adapter: Adapter,
    rows: HeldOutRows | None,
    canary: Canary | None,
    *,
    prompt_format: PromptFormat | None = None,
) -> Reference:
    """Measure base and adapter with the suites of `gate.tasks` and these rows.

    Raises what reading and encoding suites raises.
    """
    tokenizer = base.tokenizer
    prompts = _choose_prompts(rows, canary)
    size = len(tokenizer)
    columns = tuple(range(0, size, max(1, size // MAX_COLUMNS)))[:MAX_COLUMNS]
    suites = encode_suites(read_suites(config.gate), tokenizer, base.folder, prompt_format)
    records = ask_model(AskedModel("candidate", base, adapter), suites)
    answers: dict[str, list[AnswerRecord]] = {}
    for record in records:
        answers.setdefault(record.task, []).append(record)
    texts = choose_texts(tokenizer, () if rows is None else rows.tokens)
    logits, losses = [], []
    for tensors in (base.parameters, adapter.to_mlx()):
        load_adapter_tensors(base.model, tensors)
        with in_evaluation_mode(base.model):
            logits.append(_compute_logits(base, prompts, columns))
            losses.append(None if rows is None else _compute_losses(base, rows))
    return Reference(
        folder=base.folder,
        tokenizer=tokenizer,
        texts=texts,
        token_ids=tuple(tuple(map(int, tokenizer.encode(text))) for text in texts),
        prompts=prompts,
        columns=columns,
        base_logits=logits[0],
        adapter_logits=logits[1],
        rows=rows,
        base_losses=losses[0],
        adapter_losses=losses[1],
        suites=suites,
        answers=answers,
    )


def _choose_prompts(rows: HeldOutRows | None, canary: Canary | None) -> tuple[tuple[int, ...], ...]:
    """The canary's prompts, and held-out rows up to their last token that is learnt."""
    prompts: list[tuple[int, ...]] = []
    if canary is not None:
        prompts += [*canary.logits.prompts, *(question.prompt for question in canary.questions)]
    if rows is not None:
        pairs = list(zip(rows.tokens, rows.targets, strict=True))[:COMPARED_ROWS]
        prompts += [tokens[: places[len(places) // 2]] for tokens, places in pairs]
    return tuple(prompts) or tuple(map(tuple, PROMPTS_WITHOUT_DATA))


def _compute_logits(
    base: LoadedBase, prompts: Sequence[Sequence[int]], columns: Sequence[int]
) -> Rows:
    rows = []
    for prompt in prompts:
        last = extract_logits(base.model(mx.array([list(prompt)])))[0, -1].astype(mx.float32)
        rows.append(np.array(last[mx.array(list(columns))], np.float64))
    return np.stack(rows)


def _compute_losses(base: LoadedBase, rows: HeldOutRows) -> Vector:
    """The mean loss of each row in nats a token that the loss counts."""
    means = []
    for tokens, places in zip(rows.tokens, rows.targets, strict=True):
        logits = extract_logits(base.model(mx.array([list(tokens[:-1])])))[0].astype(mx.float32)
        needed = logits[mx.array(places) - 1]
        targets = mx.array([tokens[place] for place in places])[:, None]
        own = mx.logsumexp(needed, axis=-1) - mx.take_along_axis(needed, targets, -1).squeeze(-1)
        means.append(float(own.mean().item()))  # type: ignore[arg-type]
    return np.array(means)
