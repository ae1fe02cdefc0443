"""The champion's losses on the candidate's held-out examples, beside the candidate's.

Whatever data the champion was trained or validated on, both are compared on the same examples.
Examples that one of the two, or a version that it was trained from, has seen in training count for
neither.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from nested_core.gate.champion_adapter import Champion, UnusableChampion
from nested_core.gate.chosen_candidate import Candidates
from nested_core.gate.example_losses import ExampleLosses, Vector
from nested_core.gate.held_out_loss import HeldOutExamples
from nested_core.gate.run_evidence import RunEvidence
from nested_core.gate.verdict import ChampionLoss
from nested_core.text.digest_format import shorten_digest


@dataclass(frozen=True, eq=False)
class MeasuredHeldOutExamples:
    """The held-out examples of a run, and their losses."""

    held_out: HeldOutExamples
    losses: ExampleLosses


def compare_with_champion(
    champion: Champion | UnusableChampion,
    evidence: RunEvidence,
    examples: MeasuredHeldOutExamples,
    candidates: Candidates,
) -> tuple[ChampionLoss, ExampleLosses]:
    """What gate.json says of the champion, and the losses with the champion's beside them.

    One that cannot be compared is no error: the result says why.
    """
    version, losses = champion.version, examples.losses
    if isinstance(champion, UnusableChampion):
        return ChampionLoss(version, not_compared=champion.problem), losses
    if not np.isfinite(losses.after).all():
        return ChampionLoss(version, not_compared="the candidate's loss is not finite"), losses
    is_seen = np.isin(examples.held_out.digests, champion.training_examples)
    if losses.left_out is not None:
        is_seen |= losses.left_out
    if is_seen.all():
        problem = (
            f"each of the {len(losses)} held-out examples of {losses.file} is one that the "
            f"champion, the candidate or an ancestor was trained on: nothing is left to compare by"
        )
        return ChampionLoss(version, left_out=len(losses), not_compared=problem), losses
    measured = _measure_losses(champion, evidence, examples)
    if not np.isfinite(measured).all():
        problem = f"the loss of the champion {shorten_digest(version)} is not finite"
        return ChampionLoss(version, not_compared=problem), losses
    compared = replace(losses, champion=np.where(is_seen, np.nan, measured))
    found = ChampionLoss.from_losses(
        version, compared, bounds=champion.base.config.gate, candidates=candidates
    )
    return found, compared


def _measure_losses(
    champion: Champion, evidence: RunEvidence, examples: MeasuredHeldOutExamples
) -> Vector:
    """The champion's mean loss on each example, in nats a token."""
    if champion.adapter.digest() == evidence.before.digest():
        return examples.losses.before
    ((sums, _),) = champion.base.example_loss_sums(
        (champion.adapter.path,), examples.held_out.split
    )
    measured: Vector = sums[examples.held_out.is_example_supervised] / examples.losses.tokens
    return measured
