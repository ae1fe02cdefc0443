"""The check that the trained adapter fits the base model, which every later check loads it into."""

from __future__ import annotations

from typing import Any

from nested_core.gate.checks.judged import Check, CheckedRun
from nested_core.gate.checks.tensors import UNLOADABLE
from nested_core.gate.tensors.base_compatibility import base_reasons
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.records.verdict import Reason


def _find_misfits(judged: CheckedRun) -> list[Reason]:
    """Load the base model, and give a reason if the trained adapter's tensors do not fit it."""
    judged.base = LoadedBase.load(judged.config, judged.session)
    return base_reasons(judged.after, judged.base.parameters, judged.base.folder)


BASE = Check(
    "base", _find_misfits, stopped_by=UNLOADABLE, stage="the base model, which the tensors must fit"
)
# If one of these checks fails, no model with the trained adapter can be loaded to measure with.
WITHOUT_MODEL: tuple[Check[Any], ...] = (*UNLOADABLE, BASE)
