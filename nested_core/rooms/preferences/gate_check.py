"""The gate's check that the preference was learnt: on held-out examples, against the start.

The margin of a pair is the log-likelihood of its chosen answer less that of its rejected one; for
simpo and orpo, which divide by it, a token. Its growth from the initial adapter to the trained one
is what is judged: for dpo from the initial adapter it is the implicit reward's margin.

A margin grows as well where chosen answers become unlikely and rejected ones more so. How far the
chosen ones themselves may fall is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from nested_core.data.tokens.tokenized_split import draw_rows
from nested_core.gate.checks.judged import Check, CheckedRun, GateChecks, GateWork, RunToJudge
from nested_core.gate.checks.losses import LOSSES, WITHOUT_MODEL
from nested_core.measure.losses.held_out_loss import read_nonempty_splits
from nested_core.measure.losses.prediction_comparison import (
    ExamplePredictions,
    PredictionComparison,
)
from nested_core.models.lora_attachment import adapter_compute_dtype, load_adapter_tensors
from nested_core.models.parameters import read_parameters, reference_trainable_parameters
from nested_core.records.loss_conclusion import MIN_EXAMPLES
from nested_core.records.losses import ExampleLosses
from nested_core.records.paired_difference import Indices, PairedDifference, compare_pairs
from nested_core.records.verdict import Reason
from nested_core.rooms.preferences.loss_settings import SETTINGS_BY_LOSS, find_reference
from nested_core.rooms.preferences.reference_likelihoods import (
    compare_answers,
    find_likelihoods_file,
    leave_adapter_out,
    read_likelihoods,
)
from nested_core.rooms.preferences.training_loss import read_pairs_of_split
from nested_core.text.loss_format import format_difference

BLOCK = "preferences"
NOT_LEARNT = "preference_not_learnt"
MAX_REFERENCE_PAIRS = 32  # of those that were trained on
MAX_REFERENCE_ERROR = 0.02  # nats/token: bfloat16 in batches of other shapes differs by less


@dataclass(frozen=True)
class PreferenceVerdict:
    """The block `preferences` of gate.json. Log-likelihoods are means, in nats an answer.

    examples: held-out examples that were counted; clusters: how many of them are independent.
    accuracy_before, accuracy_after: the share of pairs whose chosen answer is the likelier one.
    margin_before, margin_after: mean margins. margin_growth with its 95 % interval, None for fewer
        than 5 clusters.
    conclusion: better, worse or inconclusive.
    chosen_change: how much likelier chosen answers became, in nats/token, with its 95 % interval,
        None for fewer than 5 clusters; chosen_fell: whether the interval is below 0.
    kl_initial: mean KL(initial || trained) in nats/token of the answers.
    reference: what training compared with; None for a loss without a reference.
    reference_error: the mean difference, in nats/token, between the reference's likelihoods of
        answers that training used and those that the gate computed anew; None for a loss without a
        reference, and where the run does not keep them, which is a reason.
    """

    loss: str
    examples: int
    clusters: int
    accuracy_before: float
    accuracy_after: float
    accuracy_difference: float
    accuracy_interval: tuple[float, float] | None
    margin_before: float
    margin_after: float
    margin_growth: float
    margin_interval: tuple[float, float] | None
    conclusion: str
    chosen_before: float
    chosen_after: float
    rejected_before: float
    rejected_after: float
    chosen_change: float
    chosen_change_interval: tuple[float, float] | None
    chosen_fell: bool
    kl_initial: float
    reference: str | None = None
    reference_error: float | None = None


def _judge_preference(judged: CheckedRun) -> Iterator[Reason]:
    """Yield reasons against an adapter that did not learn the preference; fill the verdict's block.

    Learnt means that the margin of chosen over rejected held-out answers grew beyond chance. Does
    nothing for another loss.
    """
    loss = judged.config.training.loss
    if loss not in SETTINGS_BY_LOSS:
        return
    block: dict[str, Any] = {"loss": loss, "examples": 0}
    held_out, losses = judged.held_out, judged.losses
    if held_out is not None and losses is not None and len(losses.counted()):
        rows = np.flatnonzero(held_out.is_example_supervised)
        if losses.left_out is not None:
            rows = rows[~losses.left_out]
        verdict = _summarise(str(loss), judged.predictions, rows, losses.counted())
        if (reference := find_reference(judged.config)) is not None:
            error = _compare_reference(judged, reference)
            verdict = replace(verdict, reference=reference, reference_error=error)
        block = asdict(verdict)
        yield from _find_reasons(verdict)
        yield from find_fall(verdict, judged.bounds.max_chosen_fall)
    judged.verdict = replace(judged.verdict, blocks=judged.verdict.blocks | {BLOCK: block})


def _compare_reference(judged: CheckedRun, reference: str) -> float | None:
    """Return the mean difference of the reference's likelihoods to newly computed ones, nats/token.

    The run keeps those that training used. They are compared for some pairs of train. None if the
    run does not keep a likelihood for each of these.
    """
    kept = read_likelihoods(find_likelihoods_file(judged.run))
    split = read_nonempty_splits(judged.config, judged.run)["train"]
    rows = draw_rows(len(split), MAX_REFERENCE_PAIRS)
    answers = [one for pair in read_pairs_of_split(split, rows) for one in pair]
    if kept is None or not kept.has(answers):
        return None
    model = judged.base.model
    refs = reference_trainable_parameters(model, dtype=adapter_compute_dtype(judged.config, model))
    load_adapter_tensors(model, judged.evidence.before.to_mlx())
    values = read_parameters(refs)
    values = leave_adapter_out(values) if reference == "base" else values
    comparison = PredictionComparison.of_model(model, refs)
    now = compare_answers(comparison, [values], answers, 2 * judged.config.batch_size)
    return float(np.mean(np.abs(kept.of(answers) + now.losses[0]) / now.tokens))


def _summarise(
    loss: str, predictions: ExamplePredictions, rows: Indices, counted: ExampleLosses
) -> PreferenceVerdict:
    """Return the verdict on held-out pairs, without the figures of the reference.

    Args:
        loss: the value of `training.loss`.
        predictions: of the held-out split; the last two are of the initial and the trained adapter.
        rows: the indices of the counted examples in the split, int64 (n,).
        counted: the losses of the counted examples.
    """
    clusters = counted.drawn_clusters
    chosen, rejected = -np.array(predictions.answer_losses)[-2:, :, rows].swapaxes(0, 1)
    tokens, rejected_tokens = np.array(predictions.answer_tokens)[:, rows]
    margin = chosen - rejected
    if loss in ("simpo", "orpo"):
        margin = chosen / tokens - rejected / rejected_tokens
    growth = compare_pairs(margin[0], margin[1], None, clusters)
    right = (margin > 0).astype(np.float64)
    accuracy = compare_pairs(right[0], right[1], None, clusters)
    before, after = chosen / tokens
    change = compare_pairs(before, after, tokens, clusters)
    return PreferenceVerdict(
        loss=loss,
        examples=len(counted),
        clusters=counted.independent_examples,
        accuracy_before=float(right[0].mean()),
        accuracy_after=float(right[1].mean()),
        accuracy_difference=accuracy.mean,
        accuracy_interval=_interval(accuracy),
        margin_before=float(margin[0].mean()),
        margin_after=float(margin[1].mean()),
        margin_growth=growth.mean,
        margin_interval=_interval(growth),
        conclusion=_conclude(growth),
        chosen_before=float(chosen[0].mean()),
        chosen_after=float(chosen[1].mean()),
        rejected_before=float(rejected[0].mean()),
        rejected_after=float(rejected[1].mean()),
        chosen_change=change.mean,
        chosen_change_interval=_interval(change),
        chosen_fell=change.is_below(0),
        kl_initial=float(predictions.divergences[-1, rows].mean()),
    )


def _interval(difference: PairedDifference) -> tuple[float, float] | None:
    return (difference.low, difference.high) if difference.is_measurable else None


def _conclude(growth: PairedDifference) -> str:
    """Return better if the interval of the growth is above 0, worse if it is below."""
    if not growth.is_measurable:
        return "worse" if growth.mean <= 0 else "inconclusive"
    if growth.low > 0:
        return "better"
    return "worse" if growth.high < 0 else "inconclusive"


def _find_reasons(verdict: PreferenceVerdict) -> Iterator[Reason]:
    """Yield a reason if the reference was another one, or else if the margin did not grow."""
    error = verdict.reference_error
    if verdict.reference is not None and (error is None or error > MAX_REFERENCE_ERROR):
        problem = (
            "cannot be told, for the run does not keep the log-likelihoods of what it trained on"
            if error is None
            else f"was not the {verdict.reference} adapter: its kept log-likelihoods differ by "
            f"{error:.3g} nats/token from those that the gate computed of it anew"
        )
        yield Reason(
            NOT_LEARNT,
            f"the reference that training compared with {problem}. Remove rooms/preferences in the "
            f"run directory and train again",
        )
        return
    has_grown = verdict.margin_interval is None and verdict.conclusion == "inconclusive"
    if verdict.conclusion == "better" or has_grown:  # with fewer than MIN_EXAMPLES the mean decides
        return
    change = format_difference(verdict.margin_growth, verdict.margin_interval)
    yield Reason(
        NOT_LEARNT,
        f"on {verdict.examples} held-out examples the margin of chosen over rejected answers "
        f"changed by {change} nats, which is not above 0. Look whether "
        f"chosen and rejected are the right way round, train longer, or give more examples than "
        f"{MIN_EXAMPLES} to judge by",
    )


def find_fall(verdict: PreferenceVerdict, bound: float | None) -> Iterator[Reason]:
    """Yield a reason if chosen answers fell further than `gate.max_chosen_fall`, beyond chance."""
    interval = verdict.chosen_change_interval
    if bound is None or (verdict.chosen_change if interval is None else interval[1]) >= -bound:
        return
    change = format_difference(verdict.chosen_change, interval)
    yield Reason(
        NOT_LEARNT,
        f"chosen answers became less likely themselves, {change} nats/token; gate.max_chosen_fall "
        f"is {bound:g}. The adapter has learnt to avoid answers, and not to give the chosen ones. "
        f"Train with a lower rate, fewer passes or a larger beta",
    )


def _plan_work(run: RunToJudge) -> GateWork:
    """Return the reference on some pairs that were trained on."""
    if run.config.training.loss not in SETTINGS_BY_LOSS:
        return GateWork()
    has_reference = find_reference(run.config) is not None
    return GateWork(rows=has_reference * MAX_REFERENCE_PAIRS)


PREFERENCE = Check(
    "preference",
    _judge_preference,
    stopped_by=(*WITHOUT_MODEL, LOSSES),
    bounds=("max_chosen_fall",),
    plan_work=_plan_work,
)
CHECKS = GateChecks((PREFERENCE,))
