"""The proof from a fresh process, which loads base and adapter by plain mlx_lm.load.

Its logits on fixed prompts must differ from those with the initial adapter. If the trainer recorded
its own logits, they must equal these within a tolerance. Only what the new process wrote is
trusted, no array of this process.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from nested_core.errors import JUDGE_AGAIN, ConfigError, NestedTuneError, shorten
from nested_core.measure.fresh_process.starting import (
    MLX_LM_PROGRAM,
    Rows,
    describe_model,
    describe_request,
    start_reader,
)
from nested_core.process.child import Child
from nested_core.records.verdict import ProofEvidence, Reason
from nested_core.storage.adapter import WEIGHTS_NAME
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.canary_file import MAX_CANARY_TOKENS
from nested_core.storage.safetensors_files import read_tensors

# Relative to the centred norm of the trainer's logits. If the trainer computes in float32, so does
# the process, with the same kernels. In narrower types the order of summation changes the logits.
TOLERANCE_FLOAT32 = 1e-3
TOLERANCE_NARROW_DTYPES = 5e-2
# Narrow types can move logits further: bfloat16 moved those of a model of 135M by 0.042 and 0.062.
# Then the trainer's logits may be this many times as far from float32 logits as the process's are.
# Of that model, they were up to 7.6 times as far after one prompt, and at most 1.5 after four.
ROUNDINGS_ALLOWED = 3.0
LARGEST_ROUNDING = 0.1  # a larger distance caused by a narrow type is counted as this much
TIMEOUT_SECONDS = 3600
PROMPTS_WITHOUT_DATA = [list(range(start, start + 8)) for start in (1, 9, 17, 25)]


@dataclass(frozen=True)
class ProofRequest:
    """What the fresh process is to load and compute, and the trainer's logits to compare with.

    initial: None compares the trained adapter with the base model alone.
    prompts, questions: token ids. The trained model, in its stored types, answers the questions
        greedily.
    columns: the token ids whose logits are compared; if empty, some 256 of the vocabulary.
    expected: the trainer's logits, a row for each prompt; None if it recorded none.
    has_diverged: whether the training loss diverged. Rounding is then as large as the weights, so
        logits other than the trainer's do not indicate another configuration.
    """

    model: Path
    initial: Path | None
    trained: Path
    prompts: Sequence[Sequence[int]] = tuple(PROMPTS_WITHOUT_DATA)
    columns: Sequence[int] = ()
    expected: Sequence[Sequence[float | None]] | None = None
    is_float32: bool = False
    trusts_remote_code: bool = False
    questions: Sequence[Sequence[int]] = ()
    has_diverged: bool = False


@dataclass(frozen=True)
class GreedyAnswer:
    """A greedily generated answer, as token ids and as text."""

    tokens: tuple[int, ...]
    text: str


@dataclass(frozen=True)
class StoredTypesAnswers:
    """What the trained model computes in the types in which it is stored, as a server would.

    logits: a row for each prompt of the request.
    answers: in the order of the request's questions.
    """

    logits: Rows
    answers: tuple[GreedyAnswer, ...]


@dataclass(frozen=True)
class FreshProcessLogits:
    """Logits with either adapter, a row for each prompt, computed in the fresh process.

    base: the logits of the base model alone; None if those with the initial adapter are finite.
    factors: the names of the LoRA factors of the trained model.
    canary: None if the request has no questions.
    """

    initial: Rows
    trained: Rows
    base: Rows | None
    factors: set[str]
    canary: StoredTypesAnswers | None = None


@dataclass(frozen=True)
class Proof:
    """The result of a fresh process: the evidence for gate.json, and reasons to reject the adapter.

    canary: the answers to the request's questions; None without questions, or if the process could
        not use the adapter.
    """

    evidence: ProofEvidence
    reasons: tuple[Reason, ...] = ()
    canary: StoredTypesAnswers | None = None


def prove_effect_in_fresh_process(request: ProofRequest) -> Proof:
    """Compute logits with base and adapters in a new process, and judge them.

    Raises NestedTuneError if the process failed or was killed, which says nothing about the
    adapter.
    """
    with closing(RunningProof(request)) as proof:
        return proof.judge()


def _judge_answers(request: ProofRequest, answers: FreshProcessLogits | Reason) -> Proof:
    """Turn the process's logits, or the reason why it has none, into a Proof."""
    if isinstance(answers, Reason):
        model, prompts = str(request.model), len(request.prompts)
        return Proof({"model": model, "prompts": prompts, "error": answers.message}, (answers,))
    evidence, reasons = _judge_logits(request, answers)
    return Proof(evidence, tuple(reasons), answers.canary)


def _judge_logits(
    request: ProofRequest, answers: FreshProcessLogits
) -> tuple[ProofEvidence, list[Reason]]:
    """Compare the logits that a fresh process computed with what they should be.

    The trained adapter's must be finite, differ from the initial adapter's, and be close to those
    that the trainer computed, if it recorded any. Returns the evidence for gate.json and at most
    one reason to reject the adapter.

    request: what the process was asked. answers: its logits with either adapter.
    """
    evidence: ProofEvidence = {"model": str(request.model)}
    answers, expected = keep_prompts_with_finite_base(answers, request.expected)
    evidence["prompts"] = len(answers.initial)
    tensors = read_tensors(request.trained / WEIGHTS_NAME, follow_links=True)
    untrained = sorted(answers.factors - tensors.keys())  # new factors, at their random start
    if untrained:
        message = f"mlx_lm.load makes {len(untrained)} factors that the adapter has no tensors for"
        return evidence, [Reason("tensor_missing", message, tuple(untrained))]
    moved = largest_difference(answers.trained, answers.initial)
    evidence["max_abs_difference_from_initial"] = finite_or_none(moved)
    if reason := non_finite_reason(answers):
        return evidence, [reason]
    if moved == 0:
        message = "in a new process, the logits on every prompt are those of the initial adapter"
        return evidence, [Reason("no_effect", message)]
    if expected is None:
        return evidence, []
    tolerance = TOLERANCE_FLOAT32 if request.is_float32 else TOLERANCE_NARROW_DTYPES
    distance = relative_distance(answers.trained, expected)
    evidence["relative_distance_from_trainer"] = finite_or_none(distance)
    evidence["tolerance"] = tolerance
    if distance <= tolerance:
        return evidence, []
    message = (
        f"in a new process, the logits are not those that the trainer computed with this adapter: "
        f"relative distance {distance:.3g}, tolerance {tolerance:g}"
    )
    return evidence, [
        Reason("loss_regressed" if request.has_diverged else "config_mismatch", message)
    ]


def _may_be_rounding(request: ProofRequest, proof: Proof) -> bool:
    """Whether the only reason is a distance from the trainer's logits, in a narrow type."""
    distance = proof.evidence.get("relative_distance_from_trainer")
    codes = [reason.code for reason in proof.reasons]
    return not request.is_float32 and distance is not None and codes == ["config_mismatch"]


def _judge_rounding(
    request: ProofRequest, answers: FreshProcessLogits, proof: Proof, exact: Rows
) -> Proof:
    """Drop the proof's reason if the trainer's logits are about as exact as the fresh process's.

    exact: the trained model's logits in float32, a row for each prompt. Both are compared with
        them.
    """
    rounding = relative_distance(answers.trained, exact)
    distance = relative_distance(np.array(request.expected, np.float64), exact)
    evidence = proof.evidence | {
        "rounding": finite_or_none(rounding),
        "relative_distance_from_float32": finite_or_none(distance),
    }
    allowed = ROUNDINGS_ALLOWED * min(rounding, LARGEST_ROUNDING)
    return replace(proof, evidence=evidence, reasons=() if distance <= allowed else proof.reasons)


def keep_prompts_with_finite_base(
    answers: FreshProcessLogits, expected: Sequence[Sequence[float | None]] | None
) -> tuple[FreshProcessLogits, Rows | None]:
    """Drop the prompts for which the base model alone gives logits that are not finite.

    A base whose embedding of one token is broken, say, fails on every prompt with this token,
    whatever the adapter. If all prompts fail, all are kept. Returns the logits and the rows of
    `expected` for the kept prompts.

    answers: `base` in it is None if the base alone was not asked, because it was not needed.
    expected: the trainer's logits, a row for each prompt; None in a row is a value that is not
        finite.
    """
    rows = None if expected is None else np.array(expected, np.float64)  # None becomes NaN
    if answers.base is None:
        return answers, rows
    is_sound = np.array([_count_nonfinite(row[None]) == 0 for row in answers.base])
    if not is_sound.any() or answers.trained.shape != answers.base.shape:
        return answers, rows
    sound = replace(
        answers,
        initial=answers.initial[is_sound],
        trained=answers.trained[is_sound],
        base=answers.base[is_sound],
    )
    return sound, None if rows is None else rows[is_sound]


def non_finite_reason(answers: FreshProcessLogits) -> Reason | None:
    """Return a reason if logits overflowed, which says whether base or adapter is to blame.

    A model may mask a part of its vocabulary by -inf. That is no overflow if it does so without the
    trained adapter too.
    """
    if answers.base is not None and (broken := _count_nonfinite(answers.base)):
        message = f"{broken} logits of the base model alone are not finite: the base is not sound"
        return Reason("non_finite", f"in a new process, {message}; the adapter is not to blame")
    if broken := _count_nonfinite(answers.initial):
        message = f"{broken} logits with the initial adapter are not finite already"
        return Reason("non_finite", f"in a new process, {message}; training is not to blame")
    # Finite before training, not finite after it
    lost = ~np.isfinite(answers.trained) & np.isfinite(answers.initial)
    broken = max(_count_nonfinite(answers.trained), int(lost.sum()))
    if broken:
        message = f"{broken} of {lost.size} logits with the trained adapter are not finite"
        return Reason("non_finite", f"in a new process, {message}; those before it are")
    if is_constant(answers.trained) and not is_constant(answers.initial):
        message = "every logit with the trained adapter is the same: numbers in the model overflow"
        return Reason("non_finite", f"in a new process, {message}")
    return None


def _count_nonfinite(logits: Rows) -> int:
    """Count the logits that no model gives on purpose: NaN, +inf, and rows that are all -inf."""
    is_masked = np.isneginf(logits)
    is_masked &= ~is_masked.all(axis=-1, keepdims=True)
    return int((~np.isfinite(logits) & ~is_masked).sum())


def is_constant(logits: Rows) -> bool:
    """Whether all tokens have the same logit after each prompt, as if activations overflowed.

    An infinite mean square makes the model's normalisation return zeros.
    """
    return logits.ndim == 2 and logits.shape[1] > 1 and bool((logits == logits[:, :1]).all())


def largest_difference(logits: Rows, other: Rows) -> float:
    """Return the largest absolute difference; infinity if only one logit of a pair is finite."""
    if not _are_finite_alike(logits, other):
        return math.inf
    finite = np.isfinite(logits)
    return float(np.abs(logits[finite] - other[finite]).max(initial=0.0))


def relative_distance(logits: Rows, expected: Rows) -> float:
    """Return the norm of the difference over the norm of `expected` minus its mean.

    Only finite logits count. Infinity if the arrays are not finite in the same positions.
    """
    finite = np.isfinite(expected)
    if not _are_finite_alike(logits, expected) or not finite.any():
        return math.inf
    size = float(np.linalg.norm(expected[finite] - expected[finite].mean()))
    difference = float(np.linalg.norm(logits[finite] - expected[finite]))
    if size == 0:
        return math.inf if difference else 0.0
    return difference / size


def _are_finite_alike(first: Rows, second: Rows) -> bool:
    """Whether two arrays have the same shape and are finite in the same positions."""
    return first.shape == second.shape and bool((np.isfinite(first) == np.isfinite(second)).all())


def compute_logits_in_fresh_process(request: ProofRequest) -> FreshProcessLogits | Reason:
    """Return the logits of a new process, or the reason if mlx_lm.load refuses an adapter.

    Raises ConfigError if it refuses the base alone.
    """
    with closing(RunningProof(request)) as proof:
        return proof.wait_for_logits()


def start_proof_process(base: Path | None = None, *, trusts_remote_code: bool = False) -> Child:
    """Start a process that imports mlx_lm, loads a base if one is given, and awaits a request.

    What is wrong with the base is told by the request that asks for it.
    """
    process = start_reader(MLX_LM_PROGRAM)
    if base is not None:
        with suppress(NestedTuneError):
            request = describe_request([], base, trusts_remote_code=trusts_remote_code)
            process.send(request | {"load_ahead": str(base)})
    return process


class RunningProof:
    """A proof being computed, in a new process or in one that was started earlier."""

    def __init__(self, request: ProofRequest, process: Child | None = None) -> None:
        """Send the request to a process, which is started unless one is given."""
        self.request = request
        try:
            described = _describe_request(request, _describe_models(request))
        except BaseException:  # of a base's tokenizer
            if process is not None:
                process.end()
            raise
        self._process = process or start_proof_process()
        self._process.send(described)

    def wait_for_logits(self) -> FreshProcessLogits | Reason:
        """Wait for the process's logits; return a reason instead if mlx_lm.load refuses an adapter.

        If the process refuses the trained adapter, it is asked about the initial one alone; if the
        logits with that one are not finite, about the base alone. This tells which is to blame.

        Raises ConfigError if it refuses the base alone, NestedTuneError if the process gave no
        answer, which is never the adapter's fault.
        """
        answers = self._receive()
        request = self.request
        if answers.get("refused") == "trained" and request.initial is not None:
            alone = self._ask(_describe_initial(request))
            if "refused" in alone:  # neither adapter can be used: the initial one is reported
                answers = alone
        if "refused" in answers:
            return _describe_refusal(request, answers)
        initial = np.array(answers["initial"]["logits"], np.float64)
        base = None
        if not np.isfinite(initial).all():
            base_answer = self._ask(describe_model("base", request.model, dtype=_dtype_of(request)))
            if "refused" in base_answer:
                return _describe_refusal(request, base_answer)
            base = np.array(base_answer["base"]["logits"], np.float64)
        return FreshProcessLogits(
            initial=initial,
            trained=np.array(answers["trained"]["logits"], np.float64),
            base=base,
            factors=set(answers["trained"]["factors"]),
            canary=_parse_stored_types_answers(answers.get("stored")),
        )

    def _ask(self, model: dict[str, object]) -> dict[str, Any]:
        """Send a request for one more model and wait for the answer."""
        self._process.send(_describe_request(self.request, [model]))
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        """Wait for the process's answer to the last request.

        Raises NestedTuneError if the process failed or took longer than TIMEOUT_SECONDS.
        """
        try:
            answers: dict[str, Any] = self._process.receive(TIMEOUT_SECONDS)
            if "is_loaded_ahead" in answers:  # of an earlier request
                answers = self._process.receive(TIMEOUT_SECONDS)
        except (NestedTuneError, OSError, MemoryError) as error:
            raise NestedTuneError(
                f"The process that loads base and adapter for the gate failed: "
                f"{shorten(error, 400)}. This says nothing about the adapter, and there is no "
                f"verdict. Look for room in {tempfile.gettempdir()}, memory, open files and the "
                f"C++ compiler.",
                advice=JUDGE_AGAIN,
            ) from error
        return answers  # numbers may be NaN, which Python's JSON allows

    def judge(self) -> Proof:
        """Wait for the logits and judge them.

        If they differ too much from the trainer's in a narrow type, the process computes them in
        float32 too, to measure how much of the difference is rounding.
        """
        answers = self.wait_for_logits()
        proof = _judge_answers(self.request, answers)
        if not _may_be_rounding(self.request, proof) or isinstance(answers, Reason):
            return proof
        exact = self._compute_in_float32()
        return proof if exact is None else _judge_rounding(self.request, answers, proof, exact)

    def _compute_in_float32(self) -> Rows | None:
        """Return the trained model's logits in float32; None if the process failed.

        It may lack the memory for float32.
        """
        request = self.request
        model = describe_model("exact", request.model, request.trained, dtype="float32")
        try:
            answer = self._ask(model)
        except NestedTuneError:
            return None
        return np.array(answer["exact"]["logits"], np.float64) if "exact" in answer else None

    def close(self) -> None:
        """End the process, even if it is still computing."""
        self._process.end()


def _dtype_of(request: ProofRequest) -> str | None:
    """Return the dtype to load the model in; None loads it as it is stored."""
    return "float32" if request.is_float32 else None


def _describe_initial(request: ProofRequest) -> dict[str, Any]:
    """Describe the base with the initial adapter, for the fresh process to load."""
    return describe_model("initial", request.model, request.initial, dtype=_dtype_of(request))


def _describe_models(request: ProofRequest) -> list[dict[str, object]]:
    """Describe the models to load: with each adapter, and for questions the trained as stored."""
    base, trained = request.model, request.trained
    models = [
        describe_model("trained", base, trained, dtype=_dtype_of(request)),
        _describe_initial(request),
    ]
    if request.questions:
        questions = [
            {"prompt": list(question), "max_tokens": MAX_CANARY_TOKENS, "stop": []}
            for question in request.questions
        ]
        models.append(describe_model("stored", base, trained, dtype=None, questions=questions))
    return models


def _describe_request(request: ProofRequest, models: list[dict[str, object]]) -> dict[str, object]:
    """Build the JSON request to the fresh process: models to load, prompts and logit columns."""
    return describe_request(
        models,
        request.model,
        trusts_remote_code=request.trusts_remote_code,
        prompts=[list(prompt) for prompt in request.prompts],
        columns=list(request.columns),
    )


def _describe_refusal(request: ProofRequest, answers: dict[str, object]) -> Reason:
    """Return the reason against an adapter that mlx_lm.load refuses; ConfigError for the base."""
    error, side = shorten(answers["error"], 300), answers["refused"]
    if side == "base":
        code = "" if request.trusts_remote_code else " No code that a model brings is run here."
        raise ConfigError(f"model: {request.model} could not be loaded: {error}.{code}")
    side = "trained" if side == "stored" else side
    message = f"mlx_lm.load in a new process could not use the {side} adapter: {error}"
    return Reason("unreadable", message)


def _parse_stored_types_answers(stored: dict[str, Any] | None) -> StoredTypesAnswers | None:
    """Parse the process's answer for the model in its stored types; None if it was not asked."""
    if stored is None:
        return None
    answers = tuple(GreedyAnswer(tuple(row["tokens"]), row["text"]) for row in stored["answers"])
    return StoredTypesAnswers(np.array(stored["logits"], np.float64), answers)
