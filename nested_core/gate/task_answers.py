"""The answers to `gate.tasks` of the base, of the adapter trained from, and of the trained one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import mlx.core as mx

from nested_core import backend
from nested_core.gate.answers.answer_cache import AnsweringModel, default_cache
from nested_core.gate.answers.answer_records import AnsweringRole, AnswerRecord
from nested_core.gate.answers.configured_suites import encode_suites, read_suites, record_suites
from nested_core.gate.answers.suite_answers import EncodedSuite
from nested_core.gate.answers.suites import name_question
from nested_core.gate.held_out_loss import LoadedBase
from nested_core.models.base_model import compute_dtype, fingerprint_base_model
from nested_core.models.generation import Answer
from nested_core.models.lora_attachment import load_adapter_tensors
from nested_core.storage.adapter import Adapter
from nested_core.storage.run_directory import RunDirectory


@dataclass(frozen=True)
class _AskedModel:
    """The tensors to answer with, and what its answers are kept under; None keeps nothing."""

    role: AnsweringRole
    tensors: Callable[[], Mapping[str, mx.array]]
    cached_as: AnsweringModel | None

    def answer(self, base: LoadedBase, suite: EncodedSuite) -> Sequence[Answer]:
        """Its answers, from the cache or now; its tensors must be in the model."""

        def answer_now() -> Sequence[Answer]:
            return suite.answer(base.model, base.tokenizer)

        if self.cached_as is None:
            return answer_now()
        return default_cache().fetch(self.cached_as, suite, answer_now)


def answer_tasks(
    base: LoadedBase, run: RunDirectory, initial: Adapter, trained: Adapter
) -> tuple[AnswerRecord, ...]:
    """What the base, the initial adapter unless it is fresh, and the trained one answer; scored.

    Raises ConfigError or DatasetError if a suite is missing, has bad lines, changed since the run
    began or does not fit the model, or if its scorer fails.
    """
    suites = read_suites(base.config.gate)
    record_suites(run, suites)
    encoded = encode_suites(suites, base.tokenizer, base.folder)
    return tuple(
        record
        for asked in _asked_models(base, initial, trained)
        for record in _ask_model(base, asked, encoded)
    )


def _asked_models(base: LoadedBase, initial: Adapter, trained: Adapter) -> list[_AskedModel]:
    config = base.config
    fingerprint = fingerprint_base_model(base.folder)
    computation = f"{backend.device()} {compute_dtype(config)} {config.fine_tune_type}"

    def cached_as(digest: str | None) -> AnsweringModel:
        return AnsweringModel(fingerprint, digest, computation)

    asked = [_AskedModel("base", lambda: base.parameters, cached_as(None))]
    if not _is_untrained(initial, base.parameters):
        cached = cached_as(initial.digest())
        asked.append(_AskedModel("parent", lambda: _arrays(initial), cached))
    return [*asked, _AskedModel("candidate", lambda: _arrays(trained), None)]


def _is_untrained(adapter: Adapter, fresh: Mapping[str, mx.array]) -> bool:
    """Whether an adapter leaves the base as it is: B is zero, or each weight is the base's own."""
    arrays = _arrays(adapter)
    factors = [array for name, array in arrays.items() if name.endswith("lora_b")]
    if factors:
        return not any(mx.any(factor).item() for factor in factors)
    return all(
        mx.array_equal(array, fresh[name].astype(array.dtype)).item()
        for name, array in arrays.items()
    )


def _arrays(adapter: Adapter) -> dict[str, mx.array]:
    return {name: tensor.to_mlx() for name, tensor in adapter.tensors.items()}


def _ask_model(
    base: LoadedBase, asked: _AskedModel, encoded: Sequence[EncodedSuite]
) -> list[AnswerRecord]:
    load_adapter_tensors(base.model, asked.tensors())
    records = []
    for suite in encoded:
        start = time.monotonic()
        answers = asked.answer(base, suite)
        seconds = time.monotonic() - start
        records += _score_answers(suite, asked.role, answers, seconds / len(answers))
    return records


def _score_answers(
    encoded: EncodedSuite, role: AnsweringRole, answers: Sequence[Answer], seconds: float
) -> list[AnswerRecord]:
    scored = encoded.score(answers)
    suite = encoded.suite
    return [
        AnswerRecord(
            task=suite.name,
            model=role,
            line=question.line,
            question=name_question(question),
            answer=answer.text,
            score=score,
            tokens=answer.tokens,
            empty=answer.is_empty,
            endless=answer.is_endless,
            repeated=answer.is_repeated,
            seconds=seconds,
        )
        for question, answer, score in zip(suite.questions, answers, scored.scores, strict=True)
    ]
