"""Tiers as an optimizer uses them: a frequency, exact parameter names, and counters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from nested_core.errors import DamagedError
from nested_core.optim.gradients import ArraySpec

COUNTERS_KEY = "nested"
# Of the state; 1 had no number, and no marks for SGD and others (`had_gradient`).
STATE_LAYOUT_VERSION = 2
RESERVED_NAMES = ("step", "learning_rate", COUNTERS_KEY)


@dataclass(frozen=True)
class Tier:
    """Parameters that are updated together, at the steps n = 1, 2, ... with n % `frequency` == 0.

    names: exact dotted parameter names; None means all that no other tier names.
    learning_rate_scale: a factor on the learning rate.
    weight_decay: None is the optimizer's.
    """

    frequency: int = 1
    names: frozenset[str] | None = None
    learning_rate_scale: float = 1.0
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a field that is not valid."""
        if not (self.frequency >= 1 and self.frequency % 1 == 0):
            raise ValueError(f"A tier's frequency is a whole number >= 1, got {self.frequency}.")
        if isinstance(self.names, str):
            raise ValueError(f"A tier's names should be a set of names, got {self.names!r} alone.")
        for field in ("learning_rate_scale", "weight_decay"):
            value = getattr(self, field)
            if value is not None and not 0.0 <= value < math.inf:
                raise ValueError(f"A tier's {field} should be >=0, {value} was provided instead")


@dataclass(frozen=True)
class TierStats:
    """What one tier contains and how often it was updated.

    tier: its number, from 0.
    frequency: optimizer steps between two of its updates.
    tensors, parameters: how many arrays it has, and how many elements in them.
    updates: how many updates were applied.
    skipped: how many were skipped because a gradient was not finite.
    """

    tier: int
    frequency: int
    tensors: int
    parameters: int
    updates: int
    skipped: int


def check_tiered_options(
    tiers: Sequence[Tier], slow_gradients: str, accumulate: str, max_grad_norm: float
) -> None:
    """Raise ValueError for invalid options of `Tiered`.

    The arguments are those of `Tiered`.
    """
    strange = {type(tier).__name__ for tier in tiers} - {Tier.__name__}
    if strange:
        raise ValueError(f"tiers should be Tier(frequency=...) records, got {sorted(strange)}")
    if not tiers or sum(tier.names is None for tier in tiers) > 1:
        raise ValueError("Expected at least one tier, and at most one with names=None.")
    if slow_gradients not in ("skip", "accumulate"):
        raise ValueError(f'slow_gradients should be "skip" or "accumulate", got {slow_gradients!r}')
    if accumulate not in ("mean", "sum"):
        raise ValueError(f'accumulate should be "mean" or "sum", got {accumulate!r}')
    if not 0.0 <= max_grad_norm < math.inf:
        raise ValueError(f"max_grad_norm should be >=0, {max_grad_norm} was provided instead")


def refuse_reserved_names(names: Iterable[str]) -> None:
    """Raise ValueError for parameter names that the optimizer's state uses itself."""
    taken = [name for name in names if name.split(".")[0] in RESERVED_NAMES]
    if taken:
        raise ValueError(f"Parameters may not be named {taken}: the optimizer's state is.")


def tier_of_each_parameter(tiers: Sequence[Tier], names: Iterable[str]) -> dict[str, int]:
    """Return the index of the tier that every parameter name belongs to.

    A tier is a group of parameters that are updated together. Raises ValueError for a tier that
    names an unknown parameter and for a parameter in two tiers. A parameter that no tier names goes
    to the tier with names=None, else, with a warning, to the slowest.
    """
    known = list(names)
    owners: dict[str, int] = {}
    for index, tier in enumerate(tiers):
        for name in sorted(tier.names or ()):
            if name in owners:
                raise ValueError(f"{name} is in tier {owners[name]} and in tier {index}.")
            owners[name] = index
    unknown = sorted(owners.keys() - set(known))
    if unknown:
        raise ValueError(
            f"Tiers name {len(unknown)} unknown parameters: {unknown[:3]}. The trainable ones look "
            f"like {known[:3]}; call init with the whole trainable tree."
        )
    orphans = [name for name in known if name not in owners]
    rest = next((i for i, tier in enumerate(tiers) if tier.names is None), None)
    if rest is None and orphans:
        rest = max(range(len(tiers)), key=lambda i: (tiers[i].frequency, i))
        warnings.warn(f"No tier names {orphans[:8]}: updated in tier {rest}.", stacklevel=4)
    return owners | {name: rest for name in orphans if rest is not None}


def new_counters(tiers: Sequence[Tier], step: mx.array) -> dict[str, mx.array]:
    """Return the counters of an optimizer after `step` steps without skipped updates.

    uint64 arrays of shape (tiers,): `updates` applied, updates `skipped` for non-finite gradients,
    and gradients `gathered` in the open chunk. Scalars: `nonfinite_in_a_row`, and `grad_norm`, the
    global L2 norm before clipping of the gradients that were due last.
    """
    zeros = mx.zeros(len(tiers), mx.uint64)
    return {
        "updates": mx.stack([step // tier.frequency for tier in tiers]).astype(mx.uint64),
        "skipped": zeros,
        "gathered": zeros,
        "nonfinite_in_a_row": mx.array(0, mx.uint64),
        "grad_norm": mx.array(0.0),
        "layout": mx.array(STATE_LAYOUT_VERSION, mx.uint32),
    }


def require_current_layout(layout: mx.array | None) -> None:
    """Raise DamagedError unless an optimizer state has the present layout number.

    layout: None in states of the first layout, which had no number.
    """
    number = 1 if layout is None else layout.item()
    if number != STATE_LAYOUT_VERSION:
        raise DamagedError(
            f"This optimizer state has layout {number}, of another release; this one reads "
            f"layout {STATE_LAYOUT_VERSION}. Continue with the release that wrote it, or start a "
            "new run."
        )


def flags_to_counts(flags: Mapping[int, mx.array], tiers: int) -> mx.array:
    """Convert flags of some tiers to a uint64 vector of 0 and 1 over all tiers.

    flags: by tier; a missing tier counts 0.
    """
    absent = mx.array(False)
    return mx.stack([flags.get(i, absent) for i in range(tiers)]).astype(mx.uint64)


def update_counters(
    counters: dict[str, mx.array],
    due: Mapping[int, mx.array],
    applied: Mapping[int, mx.array],
    finite: mx.array,
    norm: mx.array,
) -> None:
    """Count one step in place: updates applied, updates due but skipped, and the gradient norm.

    All are arrays, known when the step is computed.

    counters: `updates`, `skipped` and `gathered` (gradients accumulated since the last update) by
        tier; `nonfinite_in_a_row` steps and `grad_norm` of the last step.
    due, applied: flags by tier. finite: whether all gradients in use were finite.
    """
    tiers = counters["updates"].size
    done = flags_to_counts(applied, tiers)
    left_out = {i: is_due & mx.logical_not(applied[i]) for i, is_due in due.items()}
    skipped = flags_to_counts(left_out, tiers)
    row = counters["nonfinite_in_a_row"]
    counters["updates"] = counters["updates"] + done
    counters["skipped"] = counters["skipped"] + skipped
    counters["gathered"] = mx.where(done > 0, mx.zeros_like(done), counters["gathered"])
    counters["nonfinite_in_a_row"] = mx.where(finite, mx.zeros_like(row), row + 1)
    counters["grad_norm"] = norm


def read_tier_stats(
    tiers: Sequence[Tier],
    owners: Mapping[str, int],
    specs: Mapping[str, ArraySpec],
    counters: Mapping[str, mx.array],
) -> list[TierStats]:
    """Return the size and the counters of each tier; reads the counters from the device.

    owners: the tier of each parameter. specs: its shape and dtype. counters: from
        `new_counters`.
    """
    updates: Any = counters["updates"].tolist()
    skipped: Any = counters["skipped"].tolist()
    stats = []
    for i, tier in enumerate(tiers):
        sizes = [math.prod(specs[name][0]) for name, owner in owners.items() if owner == i]
        stats.append(TierStats(i, tier.frequency, len(sizes), sum(sizes), updates[i], skipped[i]))
    return stats
