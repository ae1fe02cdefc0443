"""The checks of a run that replays: no worse than the champion, and no ancestor is forgotten.

The checks of losses compare a run with its start. A rebuilt run starts from the base, so that these
say nothing of the champion; here the same bounds are held against the champion's losses.

Of the ancestors: an adapter that is better at tonight's data and has lost last week's is refused.
The bound is relative to the champion's loss, and the interval is corrected for the number of
ancestors: with ten of them, one in twenty nights that forgot nothing would otherwise be refused for
chance alone. An ancestor with too few examples for an interval cannot be judged by itself. All of
these are joined and judged as one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from nested_core.config.sections import GateSection
from nested_core.gate.checks.champion import CHAMPION
from nested_core.gate.checks.judged import Check, CheckedRun, GateChecks, GateWork, RunToJudge
from nested_core.gate.checks.losses import WITHOUT_MODEL
from nested_core.gate.evidence.champion_adapter import Champion
from nested_core.measure.losses.held_out_loss import HeldOutExamples
from nested_core.measure.losses.loss_figures import (
    Spread,
    compare_losses,
    describe_noise,
    harm_reasons,
    loss_reasons,
    summarise_losses,
)
from nested_core.records.loss_conclusion import MIN_EXAMPLES
from nested_core.records.losses import ExampleLosses
from nested_core.records.paired_difference import Indices
from nested_core.records.start import read_start
from nested_core.records.verdict import JOINED, AncestorLoss, Reason
from nested_core.rooms.replay.ancestor_examples import (
    AncestorExamples,
    choose_examples,
    tokenize_stored_rows,
)
from nested_core.storage.atomic import finite_or_none
from nested_core.text.stages import stages


def _find_worse_than_champion(judged: CheckedRun) -> Iterator[Reason]:
    """Yield reasons against a rebuilt adapter that is worse than the champion on held-out data.

    They are those of the ordinary checks of losses, with the champion's losses in place of those
    before training. Yields none for a run that was not rebuilt, and without the champion's losses.
    """
    start, losses = read_start(judged.config, judged.run), judged.losses
    if start is None or start.choice.policy != "rebuild" or losses is None:
        return
    shared = losses.examples_with_champion_loss()
    if shared.champion is None or not len(shared):
        return
    shared = replace(shared, before=shared.champion)
    validation = summarise_losses(
        shared, judged.bounds, selected_on_same_data=False, candidates=judged.candidates
    )
    reasons = loss_reasons(validation, judged.bounds)
    for reason in reasons or harm_reasons(shared, validation, judged.bounds):
        yield replace(reason, message=f"against the champion, {reason.message}")


def _compare_on_ancestors(judged: CheckedRun) -> Iterator[Reason]:
    """Compare with the champion, or else with the adapter that `resume_adapter_file` names."""
    champion, is_start = judged.champion, False
    if not isinstance(champion, Champion):
        start = judged.before
        champion, is_start = Champion(start.digest(), start, judged.base, judged.trained_on), True
    followed = None if is_start else champion.version
    chosen = choose_examples(judged.config, followed, parent=champion.version)
    compared = tuple(replace(one, is_start=is_start) for one in _measure(judged, champion, chosen))
    judged.verdict = replace(judged.verdict, ancestors=compared)
    yield from ancestor_reasons(compared, judged.bounds)


def _measure(
    judged: CheckedRun, champion: Champion, chosen: list[AncestorExamples]
) -> Iterator[AncestorLoss]:
    """Measure champion and candidate on the ancestors' examples, in one pass for all of them.

    Yields the entry of gate.json for each ancestor.
    """
    rows = [row for ancestor in chosen for row in ancestor.rows]
    # For each row the index of its ancestor in `chosen`
    ages = np.repeat(np.arange(len(chosen)), [len(ancestor.rows) for ancestor in chosen])
    if not rows:
        yield from (ancestor.entry for ancestor in chosen)
        return
    stages.info("gate: losses on what %d earlier versions were judged by", len(np.unique(ages)))
    split = tokenize_stored_rows(judged.config, rows)
    examples = HeldOutExamples(split, "held-out examples", selected_on_same_data=False)
    ((before, tokens),) = champion.base.example_loss_sums((champion.adapter.path,), split)
    ((after, _),) = judged.base.example_loss_sums((judged.after.path,), split)
    losses = examples.make_losses(tokens, judged.config.training.loss, before=before, after=after)
    is_seen = (judged.trained_on | champion.trained_on).find_in(examples.digests)
    yield from summarise_ancestors(
        chosen, losses.leaving_out(is_seen), ages[losses.lines - 1], judged.bounds
    )


def summarise_ancestors(
    ancestors: Sequence[AncestorExamples],
    losses: ExampleLosses,
    owners: Indices,
    bounds: GateSection,
) -> Iterator[AncestorLoss]:
    """Yield the comparison of champion and candidate on the examples of each ancestor.

    An ancestor with fewer than MIN_EXAMPLES independent examples gets no interval, so that it
    rejects nothing. If several such ancestors have enough examples together, one more comparison
    is yielded, of all their examples. The intervals use the spread of all ancestors' differences.

    Args:
        ancestors: the versions that the examples are from.
        losses: of the examples of all ancestors, with those that were trained on marked as left
            out.
        owners: for each loss, the index of its ancestor in `ancestors`, int64 (n,).
        bounds: the gate's bounds.
    """
    is_counted = np.ones(len(losses), np.bool_) if losses.left_out is None else ~losses.left_out
    measured = [
        losses.select((owners == place) & is_counted) if ancestor.rows else None
        for place, ancestor in enumerate(ancestors)
    ]
    counts = [0 if one is None else one.independent_examples for one in measured]
    small = [place for place, count in enumerate(counts) if 0 < count < MIN_EXAMPLES]
    joined = losses.select(np.isin(owners, small) & is_counted)
    is_joined = len(small) > 1 and joined.independent_examples >= MIN_EXAMPLES
    comparisons = sum(count >= MIN_EXAMPLES for count in counts) + is_joined
    differences = (one.compare_trained_with(one.before) for one in measured if one is not None)
    spread = Spread.pool(filter(None, differences))
    for place, (ancestor, kept) in enumerate(zip(ancestors, measured, strict=True)):
        entry = replace(ancestor.entry, left_out=int(((owners == place) & ~is_counted).sum()))
        yield entry if kept is None else _compare(entry, kept, bounds, comparisons, spread)
    if is_joined:
        group = AncestorLoss(JOINED, joined=tuple(ancestors[n].entry.version for n in small))
        yield _compare(group, joined, bounds, comparisons, spread)


def _compare(
    entry: AncestorLoss,
    losses: ExampleLosses,
    bounds: GateSection,
    comparisons: int,
    spread: Spread | None,
) -> AncestorLoss:
    """Return an ancestor's entry with the comparison of champion and candidate on its examples.

    Args:
        entry: what is known of the ancestor, with how many of its examples were trained on.
        losses: of the examples that are compared, the champion's as `before` and the candidate's as
            `after`.
        bounds: the gate's bounds.
        comparisons: the number of comparisons, for which the interval is corrected (Bonferroni).
        spread: of the differences on all ancestors' examples.
    """
    if not len(losses):
        problem = f"all {entry.left_out} that are left were trained on"
        if not entry.left_out:
            problem = "none of its examples is a row of this run's training.loss"
        return replace(entry, not_compared=problem)
    increase = bounds.max_ancestor_loss_increase
    increase = bounds.max_val_loss_increase if increase is None else increase
    figures = compare_losses(
        losses, losses.before, bounds, increase, comparisons=comparisons, spread=spread
    )
    if not figures:
        return replace(entry, not_compared="a loss is not finite")
    return replace(
        entry,
        loss=finite_or_none(losses.mean(losses.before)),
        examples=len(losses),
        few_prompts=losses.few_prompts(),
        **figures,
    )


def ancestor_reasons(ancestors: Sequence[AncestorLoss], bounds: GateSection) -> Iterator[Reason]:
    """Yield a reason for each ancestor on whose held-out examples the candidate is worse.

    Yields none if `gate.max_ancestor_loss_increase` is not set. An ancestor with too few examples
    for an interval gives none.
    """
    increase = bounds.max_ancestor_loss_increase
    for ancestor in ancestors if increase is not None else ():
        if not ancestor.is_forgotten(bounds.noise):
            continue
        message = (
            f"{ancestor.describe_forgotten()}{describe_noise(ancestor)}; "
            f"gate.max_ancestor_loss_increase is {increase:g}"
        )
        yield Reason("forgetting", message, ancestor=ancestor.version)


def _plan_work(run: RunToJudge) -> GateWork:
    """Return a pass of the champion and one of the candidate over the rows of all ancestors."""
    chosen = choose_examples(run.config, run.champion, parent="")
    return GateWork(rows=2 * run.count_rows(sum(len(ancestor.rows) for ancestor in chosen), 1))


REBUILT = Check("rebuilt", _find_worse_than_champion, stopped_by=WITHOUT_MODEL)
ANCESTORS = Check(
    "ancestors",
    _compare_on_ancestors,
    stopped_by=(*WITHOUT_MODEL, CHAMPION),
    bounds=("max_ancestor_loss_increase",),
    plan_work=_plan_work,
)
CHECKS = GateChecks((REBUILT, ANCESTORS))
