"""The gate's check that the preference was learnt: on held-out examples, against the start.

The margin of a pair is the log-likelihood of its chosen answer less that of its rejected one; for
simpo and orpo, which divide by it, a token. Its growth from the initial adapter to the trained one
is what is judged: for dpo from the initial adapter it is the implicit reward's margin. Of answers
with labels it is the mean growth of wanted ones less that of the others.

A margin grows as well where chosen answers become unlikely and rejected ones more so. How far the
chosen ones themselves may fall is bounded.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace

import numpy as np

from nested_core.data.batches import choose_evaluation_batches, make_batch_arrays
from nested_core.data.data_settings import DataSettings
from nested_core.data.held_out_rows import read_held_out_prompts
from nested_core.data.tokens.tokenized_split import Bool, TokenizedSplit
from nested_core.gate.checks.base import WITHOUT_MODEL
from nested_core.gate.checks.judged import Check, CheckedRun
from nested_core.gate.checks.losses import LOSSES
from nested_core.gate.checks.planned_work import GateWork, RunToJudge
from nested_core.kernels.optimized_model import using_optimized_layers
from nested_core.measure.losses.prediction_comparison import PredictionComparison, Vector
from nested_core.models.generation import Sampling, answer_prompts, encode_messages
from nested_core.models.lora_attachment import adapter_compute_dtype, load_adapter_tensors
from nested_core.models.parameters import (
    in_evaluation_mode,
    read_parameters,
    reference_trainable_parameters,
)
from nested_core.records.loss_conclusion import MIN_EXAMPLES
from nested_core.records.losses import ExampleLosses
from nested_core.records.paired_difference import Indices, PairedDifference, compare_pairs
from nested_core.records.verdict import Reason
from nested_core.rooms.preferences.loss_settings import (
    SETTINGS_BY_LOSS,
    find_reference,
    read_settings,
)
from nested_core.rooms.preferences.reference_likelihoods import (
    digest_tokens,
    find_likelihoods_file,
    leave_adapter_out,
    read_likelihoods,
)
from nested_core.rooms.preferences.training_loss import (
    AnswerFigures,
    PreferenceLoss,
    measure_answers,
)
from nested_core.text.stages import stages
from nested_core.training.loss.loss_interface import MicroBatch

BLOCK = "preferences"
NOT_LEARNT = "preference_not_learnt"
MAX_ASKED_PROMPTS = 8
MAX_REFERENCE_ERROR = 0.02  # nats/token: bfloat16 in batches of other shapes differs by less


@dataclass(frozen=True)
class PreferenceVerdict:
    """The block `preferences` of gate.json. Log-likelihoods are means, in nats an answer.

    examples: held-out examples that were counted; clusters: how many of them are independent.
    accuracy_before, accuracy_after: the share of pairs whose chosen answer is the likelier one; of
        answers with labels the chance that a wanted one became likelier by more than another one.
    margin_before, margin_after: mean margins; None for labels. margin_growth with its 95 %
        interval, None for fewer than 5 clusters.
    conclusion: better, worse or inconclusive.
    chosen_change: how much likelier chosen answers became, in nats/token, with its 95 % interval,
        None for fewer than 5 clusters; chosen_fell: whether the interval is below 0.
    kl_initial: mean KL(initial || trained) in nats/token of the answers.
    answer_tokens_before, answer_tokens_after: of answers to held-out prompts, on average;
        answer_tokens_expected: of the data's own answers to them.
    reference_error: the mean difference of a kept likelihood of the reference from what the gate
        computed anew, in nats/token; None for a loss without a reference.
    """

    loss: str
    reference: str | None
    examples: int
    clusters: int
    accuracy_before: float
    accuracy_after: float
    accuracy_difference: float
    accuracy_interval: tuple[float, float] | None
    margin_before: float | None
    margin_after: float | None
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
    answer_tokens_before: float | None
    answer_tokens_after: float | None
    answer_tokens_expected: float | None
    asked: int
    reference_error: float | None


@dataclass(frozen=True, eq=False)
class _HeldOutFigures:
    """AnswerFigures of all held-out examples, of the initial and the trained adapter.

    likelihoods: (2, 2, n); reference: of the reference (2, n), None without one.
    tokens: (2, n); divergences, is_wanted: (n,).
    reference_error: as in PreferenceVerdict.
    """

    likelihoods: Vector
    tokens: Vector
    divergences: Vector
    is_wanted: Bool
    reference_error: float | None

    def select(self, rows: Indices) -> _HeldOutFigures:
        """These examples alone."""
        return replace(
            self,
            likelihoods=self.likelihoods[..., rows],
            tokens=self.tokens[:, rows],
            divergences=self.divergences[rows],
            is_wanted=self.is_wanted[rows],
        )


def _judge_preference(judged: CheckedRun) -> Iterator[Reason]:
    """Measure the margins, and give a reason where they did not grow beyond chance."""
    if judged.config.training.loss not in SETTINGS_BY_LOSS:
        return
    held_out, losses = judged.held_out, judged.losses
    if held_out is None or losses is None or not len(losses.counted()):
        return
    stages.info("gate: likelihoods of chosen and rejected answers, before and after")
    loss = PreferenceLoss(str(judged.config.training.loss), read_settings(judged.config))
    rows = np.flatnonzero(held_out.is_example_supervised)
    figures = _measure(judged, held_out.split, loss).select(rows)
    counted = losses.counted()
    if losses.left_out is not None:
        figures = figures.select(np.flatnonzero(~losses.left_out))
    verdict = _summarise(loss, figures, counted, find_reference(judged.config))
    asked = _ask(judged)
    if asked:
        expected, before, after = (float(np.mean(own)) for own in zip(*asked, strict=True))
        verdict = replace(
            verdict,
            answer_tokens_before=before,
            answer_tokens_after=after,
            answer_tokens_expected=expected,
            asked=len(asked),
        )
    blocks = judged.verdict.blocks | {BLOCK: asdict(verdict)}
    judged.verdict = replace(judged.verdict, blocks=blocks)
    yield from _find_reasons(verdict)
    yield from find_fall(verdict, judged.bounds.max_chosen_fall)


def _measure(judged: CheckedRun, split: TokenizedSplit, loss: PreferenceLoss) -> _HeldOutFigures:
    """Both adapters on all held-out examples, and the reference beside what was kept of it."""
    base, config, run = judged.base, judged.config, judged.run
    refs = reference_trainable_parameters(
        base.model, dtype=adapter_compute_dtype(config, base.model)
    )
    values = []
    for adapter in (judged.evidence.before, judged.evidence.after):
        load_adapter_tensors(base.model, adapter.to_mlx())
        values.append(read_parameters(refs))
    reference = find_reference(config)
    of_reference = leave_adapter_out(values[0]) if reference == "base" else values[0]
    kept = None if reference is None else read_likelihoods(find_likelihoods_file(run))
    comparison = PredictionComparison.of_model(base.model, refs)
    count = len(split)
    errors: list[float] = []
    found = _HeldOutFigures(
        np.zeros((2, 2, count)),
        np.zeros((2, count)),
        np.zeros(count),
        np.ones(count, np.bool_),
        None,
    )
    batches = choose_evaluation_batches(
        split, config.batch_size, -1, max_seq_length=config.max_seq_length
    )
    with using_optimized_layers(base.model):
        for batch in batches:
            arrays = make_batch_arrays(split, batch, config.batch_size)
            own = measure_answers(loss, comparison, [of_reference, *values], arrays)
            size = len(batch.rows)
            found.likelihoods[..., batch.rows] = own.likelihoods[1:, :, :size]
            found.tokens[:, batch.rows] = own.tokens[:, :size]
            found.divergences[batch.rows] = own.divergences[1, :size]
            found.is_wanted[batch.rows] = own.is_wanted[:size]
            if kept is not None:
                errors += _compare_with_kept(loss, own, arrays, kept.by_conversation)
    return replace(found, reference_error=float(np.mean(errors)) if errors else None)


def _compare_with_kept(
    loss: PreferenceLoss, figures: AnswerFigures, batch: MicroBatch, kept: Mapping[str, float]
) -> Iterator[float]:
    """How far each kept likelihood of the reference is from the one computed now, nats/token."""
    for row, example in enumerate(loss.read_rows(batch)):
        if example is None:
            continue
        for side, conversation in enumerate(example.conversations):
            before = kept.get(digest_tokens(conversation.tokens))
            if before is not None:
                now = float(figures.likelihoods[0, side, row])
                yield abs(before - now) / (len(conversation.tokens) - conversation.prompt)


def _summarise(
    loss: PreferenceLoss, figures: _HeldOutFigures, counted: ExampleLosses, reference: str | None
) -> PreferenceVerdict:
    """The figures of pairs, or of answers with labels."""
    clusters = counted.drawn_clusters
    first, second = figures.likelihoods[:, 0], figures.likelihoods[:, 1]
    if loss.has_labels:
        growth, accuracy = _compare_labels(first, figures.is_wanted, counted)
        chosen, rejected = (
            first[:, figures.is_wanted].mean(axis=1),
            first[:, ~figures.is_wanted].mean(axis=1),
        )
        accuracy_before, accuracy_after = 0.5, accuracy
        accuracy_difference, accuracy_interval = accuracy - 0.5, None
        margins: tuple[float | None, float | None] = (None, None)
    else:
        scores = figures.likelihoods
        if loss.name in ("simpo", "orpo"):
            scores = scores / figures.tokens
        margin = scores[:, 0] - scores[:, 1]
        growth = compare_pairs(margin[0], margin[1], None, clusters)
        right = (margin > 0).astype(np.float64)
        change = compare_pairs(right[0], right[1], None, clusters)
        chosen, rejected = first.mean(axis=1), second.mean(axis=1)
        accuracy_before, accuracy_after = map(float, right.mean(axis=1))
        accuracy_difference = change.mean
        accuracy_interval = (change.low, change.high) if change.is_measurable else None
        margins = (float(margin[0].mean()), float(margin[1].mean()))
    interval = (growth.low, growth.high) if growth.is_measurable else None
    change = _compare_chosen(figures, clusters)
    return PreferenceVerdict(
        loss=loss.name,
        reference=reference,
        examples=len(counted),
        clusters=counted.independent_examples,
        accuracy_before=accuracy_before,
        accuracy_after=accuracy_after,
        accuracy_difference=accuracy_difference,
        accuracy_interval=accuracy_interval,
        margin_before=margins[0],
        margin_after=margins[1],
        margin_growth=growth.mean,
        margin_interval=interval,
        conclusion=_conclude(growth),
        chosen_before=float(chosen[0]),
        chosen_after=float(chosen[1]),
        rejected_before=float(rejected[0]),
        rejected_after=float(rejected[1]),
        chosen_change=change.mean,
        chosen_change_interval=(change.low, change.high) if change.is_measurable else None,
        chosen_fell=change.is_below(0),
        kl_initial=float(figures.divergences.mean()),
        answer_tokens_before=None,
        answer_tokens_after=None,
        answer_tokens_expected=None,
        asked=0,
        reference_error=figures.reference_error,
    )


def _compare_labels(
    likelihoods: Vector, is_wanted: Bool, counted: ExampleLosses
) -> tuple[PairedDifference, float]:
    """The growth of wanted answers less that of the others, and the chance that it is above 0.

    Each kind weighs the same, so that a rise of all answers is no growth. The second value is the
    chance that a wanted answer drawn at random grew by more than another one (Mann and Whitney).
    """
    growth = likelihoods[1] - likelihoods[0]
    sign = np.where(is_wanted, 1.0, -1.0)
    weights = np.where(is_wanted, 1 / max(is_wanted.sum(), 1), 1 / max((~is_wanted).sum(), 1))
    paired = compare_pairs(
        np.zeros(len(growth)), 2 * sign * growth, weights, counted.drawn_clusters
    )
    wanted, others = growth[is_wanted], growth[~is_wanted]
    if not len(wanted) or not len(others):
        return paired, 0.5
    above = (wanted[:, None] > others[None]).mean()
    equal = (wanted[:, None] == others[None]).mean()
    return paired, float(above + equal / 2)


def _compare_chosen(figures: _HeldOutFigures, clusters: Indices | None) -> PairedDifference:
    """How much likelier chosen answers became, in nats/token of all of them."""
    rows = np.flatnonzero(figures.is_wanted)
    chosen = figures.select(rows)
    tokens = chosen.tokens[0]
    before, after = chosen.likelihoods[:, 0] / tokens
    return compare_pairs(before, after, tokens, None if clusters is None else clusters[rows])


def _conclude(growth: PairedDifference) -> str:
    """better where the interval of the growth is above 0, worse where it is below."""
    if not growth.is_measurable:
        return "worse" if growth.mean <= 0 else "inconclusive"
    if growth.low > 0:
        return "better"
    return "worse" if growth.high < 0 else "inconclusive"


def _ask(judged: CheckedRun) -> list[tuple[int, int, int]]:
    """The tokens of the data's answer to a prompt, and of the initial and the trained adapter's."""
    config, base = judged.config, judged.base
    settings = DataSettings.from_config(config)
    prompts = read_held_out_prompts(settings, MAX_ASKED_PROMPTS, config.gate.held_out)
    encoded = [encode_messages(base.tokenizer, prompt.messages) for prompt in prompts]
    if not encoded:
        return []
    sampling = Sampling(config.training.sample_tokens)
    expected = [
        len(base.tokenizer.encode(prompt.expected, add_special_tokens=False)) for prompt in prompts
    ]
    lengths = [expected]
    for adapter in (judged.evidence.before, judged.evidence.after):
        load_adapter_tensors(base.model, adapter.to_mlx())
        with in_evaluation_mode(base.model):
            answers = answer_prompts(base.model, base.tokenizer, encoded, sampling)
        lengths.append([answer.tokens for answer in answers])
    return list(zip(*lengths, strict=True))


def _plan_work(run: RunToJudge) -> GateWork:
    """The reference and both adapters on all held-out pairs, and the answers to a few prompts."""
    if run.config.training.loss not in SETTINGS_BY_LOSS:
        return GateWork()
    tokens = 2 * run.config.training.sample_tokens
    return GateWork(rows=3 * run.held_out_rows, tokens=tokens, answers=MAX_ASKED_PROMPTS)


def _find_reasons(verdict: PreferenceVerdict) -> Iterator[Reason]:
    if verdict.reference_error is not None and verdict.reference_error > MAX_REFERENCE_ERROR:
        yield Reason(
            NOT_LEARNT,
            f"the reference that training compared with was not the {verdict.reference} adapter: "
            f"its kept log-likelihoods differ by {verdict.reference_error:.3g} nats/token from "
            f"those that the gate computed of it anew. Remove rooms/preferences in the run "
            f"directory and train again",
        )
        return
    if verdict.conclusion == "better":
        return
    if verdict.margin_interval is None and verdict.conclusion == "inconclusive":
        return  # fewer than MIN_EXAMPLES independent examples, of which the mean grew
    shown = (
        ""
        if verdict.margin_interval is None
        else " (95 % interval {:+.3g} to {:+.3g})".format(*verdict.margin_interval)
    )
    yield Reason(
        NOT_LEARNT,
        f"on {verdict.examples} held-out examples the margin of chosen over rejected answers "
        f"changed by {verdict.margin_growth:+.3g} nats{shown}, which is not above 0. Look whether "
        f"chosen and rejected are the right way round, train longer, or give more examples than "
        f"{MIN_EXAMPLES} to judge by",
    )


def find_fall(verdict: PreferenceVerdict, bound: float | None) -> Iterator[Reason]:
    """Yield a reason if chosen answers fell further than `gate.max_chosen_fall`, beyond chance."""
    interval = verdict.chosen_change_interval
    if bound is None or (verdict.chosen_change if interval is None else interval[1]) >= -bound:
        return
    shown = "" if interval is None else " (95 % interval {:.3g} to {:.3g})".format(*interval)
    lengths = ""
    if verdict.asked:
        lengths = (
            f" Answers to {verdict.asked} held-out prompts had {verdict.answer_tokens_before:.3g} "
            f"tokens on average before, and now have {verdict.answer_tokens_after:.3g}."
        )
    yield Reason(
        NOT_LEARNT,
        f"chosen answers became less likely themselves, by {-verdict.chosen_change:.3g} "
        f"nats/token{shown}; gate.max_chosen_fall is {bound:g}. The adapter has learnt to avoid "
        f"answers, and not to give the chosen ones.{lengths} Train with a lower rate, fewer "
        f"passes or a larger beta",
    )


CHECKS = (
    Check(
        "preference",
        _judge_preference,
        stopped_by=(*WITHOUT_MODEL, LOSSES),
        bounds=("max_chosen_fall",),
        plan_work=_plan_work,
    ),
)
