"""Any optimizer of mlx as one tier of frequency 1, with the trainer's guarantees around it.

Its formula and state stay its own, to the bit; a step with a non-finite gradient advances the clock
and changes nothing else, and is counted.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_map_with_path

from nested_core.optim.clock import COUNTERS, Tier, TierStats, count_step, new_counters, tier_stats
from nested_core.optim.gradients import (
    Kind,
    check_bound,
    check_gradients,
    clip_factor,
    due_norm,
    finite_where_used,
    flatten_gradients,
    group_by_tier,
)
from nested_core.optim.nested_adam import NestedAdam
from nested_core.optim.pytree import flatten


class SingleClock(Optimizer):
    """An mlx optimizer (muon, sgd, adafactor ...) that updates all its parameters at every step.

    Args:
        inner: the optimizer; its state is this one's, with our counters beside it.
        max_grad_norm: bound on the global L2 norm of the gradients; 0 is off.
    """

    gathers = False

    def __init__(self, inner: Optimizer, *, max_grad_norm: float = 0.0) -> None:
        self.inner, self.max_grad_norm = inner, max_grad_norm
        self.tiers = (Tier(),)
        self._kinds: dict[str, Kind] = {}
        check_bound(max_grad_norm)

    @property
    def state(self) -> Any:
        """The inner optimizer's state, and the counters under "nested"."""
        return self.inner.state

    @state.setter
    def state(self, state: Any) -> None:
        self.inner.state = state

    def init(self, parameters: dict[str, Any]) -> None:
        """Make the state for the whole tree of trainable parameters."""
        flat = flatten(parameters)
        self._kinds = {name: (value.shape, value.dtype) for name, value in flat.items()}
        self.inner.init(parameters)
        self.state.setdefault(COUNTERS, new_counters(self.tiers, self.state["step"]))

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """One step: every parameter updated by the inner optimizer, or none.

        Raises ValueError, naming the parameters, where the trees do not fit.
        """
        flat = flatten_gradients(gradients)
        check_gradients(flat, flatten(parameters), self._kinds)
        groups, due = group_by_tier(flat, dict.fromkeys(self._kinds, 0)), {0: mx.array(True)}
        finite, norm = finite_where_used(groups, {}), due_norm(groups, due)
        if self.max_grad_norm > 0:
            finite = mx.logical_and(finite, mx.isfinite(norm))
            factor = clip_factor(norm, self.max_grad_norm)
            gradients = tree_map_with_path(lambda _, g: g * factor.astype(g.dtype), gradients)
        before: dict[str, dict[str, mx.array]] = {}
        tree_map_with_path(lambda n, _, leaf: before.update({n: dict(leaf)}), gradients, self.state)
        updated = self.inner.apply_gradients(gradients, parameters)

        def choose(name: str, new: mx.array, old: mx.array, leaf: dict[str, mx.array]) -> mx.array:
            for key, value in before[name].items():
                leaf[key] = mx.where(finite, leaf[key], value)
            return mx.where(finite, new, old)

        chosen = tree_map_with_path(choose, updated, parameters, self.state)
        count_step(self.state[COUNTERS], due, {0: finite}, finite, norm)
        return chosen

    def get_tier_stats(self) -> list[TierStats]:
        """What the one tier holds, and its updates so far; reads the counters from the device."""
        owners = dict.fromkeys(self._kinds, 0)
        return tier_stats(self.tiers, owners, self._kinds, self.state[COUNTERS])


TieredOptimizer = NestedAdam | SingleClock
"""What the trainer drives: both know their tiers, count their updates and skip a broken step."""
