"""The check of the champion: its losses on the candidate's held-out examples, beside its own.

Whatever data the champion was trained or validated on, both are compared on the same examples.
Examples that one of the two, or a version that it was trained from, has seen in training count for
neither.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from nested_core.gate.champion_adapter import Champion, UnusableChampion, find_champion
from nested_core.gate.checks.base import WITHOUT_MODEL
from nested_core.gate.example_losses import ExampleLosses, Vector
from nested_core.gate.held_out_loss import HeldOutExamples
from nested_core.gate.judged import Check, JudgedRun
from nested_core.gate.loss_figures import summarise_champion
from nested_core.records.verdict import ChampionLoss, Reason
from nested_core.text.digest_format import shorten_digest


def _compare_with_champion(judged: JudgedRun) -> tuple[Reason, ...]:
    """Compare the losses, which gives no reason: of one that cannot be compared, it is said why."""
    judged.champion = champion = find_champion(judged.base, judged.after)
    if champion is None:
        return ()
    held_out, losses, validation = judged.held_out, judged.losses, judged.verdict.validation
    if held_out is None or losses is None or validation is None:
        compared = ChampionLoss(champion.version, not_compared="there are no held-out examples")
    else:
        compared, losses = _compare_losses(judged, champion, held_out, losses)
        judged.losses = losses
        judged.written_files[judged.run.gate_losses.name] = losses.render()
        validation = replace(validation, losses_sha256=losses.sha256())
    judged.verdict = replace(judged.verdict, champion=compared, validation=validation)
    return ()


def _compare_losses(
    judged: JudgedRun,
    champion: Champion | UnusableChampion,
    held_out: HeldOutExamples,
    losses: ExampleLosses,
) -> tuple[ChampionLoss, ExampleLosses]:
    """What gate.json says of the champion, and the losses with the champion's beside them."""
    version = champion.version
    if isinstance(champion, UnusableChampion):
        return ChampionLoss(version, not_compared=champion.problem), losses
    if not np.isfinite(losses.after).all():
        return ChampionLoss(version, not_compared="the candidate's loss is not finite"), losses
    is_seen = np.isin(held_out.digests, champion.training_examples)
    if losses.left_out is not None:
        is_seen |= losses.left_out
    if is_seen.all():
        problem = (
            f"each of the {len(losses)} held-out examples of {losses.file} is one that the "
            f"champion, the candidate or an ancestor was trained on: nothing is left to compare by"
        )
        return ChampionLoss(version, left_out=len(losses), not_compared=problem), losses
    measured: Vector = losses.before
    if champion.adapter.digest() != judged.before.digest():
        ((sums, _),) = champion.base.example_loss_sums((champion.adapter.path,), held_out.split)
        measured = sums[held_out.is_example_supervised] / losses.tokens
    if not np.isfinite(measured).all():
        problem = f"the loss of the champion {shorten_digest(version)} is not finite"
        return ChampionLoss(version, not_compared=problem), losses
    compared = replace(losses, champion=np.where(is_seen, np.nan, measured))
    bounds = champion.base.config.gate
    found = summarise_champion(version, compared, bounds, judged.candidates)
    return found, compared


CHAMPION = Check("champion", _compare_with_champion, stopped_by=WITHOUT_MODEL)
