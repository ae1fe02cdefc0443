"""The checks of any two adapters, without a model: their tensors, and what they say they are."""

from __future__ import annotations

from nested_core.gate.base_compatibility import config_reasons
from nested_core.gate.judged import Check, Judged
from nested_core.gate.lora_effect import no_effect_reasons, overflow_reasons, require_lora_factors
from nested_core.gate.tensor_diff import (
    configuration_reasons,
    mismatch_reasons,
    named_base_reasons,
    non_finite_tensor_reasons,
    unchanged_reasons,
)
from nested_core.records.verdict import Reason


def _find_mismatches(judged: Judged) -> list[Reason]:
    """Names, shapes and dtypes; DamagedError for factors that cannot be multiplied."""
    reasons = mismatch_reasons(judged.before, judged.after)
    if not reasons:
        require_lora_factors(judged.after)
    return reasons


def _find_other_configuration(judged: Judged) -> list[Reason]:
    return configuration_reasons(judged.before, judged.after)


def _find_other_base(judged: Judged) -> list[Reason]:
    return named_base_reasons(judged.before, judged.after)


def _find_wrong_layout(judged: Judged) -> list[Reason]:
    """Whether the tensors are those that the trained adapter's own configuration describes."""
    return config_reasons(judged.after)


def _find_non_finite_values(judged: Judged) -> list[Reason]:
    return non_finite_tensor_reasons(judged.before, judged.verdict.tensors)


def _find_change_of_nothing(judged: Judged) -> list[Reason]:
    return unchanged_reasons(judged.verdict.tensors, judged.bounds.min_relative_change)


def _find_overflow(judged: Judged) -> list[Reason]:
    return overflow_reasons(judged.before, judged.after)


def _find_no_effect(judged: Judged) -> list[Reason]:
    return no_effect_reasons(judged.before, judged.after)


TENSORS = Check("tensors", _find_mismatches)
CONFIGURATION = Check("configuration", _find_other_configuration)
NAMED_BASE = Check("named base", _find_other_base)
LAYOUT = Check("layout", _find_wrong_layout, needs_all=True)
FINITE_TENSORS = Check("finite tensors", _find_non_finite_values, stopped_by=(TENSORS,))
CHANGE = Check(
    "change",
    _find_change_of_nothing,
    stopped_by=(TENSORS, FINITE_TENSORS),
    bounds=("min_relative_change",),
)
_UNSOUND = (TENSORS, CONFIGURATION, NAMED_BASE, LAYOUT, FINITE_TENSORS, CHANGE)
FINITE_PRODUCTS = Check("finite products", _find_overflow, stopped_by=_UNSOUND)
EFFECT = Check("effect", _find_no_effect, stopped_by=(*_UNSOUND, FINITE_PRODUCTS))
# With a reason of one of these, the tensors cannot be loaded into a model.
UNLOADABLE = (TENSORS, NAMED_BASE, FINITE_TENSORS, FINITE_PRODUCTS)
