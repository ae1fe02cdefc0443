"""Tiers and optimizers of the benchmarks without a configuration; nested_core and mlx alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

from nested_core.models.parameters import ParameterRefs, read_parameters
from nested_core.optim.tier_assignment import TierMap
from nested_core.optim.tier_counters import Tier
from nested_core.optim.tiered import NestedAdam
from nested_core.training.parameter_packing import unflatten_names

FREQUENCIES = (1, 2, 4)


def optimizer_for(
    tiers: TierMap,
    refs: ParameterRefs,
    rate: float,
    scales: Sequence[float] | None = None,
    slow_gradients: Literal["skip", "accumulate"] = "skip",
) -> NestedAdam:
    """The NestedAdam of a configuration with these settings (training/training_setup.py)."""
    each = scales or (1.0,) * len(tiers.frequencies)
    clocks = [Tier(f, tiers.names(i), each[i]) for i, f in enumerate(tiers.frequencies)]
    optimizer = NestedAdam(rate, tiers=clocks, slow_gradients=slow_gradients)
    optimizer.init(unflatten_names(read_parameters(refs)))
    return optimizer


def one_tier(refs: ParameterRefs) -> TierMap:
    """Everything at every step."""
    return TierMap((1,), dict.fromkeys(refs, 0))


def thirds(refs: ParameterRefs, layers: int, *, deep: bool) -> TierMap:
    """[1, 2, 4] over thirds of a model's layers; `deep` is for the deepest as the fast ones."""
    third = {name: min(2, 3 * at // layers) for name, at in depths(refs).items()}
    return TierMap(FREQUENCIES, {name: 2 - at if deep else at for name, at in third.items()})


def depths(refs: ParameterRefs) -> Mapping[str, int]:
    """The number of the layer that each tensor is in."""
    return {name: int(name.split("layers.")[1].split(".")[0]) for name in refs}
