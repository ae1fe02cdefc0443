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

from nested_core import seams
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
from nested_core.text.loss_format import NATS_PER_TOKEN
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
    *("Москва", "Ελλάδα", "القاهرة", "שלום", "नमस्ते", "ไทย"),
    *("日本語のテキスト", "中文字符", "한국어"),
    *("🙂🙃", "👩‍💻", "🇫🇷", "½ × ²", "“quotes” — dash…", "€5 £6 ¥7", "\u00a0nbsp", "...", "!!!???"),
    *("<|im_start|>", "<s>", "[INST]", "zzzzzzzzzz", "aA1!", "  ", "A"),
)


@dataclass(frozen=True)
class HeldOutRows:
    """The rows whose losses are compared.

    tokens: of each row; of pairs, of all chosen answers and then of all rejected ones.
    targets: the places in them that the loss counts.
    clusters: the cluster of each row, None if each is its own.
    loss: what computes the losses of pairs from log-likelihoods; None for the cross-entropy.
    unit: of the losses.
    """

    file: str
    tokens: tuple[tuple[int, ...], ...]
    targets: tuple[tuple[int, ...], ...]
    clusters: Indices | None
    loss: Any = None
    unit: str = NATS_PER_TOKEN

    @property
    def counts(self) -> Vector:
        """The weight of each row in a mean: its counted tokens, or 1 for a pair; float64 (n,)."""
        tokens = np.array([len(places) for places in self.targets], np.float64)
        return tokens if self.loss is None else np.ones(len(tokens) // 2)

    def compute_losses(self, likelihoods: Vector, of_base: Vector) -> Vector:
        """The loss of each row, float64 (n,), by log-likelihoods of `tokens`, and by the base's."""
        tokens = np.array([len(places) for places in self.targets], np.float64)
        of_pairs = None if self.loss is None else self.loss.of_pairs
        return -likelihoods / tokens if of_pairs is None else of_pairs(likelihoods, of_base, tokens)


@dataclass(frozen=True)
class Reference:
    """What was measured of base and adapter, and with which questions.

    folder: the base's.
    base_logits, adapter_logits: a row a prompt, in the order of the columns.
    base_likelihoods, adapter_likelihoods: log-likelihoods of each row's targets, in nats.
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
    base_likelihoods: Vector
    adapter_likelihoods: Vector
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


def choose_rows(held_out: HeldOutExamples, config: FineTuneConfig) -> HeldOutRows:
    """Up to MAX_ROWS of the held-out examples, evenly, each cut at `max_seq_length` tokens."""
    loss = config.training.loss
    of_pairs = None if loss is None else seams.load(seams.find_loss(loss).pairs).of_config(config)
    split = held_out.split
    supervised = np.flatnonzero(held_out.is_example_supervised)
    places = np.unique(np.linspace(0, len(supervised) - 1, min(MAX_ROWS, len(supervised))).round())
    rows, kept = [], []
    for place in places.astype(np.int64).tolist():
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
            kept.append(place)
    texts = [text for answer in zip(*rows, strict=True) for text in answer]
    return HeldOutRows(
        held_out.file,
        tokens=tuple(tuple(tokens.tolist()) for tokens, _ in texts),
        targets=tuple(tuple(targets) for _, targets in texts),
        clusters=None if held_out.clusters is None else held_out.clusters[kept],
        loss=of_pairs,
        unit=seams.unit_of_loss(loss),
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
    names = [suite.suite.name for suite in suites]
    answers = {name: [record for record in records if record.task == name] for name in names}
    texts = choose_texts(tokenizer, () if rows is None else rows.tokens)
    logits, likelihoods = [], []
    for tensors in (base.parameters, adapter.to_mlx()):
        load_adapter_tensors(base.model, tensors)
        with in_evaluation_mode(base.model):
            logits.append(_compute_logits(base, prompts, columns))
            likelihoods.append(_compute_likelihoods(base, rows))
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
        base_likelihoods=likelihoods[0],
        adapter_likelihoods=likelihoods[1],
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


def _compute_likelihoods(base: LoadedBase, rows: HeldOutRows | None) -> Vector:
    """The log-likelihood of the targets of each of the rows' `tokens`, in nats."""
    sums = []
    for tokens, places in () if rows is None else zip(rows.tokens, rows.targets, strict=True):
        logits = extract_logits(base.model(mx.array([list(tokens[:-1])])))[0].astype(mx.float32)
        needed = logits[mx.array(places) - 1]
        targets = mx.array([tokens[place] for place in places])[:, None]
        own = mx.take_along_axis(needed, targets, -1).squeeze(-1) - mx.logsumexp(needed, axis=-1)
        sums.append(float(own.sum().item()))  # type: ignore[arg-type]
    return np.array(sums)
