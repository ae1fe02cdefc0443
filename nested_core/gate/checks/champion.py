"""The checks that compare the candidate with the champion and with the policy's reference version.

Losses are compared on the candidate's held-out examples, whatever data the champion was trained or
validated on. An example that either adapter or one of its ancestors was trained on is left out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import numpy as np

from nested_core.gate.checks.judged import Check, CheckedRun, GateWork, RunToJudge
from nested_core.gate.checks.losses import WITHOUT_MODEL
from nested_core.gate.evidence.champion_adapter import Champion, UnusableChampion, find_rival
from nested_core.measure.losses.loss_figures import summarise_champion
from nested_core.records.losses import Vector
from nested_core.records.verdict import ChampionLoss, Reason
from nested_core.text.digest_format import shorten_digest


def _compare_champion(judged: CheckedRun) -> tuple[Reason, ...]:
    """Compare the candidate's loss with the champion's, and record the result in the verdict.

    This check never rejects. If the champion cannot be compared, the verdict says why.
    """
    judged.champion = find_rival("champion", judged.base, judged.after)
    if judged.champion is not None:
        _compare_with(judged, judged.champion, "champion")
    return ()


def _compare_with_reference(judged: CheckedRun) -> tuple[Reason, ...]:
    """Compare the candidate's loss with that of the reference version in the registry's policy.

    If the reference is the champion, the champion's comparison is copied. This check never rejects.
    """
    reference = find_rival("reference", judged.base, judged.after)
    champion = judged.verdict.champion
    if reference is not None and champion is not None and champion.version == reference.version:
        judged.verdict = replace(judged.verdict, reference=champion)
    elif reference is not None:
        _compare_with(judged, reference, "reference")
    return ()


def _compare_with(
    judged: CheckedRun, rival: Champion | UnusableChampion, role: Literal["champion", "reference"]
) -> None:
    """Record the comparison in the verdict, and add the rival's losses to gate-losses.jsonl."""
    compared, measured = _compare_losses(judged, rival, role)
    judged.verdict = replace(judged.verdict, **{role: compared})  # type: ignore[arg-type]
    if judged.losses is None or measured is None:
        return
    judged.losses = losses = replace(judged.losses, **{role: measured})  # type: ignore[arg-type]
    judged.written_files[judged.run.gate_losses.name] = losses.render()
    if judged.verdict.validation is not None:
        validation = replace(judged.verdict.validation, losses_sha256=losses.sha256())
        judged.verdict = replace(judged.verdict, validation=validation)


def _compare_losses(
    judged: CheckedRun, rival: Champion | UnusableChampion, role: str
) -> tuple[ChampionLoss, Vector | None]:
    """Return the comparison for gate.json, and the rival's mean loss of each held-out example.

    Left-out examples have the loss NaN. None instead of losses means that the rival could not be
    compared; `not_compared` of the comparison says why.

    judged: the run that is judged, with the losses of its adapter, the candidate.
    rival: the champion of the registry, or another version to compare with.
    role: what the rival is called in messages.
    """
    version, losses, held_out = rival.version, judged.losses, judged.held_out
    if held_out is None or losses is None or judged.verdict.validation is None:
        return ChampionLoss(version, not_compared="there are no held-out examples"), None
    if isinstance(rival, UnusableChampion):
        return ChampionLoss(version, not_compared=rival.problem), None
    if not np.isfinite(losses.after).all():
        return ChampionLoss(version, not_compared="the candidate's loss is not finite"), None
    trained_on = judged.trained_on | rival.trained_on
    if trained_on.unknown is not None:
        return ChampionLoss(version, left_out=None, not_compared=trained_on.unknown), None
    is_seen = trained_on.find_in(held_out.digests)
    if is_seen.all():
        problem = (
            f"each of the {len(losses)} held-out examples of {losses.file} is one that the "
            f"{role}, the candidate or an ancestor was trained on: nothing is left to compare by"
        )
        return ChampionLoss(version, left_out=len(losses), not_compared=problem), None
    measured: Vector = losses.before  # valid if the rival is the adapter that training began from
    if rival.adapter.digest() != judged.before.digest():
        # One adapter's pair of loss sums and token counts
        ((sums, _),) = rival.base.example_loss_sums((rival.adapter.path,), held_out.split)
        measured = sums[held_out.is_example_supervised] / losses.tokens
    if not np.isfinite(measured).all():
        problem = f"the loss of the {role} {shorten_digest(version)} is not finite"
        return ChampionLoss(version, not_compared=problem), None
    measured = np.where(is_seen, np.nan, measured)
    bounds = rival.base.config.gate
    compared = replace(losses, champion=measured)
    return summarise_champion(version, compared, bounds, judged.candidates), measured


def _plan_rivals(run: RunToJudge) -> GateWork:
    """The work of both checks: a pass for each rival that is not the adapter of the start."""
    rivals = sum(rival is not None for rival in run.rivals)
    return GateWork(rows=rivals * run.count_rows(run.held_out_rows, 1))


CHAMPION = Check("champion", _compare_champion, stopped_by=WITHOUT_MODEL, plan_work=_plan_rivals)
REFERENCE = Check("reference", _compare_with_reference, stopped_by=WITHOUT_MODEL)
