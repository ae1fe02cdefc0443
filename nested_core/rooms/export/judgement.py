"""Whether an export stands: tokens and template, logits, the gain on held-out rows, answers.

The bounds are those of right exports with room, measured by benchmarks/export_bounds.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from nested_core.gate.proof.fresh_process_check import relative_distance
from nested_core.measure.answers.answer_bounds import ScoreChange, conclude_answers
from nested_core.measure.answers.suite_answers import EncodedSuite, choose_likeliest
from nested_core.measure.fresh_process.starting import Rows
from nested_core.models.generation import Answer, read_answer
from nested_core.records.answers import AnswerRecord
from nested_core.records.loss_conclusion import MAX_RISE_OF_FEW, MIN_MARGIN
from nested_core.records.losses import Vector
from nested_core.records.paired_difference import compare_pairs, independent_clusters
from nested_core.rooms.export.export_record import (
    KeptGain,
    LogitComparison,
    Quantized,
    SuiteCount,
    WeightFormat,
)
from nested_core.rooms.export.fresh_reading import Reading, SuiteReading
from nested_core.rooms.export.reference import HeldOutRows, Reference
from nested_core.text.loss_format import format_difference

# Of the logits' distance, by the format of the matrices; benchmarks/README.md has those of right
# exports. A quantized base that is quantized again moves furthest.
LOGIT_BOUNDS: dict[WeightFormat, float] = {
    "float32": 1e-3,
    "bfloat16": 5e-2,
    "float16": 5e-2,
    "f16": 2e-2,
    "q8_0": 0.3,
    "quantized": 0.75,
}
MIN_CARRIED, MAX_CARRIED = 0.75, 1.25  # of the adapter's change of the logits
MIN_KEPT_GAIN = 0.95
MIN_KEPT_GAIN_QUANTIZED = 0.90  # where the base is quantized again
MAX_LOST_NATS_QUANTIZED = 0.05  # a token, where the base is quantized again and no gain is shown
MAX_SHOWN_TEXTS = 3


@dataclass(frozen=True)
class Findings:
    """What the comparison of an artefact with its reference showed."""

    logits: LogitComparison
    gain: KeptGain | None
    suites: tuple[SuiteCount, ...]
    problems: tuple[str, ...]


def judge_reading(
    reference: Reference,
    reading: Reading,
    *,
    weights: WeightFormat,
    quantized_base: Quantized | None,
    tokenizer: str,
    chat_template: str | None,
) -> Findings:
    """Compare what a fresh process read of an artefact with base and adapter.

    tokenizer, chat_template: what the artefact's have to be, the first as its SHA-256.
    """
    problems = list(_find_wrong_tokens(reference, reading, tokenizer, chat_template))
    logits = compare_logits(reference, reading.logits, LOGIT_BOUNDS[weights])
    problems += _find_wrong_logits(logits)
    gain = None
    if reference.rows is not None:
        needed, margin = MIN_KEPT_GAIN, MIN_MARGIN
        if quantized_base == "kept":
            needed, margin = MIN_KEPT_GAIN_QUANTIZED, MAX_LOST_NATS_QUANTIZED
        gain = measure_kept_gain(reference, reference.rows, reading.likelihoods, needed, margin)
        problems += _find_lost_gain(gain)
    suites = tuple(_count_right_answers(reference, reading))
    problems += [
        f"of {suite.suite} {suite.exported:.4g} of {suite.questions} questions are answered right, "
        f"with the adapter {suite.adapter:.4g}"
        for suite in suites
        if suite.is_worse
    ]
    return Findings(logits, gain, suites, tuple(problems))


def _find_wrong_tokens(
    reference: Reference, reading: Reading, tokenizer: str, chat_template: str | None
) -> Iterator[str]:
    if reading.tokenizer != tokenizer:
        yield "its tokenizer is another one than the adapter's"
    pairs = zip(reference.texts, reference.token_ids, reading.token_ids, strict=True)
    wrong = [text for text, expected, found in pairs if expected != found]
    if wrong:
        shown = ", ".join(repr(text[:20]) for text in wrong[:MAX_SHOWN_TEXTS])
        yield f"{len(wrong)} of {len(reference.texts)} texts get other token ids, such as {shown}"
    if reading.chat_template != chat_template:
        yield "its chat template is another one than the adapter was trained with"
    if missing := set(reference.tokenizer.eos_token_ids) - reading.ends:
        yield f"{len(missing)} tokens that end an answer do not end it there: {sorted(missing)}"


def compare_logits(reference: Reference, found: Rows, bound: float) -> LogitComparison:
    """How near an artefact's logits are to those with the adapter, and how far from the base's.

    What an artefact has of the adapter's change is its own change's part in that direction: the
    rounding of a format has next to none.
    """
    change = (reference.adapter_logits - reference.base_logits).ravel()
    moved = (found - reference.base_logits).ravel()
    size = float(change @ change)
    carried = float(moved @ change) / size if size and np.isfinite(moved).all() else 0.0
    distance = relative_distance(found, reference.adapter_logits)
    return LogitComparison(distance, carried, bound, len(found))


def _find_wrong_logits(logits: LogitComparison) -> Iterator[str]:
    if not logits.distance <= logits.bound:
        yield (
            f"its logits are {logits.distance:.3g} from the adapter's, where a right export is "
            f"within {logits.bound:g}"
        )
    if not MIN_CARRIED <= logits.carried <= MAX_CARRIED:
        yield f"its logits have {logits.carried:.0%} of what the adapter changed in the base's"


def measure_kept_gain(
    reference: Reference,
    rows: HeldOutRows,
    likelihoods: Vector,
    needed: float,
    margin: float = MIN_MARGIN,
) -> KeptGain:
    """How much an artefact lost to the adapter on held-out rows, and how much that may be.

    Args:
        reference: what base and adapter have.
        rows: the rows.
        likelihoods: the artefact's log-likelihoods of their targets.
        needed: the share that has to be kept of a gain beyond chance.
        margin: what may be lost where there is no such gain, in the losses' unit.
    """
    base, adapter, exported = (
        rows.compute_losses(sums, reference.base_likelihoods)
        for sums in (reference.base_likelihoods, reference.adapter_likelihoods, likelihoods)
    )
    counts = rows.counts
    clusters = independent_clusters(rows.clusters)
    kept = KeptGain(
        file=rows.file,
        rows=len(counts),
        base=float(np.average(base, weights=counts)),
        adapter=float(np.average(adapter, weights=counts)),
        exported=float(np.average(exported, weights=counts)),
        needed=needed,
        allowed=margin,
        unit=rows.unit,
    )
    gained = compare_pairs(base, adapter, counts, clusters)
    is_shown = gained.is_below(0) if gained.is_measurable else gained.mean < 0
    if is_shown:
        kept = replace(kept, allowed=(1 - needed) * -gained.mean)
    if not np.isfinite(exported).all():
        return kept
    lost = compare_pairs(adapter, exported, counts, clusters)
    if is_shown:
        kept = replace(kept, share=1 + lost.mean / gained.mean)
    if not lost.is_measurable:  # as the gate's bound of so few examples
        return replace(kept, allowed=max(kept.allowed, margin, MAX_RISE_OF_FEW * kept.adapter))
    return replace(kept, interval=(lost.low, lost.high))


def _find_lost_gain(gain: KeptGain) -> Iterator[str]:
    """That an artefact is worse than its adapter by more than is allowed, beyond chance."""
    if not np.isfinite(gain.exported):
        yield "its losses on held-out rows are not finite"
    elif gain.is_lost:
        lost = format_difference(gain.exported - gain.adapter)
        share = ""
        if gain.share is not None:
            asked = f"{gain.needed:.0%} is asked for"
            share = f": it keeps {gain.share:.0%} of the gain, where {asked}"
        yield (
            f"its loss on {gain.file} is {lost} {gain.unit} from the adapter's "
            f"({gain.describe_interval()}), and {gain.allowed:.2g} may be lost{share}"
        )


def _count_right_answers(reference: Reference, reading: Reading) -> Iterator[SuiteCount]:
    """A count a suite; worse beyond chance among all suites, as the gate decides it."""
    changes = {}
    for suite, read in zip(reference.suites, reading.suites, strict=True):
        before = reference.answers[suite.suite.name]
        after = _score(reference, suite, read, before)
        changes[suite.suite.name] = (ScoreChange.compare(before, after), before, after)
    words = conclude_answers([change for change, _, _ in changes.values()])
    for word, (name, (_, before, after)) in zip(words, changes.items(), strict=True):
        adapter, exported = (sum(record.score for record in own) for own in (before, after))
        yield SuiteCount(name, len(before), adapter, exported, word == "worse")


def _score(
    reference: Reference, suite: EncodedSuite, read: SuiteReading, before: Sequence[AnswerRecord]
) -> list[AnswerRecord]:
    """The answers of an artefact, scored as the gate scores those of an adapter."""
    if read.likelihoods:
        questions = zip(suite.suite.questions, read.likelihoods, strict=True)
        texts = [choose_likeliest(question.choices, sums) for question, sums in questions]
        answers = [Answer(text, 0, is_endless=False, is_repeated=False) for text in texts]
    else:
        sampling = suite.suite.sampling
        answers = [read_answer(reference.tokenizer, own, sampling) for own in read.answers]
    scores = suite.score(answers).scores
    return [
        replace(record, answer=answer.text, score=score)
        for record, answer, score in zip(before, answers, scores, strict=True)
    ]
