"""The check of a rebuilt run: it is no worse than the champion that it follows.

The checks of losses compare a run with its start. A rebuilt run starts from the base, so that these
say nothing of the champion; here the same bounds are held against the champion's losses.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from nested_core.gate.checks.base import WITHOUT_MODEL
from nested_core.gate.checks.judged import Check, CheckedRun, GateChecks
from nested_core.measure.losses.loss_figures import harm_reasons, loss_reasons, summarise_losses
from nested_core.records.start import read_start
from nested_core.records.verdict import Reason
from nested_core.rooms.replay.ancestor_check import ANCESTORS


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
        shared, selected_on_same_data=False, bounds=judged.bounds, candidates=judged.candidates
    )
    reasons = loss_reasons(validation, judged.bounds)
    for reason in reasons or harm_reasons(shared, validation, judged.bounds):
        yield replace(reason, message=f"against the champion, {reason.message}")


REBUILT = Check("rebuilt", _find_worse_than_champion, stopped_by=WITHOUT_MODEL)
CHECKS = GateChecks((REBUILT, ANCESTORS))
