"""The checks that read files alone, in order: those for any two adapters, and those for a run.

The first compare tensors and configurations; a run's also ask of each tier whether all its updates
were applied and changed its tensors. `promote` repeats them, because they load no model.
"""

from __future__ import annotations

from collections.abc import Iterator

import mlx.core as mx

from nested_core.backend import to_float
from nested_core.config.schema import FineTuneConfig
from nested_core.gate.checks.judged import Check, CheckedRun, Judged
from nested_core.gate.evidence.run_evidence import TierEvidence
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
from nested_core.optim.learning_rate_schedules import build_learning_rate
from nested_core.records.verdict import Reason, TensorChange, TierChange

# Adam moves a weight by about the rate, and float32 numbers near 0.01 are 1e-9 apart.
SMALLEST_USEFUL_RATE = 1e-9
MAX_SAMPLED_STEPS = 1000


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


def _find_skipped_updates(judged: CheckedRun) -> Iterator[Reason]:
    """Yield a reason for each tier whose share of skipped updates exceeds the bound."""
    bound = judged.bounds.max_skipped_share
    for row in judged.verdict.tiers:
        if row.skipped_updates > bound * row.expected_updates:
            message = (
                f"{_label(row)}: {row.skipped_updates} of {row.expected_updates} updates were "
                f"skipped for non-finite gradients; gate.max_skipped_share is {bound:g}"
            )
            names = tuple(change.name for change in _changes_of_tier(judged, row))
            yield Reason("updates_missing", message, names)


def _find_missing_updates(judged: CheckedRun) -> Iterator[Reason]:
    """Yield the reasons to reject what training did to a tier, a group of parameters.

    `updates_missing` if applied and skipped updates do not add up to the expected ones, or if a
    tensor had gradients and a positive learning rate but did not change. `tier_unchanged` if no
    tensor changed or none had a gradient.
    """
    config, evidence = judged.config, judged.tiers
    for row in judged.verdict.tiers:
        label = _label(row)
        changes = _changes_of_tier(judged, row)
        names = tuple(change.name for change in changes)
        if row.applied_updates + row.skipped_updates != row.expected_updates:
            message = (
                f"{label}: {row.expected_updates} updates were due by step {evidence.step}, "
                f"{row.applied_updates} were applied and {row.skipped_updates} skipped"
            )
            yield Reason("updates_missing", message, names)
        if not row.changed or not any(map(evidence.had_gradient, names)):
            yield Reason("tier_unchanged", f"{label}: nothing was trained", names)
        elif row.applied_updates and _had_positive_learning_rate(config, evidence, row):
            unmoved = tuple(
                c.name for c in changes if not c.changed and evidence.is_missing_its_updates(c.name)
            )
            if unmoved:
                why = _explain_lost_updates(config, evidence, row)
                shown = "1 tensor" if len(unmoved) == 1 else f"{len(unmoved)} tensors"
                message = f"{label}: {shown} had gradients and stayed as they were; {why}"
                yield Reason("updates_missing", message, unmoved)


def _changes_of_tier(judged: CheckedRun, row: TierChange) -> list[TensorChange]:
    """Return the changes of the tensors that belong to a tier."""
    return [change for change in judged.verdict.tensors if change.tier == row.tier]


def _label(row: TierChange) -> str:
    """Name a tier with its frequency: `tier 1 (every 4)`."""
    return f"tier {row.tier} (every {row.frequency})"


def _explain_lost_updates(config: FineTuneConfig, evidence: TierEvidence, row: TierChange) -> str:
    """Return the likely cause: a learning rate too small for float32 weights, or lost updates."""
    rate = build_learning_rate(config, evidence.step)
    if callable(rate):
        due = range(row.frequency, evidence.step + 1, row.frequency)
        sampled = due[:: max(1, len(due) // MAX_SAMPLED_STEPS)]
        highest = max(to_float(rate(mx.array(step - 1))) for step in sampled)
    else:
        highest = rate
    if highest < SMALLEST_USEFUL_RATE:
        return (
            f"a learning rate of {highest:.3g} is too small to move a float32 weight: raise "
            f"learning_rate (1e-4 is usual for LoRA)"
        )
    return "the updates were computed and lost before they reached the weights"


def _had_positive_learning_rate(
    config: FineTuneConfig, evidence: TierEvidence, row: TierChange
) -> bool:
    """Whether the learning rate was above 0 at one or more of the tier's due steps."""
    # The schedule may be built for `evidence.step` steps: its length does not change a rate's sign.
    rate = build_learning_rate(config, evidence.step)
    if not callable(rate):
        return rate > 0
    due = range(row.frequency, evidence.step + 1, row.frequency)
    return bool(evidence.flush_steps) or any(to_float(rate(mx.array(step - 1))) > 0 for step in due)


_STOPPED_BY = (FINITE_TENSORS, *CHANGE, FINITE_PRODUCTS)
SKIPPED_UPDATES = Check(
    "skipped updates", _find_skipped_updates, stopped_by=_STOPPED_BY, bounds=("max_skipped_share",)
)
UPDATES = Check("updates", _find_missing_updates, stopped_by=_STOPPED_BY)
CHECKS_OF_ADAPTERS: tuple[Check[Judged], ...] = (
    TENSORS,
    CONFIGURATION,
    NAMED_BASE,
    LAYOUT,
    FINITE_TENSORS,
    *CHANGE,
    FINITE_PRODUCTS,
    EFFECT,
)
CHECKS_OF_FILES: tuple[Check[CheckedRun], ...] = (*CHECKS_OF_ADAPTERS, SKIPPED_UPDATES, UPDATES)
