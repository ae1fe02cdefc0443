"""The figures of a verdict that are computed from each example's losses, and the reasons they give.

`conclude` in `records.loss_conclusion` decides whether a loss is worse.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from nested_core.config.sections import GateSection
from nested_core.measure.losses.chosen_candidate import Candidates
from nested_core.records.loss_conclusion import (
    MIN_CHANGE,
    TOO_FEW_TO_TELL,
    conclude,
    count_examples_needed,
    margin_of_loss,
)
from nested_core.records.losses import ExampleLosses, Vector
from nested_core.records.paired_difference import CONFIDENCE, PairedDifference, student_t_quantile
from nested_core.records.verdict import (
    MIN_HARMED,
    ChampionLoss,
    ComparedLoss,
    Drift,
    GeneralLoss,
    Reason,
    Validation,
    describe_examples,
)
from nested_core.storage.atomic import finite_or_none
from nested_core.text.loss_format import (
    NATS_PER_TOKEN,
    format_change,
    format_difference,
    format_interval,
)

# An example is harmed or helped if its loss changed by at least MIN_CHANGE and MIN_SPREADS.
MIN_SPREADS = 6 * 1.48  # median absolute deviations: 6 standard deviations of a normal distribution
MIN_LOSS_OF_FEWEST = 4.0  # nats/token: the mean rise that three harmed examples need to count
ENOUGH_FOR_OWN_SPREAD = 20  # with fewer examples, a comparison uses the pooled spread
MAX_CHANCE = 0.05  # of this many harmed examples if the true share were at its bound
MAX_CHANCE_OF_EXCHANGE = 0.01  # of this many more harmed than helped if both were equally likely


def summarise_losses(
    losses: ExampleLosses,
    bounds: GateSection,
    *,
    selected_on_same_data: bool,
    has_one_answer: bool = False,
    candidates: Candidates | None = None,
    are_rows_known: bool = True,
) -> Validation:
    """Return the verdict's figures of the held-out losses, without the left-out examples.

    They compare the trained adapter with the initial one. Left out are examples that an adapter was
    trained on.

    selected_on_same_data: whether these examples also selected the training step.
    has_one_answer: whether all examples have the same answer.
    candidates: the steps among which these examples selected the adapter; None for no selection.
    are_rows_known: whether all rows are known that either adapter was trained on.
    """
    counted = losses.counted()  # without those left out
    figures = compare_losses(
        counted, counted.before, bounds, bounds.max_val_loss_increase, candidates=candidates
    )
    harm = HarmedExamples.find(counted, figures.get("margin", 0.0))
    return Validation(
        loss_before=finite_or_none(counted.mean(counted.before)),
        loss_after=finite_or_none(counted.mean(counted.after)),
        selected_on_same_data=selected_on_same_data,
        file=losses.file,
        examples=len(counted),
        left_out=len(losses) - len(counted) if are_rows_known else None,
        losses_sha256=losses.sha256(),
        has_one_answer=has_one_answer,
        chosen_among=1 if candidates is None else candidates.count,
        few_prompts=counted.few_prompts(),
        harmed=None if harm is None else harm.harmed,
        helped=None if harm is None else harm.helped,
        **({"unit": losses.unit} | figures),
    )


def summarise_drift(losses: ExampleLosses) -> Drift | None:
    """Return the mean divergences from initial adapter and base; None if they were not measured."""
    counted = losses.counted()
    if len(counted):  # otherwise the left-out examples, though trained on, are all there is
        losses = counted
    drift = losses.drift
    if drift is None:
        return None
    base = losses.base_drift
    return Drift(
        kl_initial=finite_or_none(losses.mean(drift)),
        kl_base=None if base is None else finite_or_none(losses.mean(base)),
        tokens=int(losses.tokens.sum()) if losses.unit == NATS_PER_TOKEN else None,
    )


def summarise_champion(
    version: str, losses: ExampleLosses, bounds: GateSection, candidates: Candidates | None = None
) -> ChampionLoss:
    """Return the figures of the comparison with the champion.

    The trained adapter's losses are compared with the champion's on the same examples. The
    champion's are a column of `losses`, NaN for examples that are left out because one of the two
    was trained on them.

    version: the champion. candidates: as in `summarise_losses`, the steps selected from.
    """
    shared = losses.examples_with_champion_loss()
    champion = shared.champion
    if champion is None or not len(shared):
        return ChampionLoss(version, left_out=len(losses))
    return ChampionLoss(
        version,
        loss=finite_or_none(shared.mean(champion)),
        examples=len(shared),
        left_out=len(losses) - len(shared),
        few_prompts=shared.few_prompts(),
        **compare_losses(
            shared, champion, bounds, bounds.max_val_loss_increase, candidates=candidates
        ),
    )


@dataclass(frozen=True)
class Spread:
    """How far differences of single examples lie from the mean of their comparison, pooled.

    deviation: the standard deviation over several comparisons, in nats/token.
    degrees: its degrees of freedom.

    Five examples alone say little about their spread. Corrected for ten comparisons, their interval
    is 5.6 standard errors wide, but 3.0 with the pooled spread of ten times five examples
    (Student's t). The comparison's own one-sided interval must leave out 0 too.
    """

    deviation: float
    degrees: int

    @classmethod
    def pool(cls, compared: Iterable[PairedDifference]) -> Spread | None:
        """Pool the spread of several comparisons; None if none of them has an interval."""
        measured = [difference for difference in compared if difference.is_measurable]
        degrees = sum(difference.examples - 1 for difference in measured)
        squares = sum((n := d.examples) * (n - 1) * d.standard_error**2 for d in measured)
        return cls(math.sqrt(squares / degrees), degrees) if degrees else None


def compare_losses(
    losses: ExampleLosses,
    other: Vector,
    bounds: GateSection,
    increase: float,
    *,
    candidates: Candidates | None = None,
    comparisons: int | None = None,
    spread: Spread | None = None,
) -> dict[str, Any]:
    """Compare the trained adapter's losses with another adapter's, paired by example.

    Returns, by name, the fields with which gate.json records a comparison: the mean difference with
    its interval, the margin, and the conclusion "better", "no_worse", "worse" or "inconclusive".
    Empty if there are no examples or a loss is not finite.

    Args:
        losses: of the examples that are compared.
        other: the other adapter's losses of the same examples.
        bounds: the gate's configuration.
        increase: the relative rise of the loss that is allowed, from which the margin is computed.
        candidates: the candidates from which these examples selected the trained adapter. `better`
            and `no_worse` then must hold for the best of them; `worse` needs no correction.
        comparisons: the number of comparisons made at once, for which the conclusion is corrected
            (Bonferroni); None for a single comparison.
        spread: the pooled spread of all these comparisons, used if there are few examples.
    """
    compared = losses.compare_trained_with(other)
    if compared is None:
        return {}
    figures = compared.to_json()
    interval = None if figures["interval"] is None else (compared.low, compared.high)
    one_sided_high = compared.one_sided_high if compared.is_measurable else None
    # A second interval, wider than the first: corrected for the choice of the trained adapter
    # among candidates, or for several comparisons at once. Of few examples its spread is pooled.
    corrected, is_pooled = None, False
    if candidates is not None:
        corrected = candidates.corrected_interval(losses, other, compared)
    elif interval is not None and comparisons is not None:
        tail = (1 - CONFIDENCE) / (2 * comparisons)
        error, degrees = compared.standard_error, compared.examples - 1
        is_pooled = spread is not None and compared.examples < ENOUGH_FOR_OWN_SPREAD
        if spread is not None and is_pooled:
            error, degrees = spread.deviation / math.sqrt(compared.examples), spread.degrees
        width = student_t_quantile(1 - tail, degrees) * error
        corrected = (compared.mean - width, compared.mean + width)
    # The conclusion is drawn from the wider of both intervals. Its lower end decides on `worse`: a
    # selection does not move that end, for the best candidate looks too good, never too bad.
    deciding_interval = interval
    if interval is not None and one_sided_high is not None and corrected is not None:
        lows = [compared.one_sided_low if is_pooled else interval[0]]
        lows += [] if candidates is not None else [corrected[0]]
        deciding_interval = (min(lows), max(interval[1], corrected[1]))
        one_sided_high = max(one_sided_high, corrected[1])
    loss_before = losses.mean(other)
    margin = margin_of_loss(increase, loss_before, bounds.noise)
    conclusion = conclude(
        compared.mean,
        deciding_interval,
        one_sided_high,
        margin=margin,
        loss_before=loss_before,
        noise=bounds.noise,
    )
    examples_needed = None
    if conclusion == "inconclusive":
        examples_needed = count_examples_needed(
            compared.mean, compared.standard_error, compared.examples, margin
        )
    return figures | {
        "interval": interval,
        "smallest_visible": compared.smallest_visible if compared.is_measurable else None,
        "conclusion": conclusion,
        "margin": margin,
        "one_sided_high": one_sided_high,
        "examples_needed": examples_needed,
        "clusters": compared.examples,
        "unit": losses.unit,
        "corrected_interval": corrected,
    }


def loss_reasons(validation: Validation, bounds: GateSection) -> list[Reason]:
    """Return a reason if the held-out loss is worse beyond its bound."""
    if validation.conclusion != "worse":
        return []
    losses = format_change(validation.loss_before, validation.loss_after)
    has_bound = None not in (validation.margin, validation.interval)
    allowed = f"the allowed rise is {validation.margin:.2g}: " if has_bound else ""
    message = (
        f"loss {losses} on {describe_examples(validation)}"
        f"{describe_difference(validation)}; {allowed}"
        f"gate.max_val_loss_increase is {bounds.max_val_loss_increase:g} of the loss before"
    )
    return [Reason("loss_regressed", message)]


def general_loss_reasons(general: GeneralLoss, bounds: GateSection) -> list[Reason]:
    """Return a reason if the loss on general text is not finite, or worse beyond its bound."""
    if reasons := non_finite_loss_reasons(general, "loss on general text"):
        return reasons
    if general.conclusion != "worse":
        return []
    losses = format_change(general.loss_before, general.loss_after)
    message = (
        f"loss on general text {losses}{describe_noise(general)}; "
        f"gate.max_general_loss_increase is {bounds.max_general_loss_increase:g}"
    )
    return [Reason("forgetting", message)]


def harm_reasons(
    losses: ExampleLosses, validation: Validation, bounds: GateSection
) -> list[Reason]:
    """Return a reason if too many examples got much worse while hardly any improved as much.

    Empty if the loss as a whole is better (harmed examples are then only listed), and under
    `gate.noise: none`, which judges by the mean alone.
    """
    harm = HarmedExamples.find(losses.counted(), validation.margin or 0.0)
    if harm is None or validation.conclusion == "better" or bounds.noise == "none":
        return []
    share = bounds.max_harmed_share
    if not harm.is_beyond_chance(share):
        return []
    message = f"{describe_harmed(harm, losses)}; gate.max_harmed_share is {share:g}"
    return [Reason("examples_harmed", message)]


def drift_reasons(drift: Drift | None, data: str, bounds: GateSection) -> list[Reason]:
    """Return a reason if the predictions drifted beyond `max_kl`; `data` describes the examples."""
    if drift is None or bounds.max_kl is None or drift.is_within(bounds.max_kl):
        return []
    moved = "not finite" if drift.kl_initial is None else f"{drift.kl_initial:.4g} nats/token"
    tokens = "" if drift.tokens is None else f", {drift.tokens} tokens"
    message = (
        f"the mean KL divergence from the initial adapter is {moved} on {data}{tokens}; "
        f"gate.max_kl is {bounds.max_kl:g}"
    )
    return [Reason("drift", message)]


def non_finite_loss_reasons(losses: Validation | GeneralLoss, what: str) -> list[Reason]:
    """Return a reason for a loss that is not finite, which says whether training is to blame.

    `what` begins the message, such as "loss on general text".
    """
    if losses.loss_before is None:
        message = f"{what} with the initial adapter is not finite already; training is not to blame"
        return [Reason("non_finite", message)]
    if losses.loss_after is None:
        message = f"{what} {format_change(losses.loss_before, None)} with the trained adapter"
        return [Reason("non_finite", message)]
    return []


def describe_noise(losses: ComparedLoss) -> str:
    """Describe the paired difference and the allowed rise, as far as they are known."""
    has_margin = None not in (losses.difference, losses.interval, losses.margin)
    margin = f" and an allowed rise of {losses.margin:.2g}" if has_margin else ""
    return f"{describe_difference(losses)}{margin}"


def describe_difference(losses: ComparedLoss) -> str:
    """Describe the paired difference and its interval, to follow the losses in a message."""
    if losses.difference is None:
        return ""
    difference = format_difference(losses.difference)
    if losses.interval is None:
        return f", {difference}; {TOO_FEW_TO_TELL}, and so large a rise is refused as a precaution"
    return f", {difference} with a 95 % interval of {format_interval(losses.interval)}"


@dataclass(frozen=True)
class HarmedExamples:
    """How many independent examples were harmed and helped by training.

    harmed, helped: a cluster of examples counts once, by whether more of them are harmed or helped.
    examples: the number of independent examples (clusters).
    mean_rise: the mean rise of the harmed examples' loss, in nats/token; 0 without any.
    threshold: the change from which an example counts, in the unit of the loss.
    lines: the lines of the harmed examples, the most harmed first.
    """

    harmed: int
    helped: int
    examples: int
    mean_rise: float
    threshold: float = MIN_CHANGE
    lines: tuple[int, ...] = ()

    @classmethod
    def find(cls, losses: ExampleLosses, margin: float = 0.0) -> HarmedExamples | None:
        """Find the harmed and helped examples; None without examples, or if a loss is not finite.

        An example is harmed if its loss rose clearly by training, helped if it fell clearly.
        Examples of a cluster, which are not independent, count once, by their majority.

        `margin` is the allowed rise of the mean loss, in nats/token: a smaller rise of a single
        example is no harm.
        """
        differences = losses.after - losses.before
        if not len(losses) or not np.isfinite(differences).all():
            return None
        # A change counts only if it also stands out from the spread of all changes.
        deviation = np.abs(differences - np.median(differences))
        threshold = max(MIN_CHANGE, margin, MIN_SPREADS * float(np.median(deviation)))
        signs = (differences > threshold).astype(np.int64) - (differences < -threshold)
        clusters = losses.drawn_clusters
        balance = signs  # of each cluster: above 0 if more examples are harmed than helped
        if clusters is not None:
            _, cluster_index = np.unique(clusters, return_inverse=True)
            balance = np.bincount(cluster_index, signs)
        order = np.argsort(-differences, kind="stable")[: int((signs > 0).sum())]
        return cls(
            harmed=int((balance > 0).sum()),
            helped=int((balance < 0).sum()),
            examples=len(balance),
            mean_rise=float(differences[order].mean()) if len(order) else 0.0,
            threshold=threshold,
            lines=tuple(int(line) for line in losses.lines[order]),
        )

    def is_beyond_chance(self, max_share: float) -> bool:
        """Whether more than `max_share` of the examples are harmed, beyond chance and any exchange.

        The exact one-sided 95 % lower bound of the share (Clopper and Pearson, 1934) must be above
        `max_share`. If some examples were helped, the sign test's mid-p of harmed against helped
        must be at most 0.01.

        Without helped examples, three harmed ones are enough only with a mean rise of 4 nats/token.
        An adapter that harms as many examples as it helps shows three harmed and none helped in up
        to 5 % of cases, four and none in 2 % (benchmarks/gate.md).
        """
        if self.harmed < MIN_HARMED:
            return False
        if binomial_upper_tail(self.harmed, self.examples, max_share) >= MAX_CHANCE:
            return False
        if self.helped:
            return exchange_mid_p(self.harmed, self.helped) <= MAX_CHANCE_OF_EXCHANGE
        return self.harmed > MIN_HARMED or self.mean_rise >= MIN_LOSS_OF_FEWEST


def exchange_mid_p(lost: int, won: int) -> float:
    """Return McNemar's one-sided mid-p of this many lost and won if both are equally likely.

    P(X > lost) + P(X = lost) / 2 for X of lost + won fair coins (Fagerland, Lydersen and Laake, BMC
    Medical Research Methodology 13:91, 2013).
    """
    changed = lost + won
    above = binomial_upper_tail(lost + 1, changed, 0.5)
    return (above + binomial_upper_tail(lost, changed, 0.5)) / 2


def binomial_upper_tail(successes: int, trials: int, chance: float) -> float:
    """Return P(X >= successes) for a binomial distribution with success probability `chance`.

    The sum of the probabilities of each number of successes, in logarithms against overflow.
    """
    if successes <= 0 or chance >= 1:
        return 1.0
    if chance <= 0:
        return 0.0
    return math.fsum(
        math.exp(
            math.lgamma(trials + 1)
            - math.lgamma(k + 1)
            - math.lgamma(trials - k + 1)
            + k * math.log(chance)
            + (trials - k) * math.log1p(-chance)
        )
        for k in range(successes, trials + 1)
    )


def describe_harmed(harm: HarmedExamples, losses: ExampleLosses, max_lines: int = 3) -> str:
    """Describe the harmed examples: their number, and the first of their lines.

    Example: `3 of 30 examples lost more than 1.0 nats/token, and 0 gained as much: valid.jsonl:4`.
    """
    listed = ", ".join(str(line) for line in harm.lines[:max_lines])
    ellipsis = ", ..." if len(harm.lines) > max_lines else ""
    return (
        f"{harm.harmed} of {harm.examples} examples lost more than {harm.threshold:.1f} "
        f"{losses.unit}, and {harm.helped} gained as much: {losses.file}:{listed}{ellipsis}"
    )
