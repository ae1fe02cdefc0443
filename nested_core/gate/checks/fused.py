"""The check that the change survives fusing into the base as it is stored."""

from __future__ import annotations

from dataclasses import replace

from nested_core.gate.fused_change import judge_fused_change
from nested_core.gate.held_out_loss import LoadedBase
from nested_core.gate.judged import Check, JudgedRun
from nested_core.records.verdict import Reason


def _find_lost_change(judged: JudgedRun) -> list[Reason]:
    before, after = judged.before.to_mlx(), judged.after.to_mlx()
    model = LoadedBase.load(judged.config, as_stored=True).model
    fused, reasons = judge_fused_change(model, before, after)
    judged.verdict = replace(judged.verdict, fused=fused)
    return reasons


FUSED = Check(
    "fused",
    _find_lost_change,
    needs_all=True,
    is_asked=lambda bounds: bounds.check_fused,
    bounds=("check_fused",),
    stage="whether the change survives fusing",
)
