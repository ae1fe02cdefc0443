"""The check of the ancestors: the candidate beside the champion, on what earlier nights held out.

An adapter that is better at tonight's data and has lost last week's is refused. The bound is
relative to the champion's loss, and the interval is corrected for the number of ancestors: with ten
of them, one in twenty nights that forgot nothing would otherwise be refused for chance alone.

An ancestor with too few examples for an interval cannot be judged by itself. All of these are
joined and judged as one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np

from nested_core.gate.checks.base import WITHOUT_MODEL
from nested_core.gate.checks.champion import CHAMPION
from nested_core.gate.checks.judged import Check, JudgedRun
from nested_core.gate.evidence.champion_adapter import Champion
from nested_core.measure.losses.ancestor_examples import (
    AncestorExamples,
    choose_ancestor_examples,
    tokenize_stored_rows,
)
from nested_core.measure.losses.held_out_loss import HeldOutExamples
from nested_core.measure.losses.left_out_examples import find_left_out
from nested_core.measure.losses.loss_figures import ancestor_reasons, summarise_ancestors
from nested_core.records.verdict import AncestorLoss, Reason
from nested_core.text.stages import stages


def _compare_on_ancestors(judged: JudgedRun) -> Iterator[Reason]:
    champion, section = judged.champion, judged.config.registry
    if not isinstance(champion, Champion) or section.path is None or section.name is None:
        return
    chosen = choose_ancestor_examples(
        judged.config, Path(section.path), section.name, champion.version
    )
    compared = tuple(_measure(judged, champion, chosen))
    judged.verdict = replace(judged.verdict, ancestors=compared)
    yield from ancestor_reasons(compared, judged.bounds)


def _measure(
    judged: JudgedRun, champion: Champion, chosen: list[AncestorExamples]
) -> Iterator[AncestorLoss]:
    """What gate.json says of each ancestor; all their examples are measured in one pass."""
    rows = [row for ancestor in chosen for row in ancestor.rows]
    ages = np.repeat(np.arange(len(chosen)), [len(ancestor.rows) for ancestor in chosen])
    if not rows:
        yield from summarise_ancestors(chosen, None, ages, judged.bounds)
        return
    count = len(np.unique(ages))
    stages.info("gate: losses on what %d earlier versions were judged by", count)
    split = tokenize_stored_rows(judged.config, rows)
    examples = HeldOutExamples(split, "held-out examples", selected_on_same_data=False)
    ((before, tokens),) = champion.base.example_loss_sums((champion.adapter.path,), split)
    ((after, _),) = judged.base.example_loss_sums((judged.after.path,), split)
    losses = examples.make_losses(tokens, before=before, after=after)
    is_seen = find_left_out(examples.digests, judged.trained_on, champion.training_examples)
    yield from summarise_ancestors(
        chosen, losses.leaving_out(is_seen), ages[losses.lines - 1], judged.bounds
    )


ANCESTORS = Check(
    "ancestors",
    _compare_on_ancestors,
    stopped_by=(*WITHOUT_MODEL, CHAMPION),
    bounds=("max_ancestor_loss_increase",),
)
