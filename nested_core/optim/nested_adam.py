"""Adam and AdamW whose parameters are updated on different clocks, in place of mlx's own.

With one tier of frequency 1 every weight and moment is bit for bit what mlx.optimizers gives.
Everything is decided by `where` on the device, so one trace is right at every step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_map_with_path

from nested_core.optim.adam import AdamRule, decayed, returning_arrays
from nested_core.optim.clock import (
    COUNTERS,
    Tier,
    TierStats,
    as_counts,
    check_tiers,
    count_step,
    find_owners,
    new_counters,
    refuse_reserved,
    tier_stats,
)
from nested_core.optim.gradients import (
    Flags,
    Flat,
    Kind,
    Leaves,
    all_finite,
    check_bound,
    check_gradients,
    clip_factor,
    due_norm,
    finite_where_used,
    flatten_gradients,
    gathering_leaves,
    group_by_tier,
    leaf_states,
)
from nested_core.optim.pytree import flatten


class NestedAdam(Optimizer):
    r"""Adam (Kingma and Ba, 2015) with one clock a tier; the formula is mlx.optimizers.Adam's.

    A tier of frequency f is due at step n when n % f == 0. Where it is not due its parameters and
    moments stay as they are. Bias correction runs on the tier's own update count, a schedule on the
    training step. A step with a non-finite gradient in use, or one that would make a sum of
    gathered gradients so, advances the clock and nothing else.

    Args:
        learning_rate: a float, an mlx schedule, or any callable step -> rate (step from 0).
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        weight_decay: of NestedAdamW, for every tier that does not give its own.
        bias_correction: whether moments are divided by 1 - beta**updates.
        tiers: the clocks, fastest first.
        slow_gradients: "skip" uses the gradient of the due step alone; "accumulate" gathers the
            gradients of the whole chunk (the Continuum Memory System, arXiv 2512.24695, eq. 71).
        accumulate: a chunk is applied as the "mean" or as the "sum" of its gradients.
        max_grad_norm: bound on the global L2 norm of the gradients about to be applied; 0 is off.

    State: mlx's tree (`m` and `v` a parameter, `step`, `learning_rate`), `sum` for a parameter
    whose gradients are gathered, and the counters of all tiers (`clocks.new_counters`).
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], Any],
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        bias_correction: bool = False,
        *,
        tiers: Sequence[Tier] = (Tier(),),
        slow_gradients: Literal["skip", "accumulate"] = "skip",
        accumulate: Literal["mean", "sum"] = "mean",
        max_grad_norm: float = 0.0,
    ) -> None:
        super().__init__()
        check_bound(max_grad_norm)
        check_tiers(tiers, slow_gradients, accumulate, decays=isinstance(self, NestedAdamW))
        b1, b2 = betas
        self.rule = AdamRule((b1, b2), eps, bias_correction)
        self.tiers, self.max_grad_norm = tuple(tiers), max_grad_norm
        self.gathers, self.accumulate = slow_gradients == "accumulate", accumulate
        self._tier_of: dict[str, int] = {}
        self._kinds: dict[str, Kind] = {}
        self._maybe_schedule("learning_rate", returning_arrays(learning_rate))

    def init(self, parameters: dict[str, Any]) -> None:
        """Make the state for the whole tree of trainable parameters and give each its tier.

        Raises ValueError for a float16 parameter, for one whose name the state needs itself, and
        for tiers that do not fit the parameters (`clocks.find_owners`).
        """
        self.rule.refuse_float16(flatten(parameters))
        self._init_state(parameters)

    def _init_state(self, parameters: Any) -> None:
        """Reached without `init` from the first gradients, where, as in mlx, float16 passes."""
        flat = flatten(parameters)
        refuse_reserved(flat)
        self._tier_of = find_owners(self.tiers, flat)
        self._kinds = {name: (value.shape, value.dtype) for name, value in flat.items()}
        super().init(parameters)
        if self.tiers != (Tier(),):  # a drop-in's state is mlx's to the leaf until its first step
            self.state.setdefault(COUNTERS, new_counters(self.tiers, self.step))
        for name, leaf in leaf_states(parameters, self.state).items():
            if self._gathers(self._tier_of[name]):
                leaf.setdefault("sum", mx.zeros_like(flat[name]))

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Zero moments of the parameter's shape and dtype."""
        state["m"] = mx.zeros_like(parameter)
        state["v"] = mx.zeros_like(parameter)

    def due_tiers(self, step: int | None = None) -> tuple[int, ...]:
        """The tiers due at `step` (from 1), or at the next step; not to be asked inside a trace."""
        n = int(self.step.item()) + 1 if step is None else step
        return tuple(i for i, tier in enumerate(self.tiers) if n % tier.frequency == 0)

    def apply_gradients(self, gradients: Any, parameters: Any) -> Any:
        """Advance the clock by one step; return every given parameter, updated where it is due.

        `gradients` is a tree of arrays with the shapes and dtypes of `parameters`, which may hold
        more. A tier that is not due may be left out under "skip", but only whole. Raises
        ValueError, naming the parameters, where the trees do not fit.
        """
        flat = flatten_gradients(gradients)
        if not self._initialized:
            self._init_state(gradients)
        values = flatten(parameters)
        check_gradients(flat, values, self._kinds)
        self.state.setdefault(COUNTERS, new_counters(self.tiers, self.step))  # before it moves on
        groups = group_by_tier(flat, self._tier_of, every_tier=self.gathers)
        leaves = leaf_states(gradients, self.state)
        for name, schedule in self._schedulers.items():
            self.state[name] = schedule(self.step)
        self.state["step"] = self.step + 1
        due = {i: self.step % self.tiers[i].frequency == 0 for i in groups}
        unused = {i: mx.logical_not(is_due) for i, is_due in due.items() if not self._gathers(i)}
        finite = self._gather(flat, leaves, finite_where_used(groups, unused))
        ready = {name: self._ready(name, flat, leaf) for name, leaf in leaves.items()}
        updated = self._apply(ready, values, leaves, due, finite)
        return tree_map_with_path(lambda name, _: updated[name], gradients)

    def flush(self, parameters: Any) -> Any:
        """Apply the chunks of gathered gradients that are still open; the clock stays.

        `parameters` may hold more than those. Raises ValueError for one that is not as at `init`.
        """
        if not self._initialized:
            self._init_state(parameters)
        values = flatten(parameters)
        gathering = {n: self._kinds[n] for n, tier in self._tier_of.items() if self._gathers(tier)}
        leaves = leaf_states(gathering_leaves(values, gathering), self.state)
        gathered = self._counters["gathered"]
        open_chunks = {i: gathered[i] > 0 for i in {self._tier_of[name] for name in leaves}}
        ready = {name: self._ready(name, {}, leaf) for name, leaf in leaves.items()}
        updated = self._apply(ready, values, leaves, open_chunks, mx.array(True))
        return tree_map_with_path(lambda name, value: updated.get(name, value), parameters)

    def get_tier_stats(self) -> list[TierStats]:
        """What each tier holds, and its updates so far; reads the counters from the device."""
        return tier_stats(self.tiers, self._tier_of, self._kinds, self._counters)

    @property
    def _counters(self) -> Any:
        return self.state.get(COUNTERS) or new_counters(self.tiers, self.step)

    def _gathers(self, tier: int) -> bool:
        return self.gathers and self.tiers[tier].frequency > 1

    def _gather(self, flat: Flat, leaves: Leaves, finite: mx.array) -> mx.array:
        """Add to the open chunks; return whether the gradients, and now the sums, are finite."""
        sums = {name: leaf["sum"] + flat[name] for name, leaf in leaves.items() if "sum" in leaf}
        finite = mx.logical_and(finite, all_finite(sums.values()))
        added = as_counts({self._tier_of[name]: finite for name in sums}, len(self.tiers))
        self._counters["gathered"] = self._counters["gathered"] + added
        for name, total in sums.items():
            leaves[name]["sum"] = mx.where(finite, total, leaves[name]["sum"])
        return finite

    def _ready(self, name: str, flat: Flat, leaf: dict[str, mx.array]) -> mx.array:
        """The gradient that would be applied now."""
        if "sum" not in leaf:
            return flat[name]
        if self.accumulate == "sum":
            return leaf["sum"]
        count: mx.array = self._counters["gathered"][self._tier_of[name]]
        return leaf["sum"] / count.astype(leaf["sum"].dtype)

    def _apply(
        self, ready: Flat, values: Flat, leaves: Leaves, due: Flags, finite: mx.array
    ) -> Flat:
        """Clip what is ready, update every parameter that is due and finite, and count."""
        norm = due_norm(group_by_tier(ready, self._tier_of), due)
        if self.max_grad_norm > 0:
            finite = mx.logical_and(finite, mx.isfinite(norm))  # squares overflow before values
            factor = clip_factor(norm, self.max_grad_norm)
            ready = {name: g * factor.astype(g.dtype) for name, g in ready.items()}
        applied = {i: mx.logical_and(is_due, finite) for i, is_due in due.items()}
        updated = {}
        for name, leaf in leaves.items():
            tier = self._tier_of[name]
            new = self._update(ready[name], values[name], leaf, tier)
            for key, value in leaf.items():
                leaf[key] = mx.where(applied[tier], new[key], value)
            updated[name] = mx.where(applied[tier], new["parameter"], values[name])
        count_step(self._counters, due, applied, finite, norm)
        return updated

    def _update(
        self, gradient: mx.array, parameter: mx.array, leaf: dict[str, mx.array], tier: int
    ) -> dict[str, mx.array]:
        """The parameter and its state after an update; a chunk of gathered gradients is emptied."""
        scale = self.tiers[tier].learning_rate_scale
        rate = self.learning_rate.astype(gradient.dtype)
        rate = rate if scale == 1.0 else rate * scale
        count = self._counters["updates"][tier] + 1
        start = decayed(parameter, rate, self._weight_decay(tier))
        return self.rule.update(start, gradient, leaf, rate, count) | {"sum": mx.zeros_like(start)}

    def _weight_decay(self, tier: int) -> float | None:
        return None


class NestedAdamW(NestedAdam):
    """NestedAdam with decoupled weight decay (Loshchilov and Hutter, 2019), on due steps only."""

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], Any],
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = False,
        **nested: Any,
    ) -> None:
        super().__init__(learning_rate, betas, eps, bias_correction, **nested)
        self.weight_decay = weight_decay

    def _weight_decay(self, tier: int) -> float:
        own = self.tiers[tier].weight_decay
        return self.weight_decay if own is None else own
