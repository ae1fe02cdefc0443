"""The checks of any two adapters without a model: their tensors and their configurations."""

from __future__ import annotations

from nested_core.gate.checks.judged import Check, Judged
from nested_core.gate.tensors.base_compatibility import config_reasons
from nested_core.gate.tensors.lora_effect import (
    no_effect_reasons,
    overflow_reasons,
    require_lora_factors,
)
from nested_core.gate.tensors.tensor_diff import (
    configuration_reasons,
    mismatch_reasons,
    named_base_reasons,
    non_finite_tensor_reasons,
    small_change_reasons,
    unchanged_reasons,
)
from nested_core.records.verdict import Reason


def _find_mismatches(judged: Judged) -> list[Reason]:
    """Return reasons for tensors whose name, shape or dtype differs between the two adapters.

    Raises DamagedError if a trained lora_a and its lora_b cannot be multiplied.
    """
    reasons = mismatch_reasons(judged.before, judged.after)
    if not reasons:
        require_lora_factors(judged.after)
    return reasons


TENSORS = Check("tensors", _find_mismatches)
CONFIGURATION: Check[Judged] = Check(
    "configuration", lambda judged: configuration_reasons(judged.before, judged.after)
)
NAMED_BASE: Check[Judged] = Check(
    "named base", lambda judged: named_base_reasons(judged.before, judged.after)
)
# Whether the tensors are those that the trained adapter's own configuration describes.
LAYOUT: Check[Judged] = Check("layout", lambda judged: config_reasons(judged.after), needs_all=True)
FINITE_TENSORS: Check[Judged] = Check(
    "finite tensors",
    lambda judged: non_finite_tensor_reasons(judged.before, judged.verdict.tensors),
    stopped_by=(TENSORS,),
)
# Two checks, because `promote` repeats the first whatever bounds a verdict records.
ANY_CHANGE: Check[Judged] = Check(
    "change",
    lambda judged: unchanged_reasons(judged.verdict.tensors),
    stopped_by=(TENSORS, FINITE_TENSORS),
)
ENOUGH_CHANGE: Check[Judged] = Check(
    "enough change",
    lambda judged: small_change_reasons(judged.verdict.tensors, judged.bounds.min_relative_change),
    stopped_by=(TENSORS, FINITE_TENSORS, ANY_CHANGE),
    bounds=("min_relative_change",),
)
CHANGE = (ANY_CHANGE, ENOUGH_CHANGE)
_UNSOUND = (TENSORS, CONFIGURATION, NAMED_BASE, LAYOUT, FINITE_TENSORS, *CHANGE)
FINITE_PRODUCTS: Check[Judged] = Check(
    "finite products",
    lambda judged: overflow_reasons(judged.before, judged.after),
    stopped_by=_UNSOUND,
)
EFFECT: Check[Judged] = Check(
    "effect",
    lambda judged: no_effect_reasons(judged.before, judged.after),
    stopped_by=(*_UNSOUND, FINITE_PRODUCTS),
)
# If one of these checks fails, the trained tensors cannot be loaded into a model.
UNLOADABLE = (TENSORS, NAMED_BASE, FINITE_TENSORS, FINITE_PRODUCTS)
