"""What base, adapter and an exported model are asked in fresh processes, and what they answer.

These are texts, prompts, held-out rows and suites.
"""

from __future__ import annotations

import os
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

import numpy as np

from nested_core import backend, seams
from nested_core.backend import RECORDED_PACKAGES
from nested_core.config.schema import FineTuneConfig
from nested_core.data.tokens.tokenized_split import draw_rows
from nested_core.errors import NestedTuneError, shorten
from nested_core.gate.proof.fresh_process_check import PROMPTS_WITHOUT_DATA
from nested_core.measure.answers.answer_cache import answer_cache
from nested_core.measure.answers.suite_answers import EncodedSuite, choose_likeliest
from nested_core.measure.fresh_process.starting import (
    MLX_LM_PROGRAM,
    QUESTIONS_PROGRAM,
    Rows,
    describe_model,
    describe_request,
    start_reader,
)
from nested_core.measure.losses.held_out_loss import HeldOutExamples, HeldOutLoss, PairLoss
from nested_core.models.base_model import fingerprint_base_model, fingerprint_tokenizer
from nested_core.models.generation import Answer, read_answer
from nested_core.process.child import Child
from nested_core.records.dataset import PromptFormat
from nested_core.records.losses import Vector
from nested_core.records.paired_difference import Indices
from nested_core.rooms.export.gguf.gguf_file import LLAMA_CPP_PROGRAM
from nested_core.rooms.export.gguf.vocabulary import choose_chat_template
from nested_core.storage.adapter import Adapter
from nested_core.storage.untrusted_files import regular_sha256
from nested_core.text.loss_format import NATS_PER_TOKEN
from nested_core.text.stages import stages

TIMEOUT_SECONDS = 6 * 3600
CONTINUED_TOKENS = 8
TEXTS = 200  # beside those of rows
MAX_TEXT_ROWS = 10_000  # at even distances
COMPARED_ROWS = 16  # held-out rows whose logits are compared
MAX_ROWS = 256  # held-out rows whose losses are compared, one at a time
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
        """Return up to MAX_ROWS held-out examples, drawn by chance, each cut at `max_seq_length`.

        Rows of which nothing is supervised after the cut are left out.
        """
        loss = config.training.loss
        of_pairs = None if loss is None else seams.load_for_loss(loss, HeldOutLoss).pairs(config)
        split = held_out.split
        supervised = np.flatnonzero(held_out.is_example_supervised)
        rows, chosen_places = [], []
        for place in draw_rows(len(supervised), MAX_ROWS):
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
    prompts: prompts, as tokens, after which some 256 logits are compared.
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
    rows: HeldOutRows | None = None
    suites: tuple[EncodedSuite, ...] = ()
    continued: tuple[tuple[int, ...], ...] = ()
    prompt_format: PromptFormat | None = None
    dtype: str | None = None
    trusts_remote_code: bool = False

    def about_rows(
        self, rows: HeldOutRows | None, texts: Sequence[Sequence[int]] = (), *, continues: bool
    ) -> Asked:
        """Return the same with texts of this project and of rows, and prompts from `rows`.

        A prompt is a row up to half of its targets. Without rows fixed prompts are used.

        texts: the tokens of all rows, whose texts are encoded again.
        continues: whether texts are continued after rows up to their answers; after prompts where
            the rows have none, or there are no rows.
        """
        pairs = [] if rows is None else [*zip(rows.tokens, rows.targets, strict=True)]
        halves = tuple(row[: places[len(places) // 2]] for row, places in pairs[:COMPARED_ROWS])
        prompts = halves or tuple(map(tuple, PROMPTS_WITHOUT_DATA))
        starts = tuple(row[: places[0]] for row, places in pairs[:COMPARED_ROWS])
        if min(map(len, starts), default=0) < 2:
            starts = prompts
        return replace(
            self,
            texts=_choose_texts(self.tokenizer, texts),
            prompts=prompts,
            rows=rows,
            continued=starts if continues else (),
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


@dataclass(frozen=True)
class Reading:
    """What a fresh process read of a model, in the order of what it was asked.

    tokenizer: SHA-256 of tokenizer.json as it is in use, or of a GGUF's token texts.
    ends: the tokens at which an answer ends.
    likelihoods: log-likelihoods of each held-out row's targets, in nats.
    answers: to each suite, by its name; empty of a base.
    continued: the tokens with which it goes on after each prompt of `Asked.continued`.
    """

    reader: str
    tokenizer: str
    chat_template: str | None
    ends: frozenset[int]
    token_ids: tuple[tuple[int, ...], ...]
    logits: Rows
    likelihoods: Vector
    answers: Mapping[str, Sequence[Answer]]
    continued: tuple[tuple[int, ...], ...] = ()


def has_llama_cpp() -> bool:
    """Return whether llama.cpp can read a GGUF here: llama-cpp-python is installed."""
    return find_spec("llama_cpp") is not None


def read_base_and_adapter(asked: Asked, adapter: Adapter) -> tuple[Reading, Reading]:
    """Read the base, asked for losses alone, and the base with an adapter, in a new process.

    What it answers is kept in the cache of answers, for all exports of the adapter. Raises
    ConfigError if other users can write to the cache's folder.
    """
    asked = replace(asked, continued=())
    of_base = replace(asked, suites=(), texts=())
    requests = [_request(asked.base, None, of_base), _request(asked.base, adapter.path, asked)]
    cache = answer_cache()
    entry = cache.entry(
        {
            "asked": [request | {"models": asked.dtype, "program": ""} for request in requests],
            "base": fingerprint_base_model(asked.base),
            "tokenizer": fingerprint_tokenizer(asked.base),
            "adapter": adapter.digest(),
            "computed": [backend.device_name(), *map(version, RECORDED_PACKAGES)],
            "code": [*map(regular_sha256, (MLX_LM_PROGRAM, QUESTIONS_PROGRAM))],
        }
    )
    answers = cache.read(entry)
    if answers is None:
        with start_reader(MLX_LM_PROGRAM) as child:
            answers = [_ask(child, request) for request in requests]
        cache.keep(entry, answers)
    return _parse_answer(answers[0], of_base), _parse_answer(answers[1], asked)


def read_in_fresh_process(artefact: Path, asked: Asked, adapter: Path | None = None) -> Reading:
    """Return what an exported model answers in a new process: mlx_lm, or llama.cpp for a GGUF.

    adapter: a LoRA as a GGUF that llama.cpp applies.

    Raises NestedTuneError if the process could not read the model.
    """
    with start_reader(MLX_LM_PROGRAM if artefact.is_dir() else LLAMA_CPP_PROGRAM) as child:
        return _parse_answer(_ask(child, _request(artefact, adapter, asked)), asked)


def _request(base: Path, adapter: Path | None, asked: Asked) -> dict[str, Any]:
    """Return what a new process is asked of a model."""
    return describe_request(
        [describe_model("model", base, adapter, dtype=asked.dtype)],
        asked.base,
        trusts_remote_code=asked.trusts_remote_code,
        texts=asked.texts,
        prompts=asked.prompts,
        program=str(QUESTIONS_PROGRAM),
        **_describe_questions(asked),
    )


def _ask(child: Child, request: dict[str, Any]) -> dict[str, Any]:
    """Return a model's answers; NestedTuneError, with its path, if the process cannot read it."""
    (model,) = request["models"]
    read = Path(model["adapter"] or model["base"])
    count = len(request["rows"]) + len(request["questions"])
    try:
        with NamedTemporaryFile() as done:
            child.send(request | {"done": done.name}, TIMEOUT_SECONDS)
            for _ in range(TIMEOUT_SECONDS):
                if child.has_answer(1.0):
                    break
                share = f"{os.path.getsize(done.name)} of {count} rows and questions"
                stages.info(f"asking {read.name}: {share}")
            answers = child.receive(TIMEOUT_SECONDS)
        if "refused" in answers:
            raise NestedTuneError(answers["error"])
    except (NestedTuneError, OSError, MemoryError) as error:
        raise NestedTuneError(
            f"A new process could not read {read}: {shorten(error, 400)}"
        ) from error
    return dict(answers["model"])


def _describe_questions(asked: Asked) -> dict[str, Any]:
    """Return rows and questions in the form of measure/fresh_process/questions.py.

    The rows are the held-out ones, and then each choice of the suites after its prompt, whose
    likelihoods decide an answer. Questions without choices are asked for a text.
    """
    questions: list[dict[str, Any]] = []
    pairs = () if asked.rows is None else zip(asked.rows.tokens, asked.rows.targets, strict=True)
    rows: list[dict[str, Any]] = [{"tokens": row, "places": places} for row, places in pairs]
    for suite in asked.suites:
        sampling = suite.suite.sampling
        limits = {"max_tokens": sampling.max_tokens, "stop": sampling.stop}
        for prompt, choices in zip(suite.prompts, suite.choices, strict=True):
            for choice in choices:
                places = list(range(len(prompt), len(prompt) + len(choice)))
                rows.append({"tokens": [*prompt, *choice], "places": places})
            if not choices:
                questions.append({"prompt": prompt} | limits)
    limits = {"max_tokens": CONTINUED_TOKENS, "stop": ()}
    questions += [{"prompt": prompt} | limits for prompt in asked.continued]
    return {"rows": rows, "questions": questions}


def _parse_answer(answer: dict[str, Any], asked: Asked) -> Reading:
    """Return the process's answer as a Reading; it is in the order of `_describe_questions`."""
    rows, ends = asked.rows, frozenset(answer["ends"])
    likelihoods, texts = iter(answer["likelihoods"]), iter(answer["answers"])
    of_rows = [next(likelihoods) for _ in (() if rows is None else rows.tokens)]
    answers: dict[str, list[Answer]] = {}
    for suite in asked.suites:
        suite_answers = answers.setdefault(suite.suite.name, [])
        for question, choices in zip(suite.suite.questions, suite.choices, strict=True):
            if choices:
                text = choose_likeliest(question.choices, [next(likelihoods) for _ in choices])
                suite_answers.append(Answer(text, 0, is_endless=False, is_repeated=False))
            else:
                tokens = next(texts)["tokens"]
                tokens = tokens[:-1] if tokens and tokens[-1] in ends else tokens
                suite_answers.append(read_answer(asked.tokenizer, tokens, suite.suite.sampling))
    return Reading(
        reader=answer["reader"],
        tokenizer=answer["tokenizer"],
        chat_template=choose_chat_template(answer["chat_template"]),
        ends=ends,
        token_ids=tuple(map(tuple, answer["token_ids"])),
        logits=np.array(answer["logits"], np.float64),
        likelihoods=np.array(of_rows),
        answers=answers,
        continued=tuple(tuple(each["tokens"]) for each in texts),
    )
