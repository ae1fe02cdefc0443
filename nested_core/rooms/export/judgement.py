"""Whether an export stands: tokens and template, logits, the gain on held-out rows, answers.

The bounds are those of right exports with room, measured by benchmarks/export_bounds.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from nested_core.gate.checks.tasks import score_answers
from nested_core.gate.proof.fresh_process_check import relative_distance
from nested_core.measure.answers.answer_bounds import ScoreChange, conclude_answers
from nested_core.measure.answers.suite_answers import EncodedSuite
from nested_core.measure.fresh_process.starting import Rows
from nested_core.models.generation import Answer
from nested_core.records.loss_conclusion import MAX_RISE_OF_FEW, MIN_MARGIN
from nested_core.records.losses import Vector
from nested_core.records.paired_difference import compare_pairs, independent_clusters
from nested_core.rooms.export.asked import Asked, HeldOutRows, Reading
from nested_core.rooms.export.export_record import KeptGain, LogitChange, SuiteCount, WeightFormat
from nested_core.text.loss_format import format_difference, format_loss

Answers = Mapping[str, Sequence[Answer]]
# Of the logits' distance, by the format of the matrices; benchmarks/README.md has those of right
# exports. A quantized base that is quantized again moves furthest; few bits have its bound.
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
    """What the comparison of an artefact with its reference showed.

    notes: what a format of few bits cost the base alone.
    """

    logits: LogitChange
    gain: KeptGain | None
    suites: tuple[SuiteCount, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]


def judge_reading(
    asked: Asked,
    readings: tuple[Reading, Reading, Reading],
    *,
    weights: WeightFormat,
    tokenizer: str,
    stored_base: Reading | None = None,
) -> Findings:
    """Compare an exported model with base and adapter, by the answers of all three.

    Returns the figures, and a sentence for each problem; without problems the export is kept.

    readings: the answers of base, adapter and exported model, in this order.
    tokenizer: the SHA-256 that the exported tokenizer must have.
    stored_base: what was read of the base alone in a format of few bits.
    """
    base, adapter, reading = readings
    problems = list(_find_wrong_tokens(asked, adapter, reading, tokenizer))
    before = (stored_base or base).logits
    bound = LOGIT_BOUNDS["quantized" if stored_base else weights]
    logits = compare_logits(base.logits, adapter.logits, before, reading.logits, bound)
    problems += _find_wrong_logits(logits)
    gain = None
    if asked.rows is not None:
        needed, margin = MIN_KEPT_GAIN, MIN_MARGIN
        if weights == "quantized" or stored_base is not None:
            needed, margin = MIN_KEPT_GAIN_QUANTIZED, MAX_LOST_NATS_QUANTIZED
        gain = measure_kept_gain(asked.rows, [one.likelihoods for one in readings], needed, margin)
        problems += _find_lost_gain(gain)
    suites = tuple(count_right_answers(asked.suites, adapter.answers, reading.answers))
    problems += list_worse_suites(suites)
    notes = () if stored_base is None else (_describe_bits(asked, base, stored_base, weights),)
    return Findings(logits, gain, suites, tuple(problems), notes)


def _describe_bits(asked: Asked, base: Reading, stored: Reading, weights: WeightFormat) -> str:
    """Say what a format does to the base alone."""
    told = f"logits {relative_distance(stored.logits, base.logits):.2g} from its own"
    if asked.rows is not None:
        losses = (
            asked.rows.compute_losses(read.likelihoods, base.likelihoods) for read in (base, stored)
        )
        means = [np.average(each, weights=asked.rows.counts) for each in losses]
        told += f", loss {format_loss(means[1])} (as it is {format_loss(means[0])})"
    return f"the base alone as {weights}, for what the bits cost: {told}"


def _find_wrong_tokens(
    asked: Asked, adapter: Reading, reading: Reading, tokenizer: str
) -> Iterator[str]:
    """Yield a sentence for each way in which the exported tokenizer differs from the adapter's."""
    if reading.tokenizer != tokenizer:
        yield "its tokenizer is another one than the adapter's"
    pairs = zip(asked.texts, adapter.token_ids, reading.token_ids, strict=True)
    if wrong := [text for text, expected, found in pairs if expected != found]:
        shown = ", ".join(repr(text[:20]) for text in wrong[:MAX_SHOWN_TEXTS])
        yield f"{len(wrong)} of {len(asked.texts)} texts get other token ids, such as {shown}"
    if reading.chat_template != adapter.chat_template:
        yield "its chat template is another one than the adapter was trained with"
    if missing := adapter.ends - reading.ends:
        yield f"{len(missing)} tokens that end an answer do not end it there: {sorted(missing)}"


def compare_logits(
    base: Rows, adapter: Rows, stored_base: Rows, exported: Rows, bound: float
) -> LogitChange:
    """Compare an artefact's logits with those of the adapter, and with its change of the base's.

    What an artefact has of the adapter's change is its own change's part in that direction: the
    rounding of a format has next to none.

    stored_base: the base's in the artefact's format, if that has few bits; else the base's.
    """
    change, moved = (adapter - base).ravel(), (exported - stored_base).ravel()
    size = float(change @ change)
    carried = float(moved @ change) / size if size and np.isfinite(moved).all() else 0.0
    return LogitChange(relative_distance(exported, adapter), carried, bound, len(exported))


def _find_wrong_logits(logits: LogitChange) -> Iterator[str]:
    if not logits.distance <= logits.bound:
        yield (
            f"its logits are {logits.distance:.3g} from the adapter's, where a right export is "
            f"within {logits.bound:g}"
        )
    if not MIN_CARRIED <= logits.carried <= MAX_CARRIED:
        yield f"its logits have {logits.carried:.0%} of what the adapter changed in the base's"


def measure_kept_gain(
    rows: HeldOutRows, likelihoods: Sequence[Vector], needed: float, margin: float = MIN_MARGIN
) -> KeptGain:
    """Measure how much of the adapter's gain over the base an export keeps on held-out rows.

    Args:
        rows: the held-out rows.
        likelihoods: log-likelihoods of the rows' targets, of base, adapter and export.
        needed: the share of the gain that must be kept, if the gain is beyond chance.
        margin: the loss that is allowed without such a gain, in the losses' unit.
    """
    base, adapter, exported = (rows.compute_losses(one, likelihoods[0]) for one in likelihoods)
    counts, clusters = rows.counts, independent_clusters(rows.clusters)
    losses = {"base": base, "adapter": adapter, "exported": exported}
    means = {name: float(np.average(each, weights=counts)) for name, each in losses.items()}
    gained = compare_pairs(base, adapter, counts, clusters)
    is_shown = gained.is_below(0) if gained.is_measurable else gained.mean < 0
    allowed = (1 - needed) * -gained.mean if is_shown else margin
    share = interval = None
    if np.isfinite(exported).all():
        lost = compare_pairs(adapter, exported, counts, clusters)
        share = 1 + lost.mean / gained.mean if is_shown else None
        if lost.is_measurable:
            interval = (lost.low, lost.high)
        else:  # as the gate's bound of so few examples
            allowed = max(allowed, margin, MAX_RISE_OF_FEW * means["adapter"])
    return KeptGain(
        file=rows.file,
        rows=len(counts),
        needed=needed,
        allowed=allowed,
        share=share,
        interval=interval,
        unit=rows.unit,
        **means,
    )


def _find_lost_gain(gain: KeptGain) -> Iterator[str]:
    """Yield a sentence if the export's loss is worse than allowed, beyond chance, or not finite."""
    if not np.isfinite(gain.exported):
        yield "its losses on held-out rows are not finite"
    elif gain.is_lost:
        lost = format_difference(gain.exported - gain.adapter)
        share = ""
        if gain.share is not None:
            share = f": it keeps {gain.share:.0%} of the gain, where {gain.needed:.0%} is asked for"
        yield (
            f"its loss on {gain.file} is {lost} {gain.unit} from the adapter's "
            f"({gain.describe_interval()}), and {gain.allowed:.2g} may be lost{share}"
        )


def list_worse_suites(suites: Sequence[SuiteCount], where: str = "") -> list[str]:
    """Return a sentence for each suite that is answered worse; `where` begins it."""
    return [
        f"{where}of {suite.suite} {suite.exported:.4g} of {suite.questions} questions are answered "
        f"right, with the adapter {suite.adapter:.4g}"
        for suite in suites
        if suite.is_worse
    ]


def count_right_answers(
    suites: Sequence[EncodedSuite], adapter: Answers, exported: Answers
) -> Iterator[SuiteCount]:
    """Yield, for each suite, how many questions adapter and export answer right.

    Whether the export is worse is decided as in the gate: beyond chance among all suites.

    adapter, exported: the answers of each, by suite.
    """
    scored = [
        [score_answers(suite, "candidate", answers[suite.suite.name], 0.0) for suite in suites]
        for answers in (adapter, exported)
    ]
    words = conclude_answers([ScoreChange.compare(*pair) for pair in zip(*scored, strict=True)])
    for word, suite, *pair in zip(words, suites, *scored, strict=True):
        before, after = (sum(record.score for record in records) for records in pair)
        yield SuiteCount(suite.suite.name, len(suite.prompts), before, after, word == "worse")
