"""Any mlx optimizer with tiers: groups of parameters that are updated at different frequencies.

`NestedAdam` and `NestedAdamW` are Adam and AdamW with tiers; with one tier of frequency 1 every
weight and moment is bit for bit that of mlx.optimizers. Every choice is a `where` on the device, so
that one compiled step is right at every step count.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal

import mlx.core as mx
from mlx import optimizers
from mlx.optimizers import Optimizer
from mlx.utils import tree_map_with_path, tree_unflatten

from nested_core.optim import tier_counters
from nested_core.optim.gradients import (
    HAD_GRADIENT,
    ArraySpec,
    Flags,
    Flat,
    StateByParameter,
    all_finite,
    check_flushed_parameters,
    check_gradients,
    clip_gradients,
    flatten_gradients,
    group_gradients_by_tier,
    norm_of_due_gradients,
    optimizer_state_by_parameter,
    shapes_and_dtypes,
    used_gradients_finite,
)
from nested_core.optim.named_updates import flatten
from nested_core.optim.tier_counters import COUNTERS_KEY, Tier, TierStats

# Each element's update depends on that element alone, so tensors may be joined into one vector.
ELEMENTWISE_OPTIMIZERS = (
    optimizers.SGD,
    optimizers.RMSprop,
    optimizers.Adagrad,
    optimizers.AdaDelta,
    optimizers.Adam,
    optimizers.AdamW,
    optimizers.Adamax,
    optimizers.Lion,
)


class Tiered(Optimizer):
    """Any mlx optimizer with tiers; a tier of frequency f is updated at the steps n % f == 0.

    Each tier has its own inner optimizer, which counts its tier's own updates (bias correction,
    Adafactor's decay). A learning rate schedule is evaluated at the training step. A step with a
    non-finite gradient or sum of gradients advances the step count and changes nothing else.

    Args:
        make_optimizer: returns a new inner optimizer, as `lambda: Muon(1e-3)`; called once a tier.
        tiers: the tiers, fastest first.
        slow_gradients: "skip" uses the gradient of the due step alone; "accumulate" those of the
            whole chunk (arXiv 2512.24695, eq. 71), as their "mean" or "sum" (`accumulate`).
        max_grad_norm: bound on the global L2 norm of the gradients about to be applied; 0 is off.

    Raises ValueError for invalid tiers or options, and for a tier's weight_decay or
    learning_rate_scale that the inner optimizer does not use.

    State: mlx's tree; `sum` for a parameter whose gradients are accumulated; `had_gradient` for one
        without a second moment; and the counters of all tiers (`tier_counters.new_counters`).
    """

    def __init__(
        self,
        make_optimizer: Callable[[], Optimizer],
        tiers: Sequence[Tier] = (Tier(),),
        *,
        slow_gradients: Literal["skip", "accumulate"] = "skip",
        accumulate: Literal["mean", "sum"] = "mean",
        max_grad_norm: float = 0.0,
    ) -> None:
        """Create the optimizer, with an inner optimizer of mlx for each tier.

        make_optimizer: returns a new inner optimizer. tiers: each one's parameters and how many
            steps apart they are updated.
        slow_gradients: whether the gradients between two updates of a tier are skipped, or
            accumulated as their mean or sum (`accumulate`).
        max_grad_norm: gradients are clipped to this norm; 0 clips nothing.

        Raises ValueError for unusable arguments.
        """
        super().__init__()
        tier_counters.check_tiered_options(tiers, slow_gradients, accumulate, max_grad_norm)
        # What was asked for
        self.tiers = tuple(tiers)
        self.accumulates = slow_gradients == "accumulate"
        self.accumulate = accumulate
        self.max_grad_norm = max_grad_norm
        # The inner optimizers are used for their formulas and constants; the state of all is here
        self.optimizers = tuple(_make_inner_optimizer(make_optimizer, tier) for tier in tiers)
        first = self.optimizers[0]
        # Settings that mlx keeps as arrays in the state, such as the learning rate
        self._scalars = [name for name in first.state if name != "step"]
        self._schedulers = dict(first._schedulers)
        self.state.update({name: _to_array(first.state[name]) for name in self._scalars})
        # Known from `init` on
        self._tier_of: dict[str, int] = {}
        self._specs: dict[str, ArraySpec] = {}

    @property
    def is_elementwise(self) -> bool:
        """Whether the tensors of a tier may be joined into one vector without changing a bit."""
        return all(type(inner) in ELEMENTWISE_OPTIMIZERS for inner in self.optimizers)

    def init(self, parameters: dict[str, Any]) -> None:
        """Create the state for the whole tree of trainable parameters and assign each to its tier.

        Raises ValueError for a float16 parameter if the inner optimizer divides by its `eps`, for a
        parameter whose name the state uses itself, and for tiers that do not fit the parameters
        (`tier_of_each_parameter`); DamagedError for a state of another layout.
        """
        if COUNTERS_KEY in self.state:
            tier_counters.require_current_layout(self.state[COUNTERS_KEY].get("layout"))
        eps = getattr(self.optimizers[0], "eps", None)
        half = [name for name, value in flatten(parameters).items() if value.dtype == mx.float16]
        if half and isinstance(eps, float):
            raise ValueError(
                f"Parameters {half[:3]} are float16: eps={eps} is 0 there, and a zero "
                f"gradient gives NaN. Keep trainable parameters in float32 or bfloat16."
            )
        self._init_state(parameters)

    def _init_state(self, parameters: Any) -> None:
        """Create the state and assign each parameter to its tier, without the check for float16.

        Beside mlx's own state a parameter gets, where it is needed, the sum of its accumulated
        gradients, and a mark whether it ever had a gradient. `apply_gradients` calls it if `init`
        was not called; like mlx it then accepts float16.
        """
        flat = flatten(parameters)
        tier_counters.refuse_reserved_names(flat)
        self._tier_of = tier_counters.tier_of_each_parameter(self.tiers, flat)
        self._specs = shapes_and_dtypes(flat)
        super().init(parameters)
        if self.tiers != (Tier(),):  # a drop-in's state is mlx's to the leaf until its first step
            self.state.setdefault(COUNTERS_KEY, tier_counters.new_counters(self.tiers, self.step))
        for name, leaf in optimizer_state_by_parameter(parameters, self.state).items():
            if not {"m", "v"} <= leaf.keys():  # the v of SGD and Muon holds weight decay, too
                leaf.setdefault(HAD_GRADIENT, mx.array(0, mx.uint32))
            if self._accumulates(self._tier_of[name]):
                leaf.setdefault("sum", mx.zeros_like(flat[name]))

    def init_single(self, parameter: mx.array, state: dict[str, mx.array]) -> None:
        """Create the inner optimizer's state of one parameter."""
        self.optimizers[0].init_single(parameter, state)

    def due_tiers(self, step: int | None = None) -> tuple[int, ...]:
        """Return the tiers due at `step` (from 1), or at the next step if it is None.

        Do not call it inside a traced function: it reads the step count from the device.
        """
        n = int(self.step.item()) + 1 if step is None else step
        return tuple(i for i, tier in enumerate(self.tiers) if n % tier.frequency == 0)

    def apply_gradients(self, gradients: object, parameters: Any) -> Any:
        """Perform one optimizer step; return every parameter with a gradient, updated if it is due.

        gradients: a tree of arrays with the shapes and dtypes of `parameters`, which may have more
            leaves. A tier that is not due may be left out under "skip", but only as a whole.

        Raises ValueError, naming the parameters, if the trees do not fit.
        """
        flat = flatten_gradients(gradients)
        if not self._initialized:
            self._init_state(gradients)
        values = flatten(parameters)
        check_gradients(flat, values, self._specs)
        # With one tier of everything the state is mlx's own until here; its counters begin now.
        self.state.setdefault(COUNTERS_KEY, tier_counters.new_counters(self.tiers, self.step))
        # Advance schedules and the step count
        groups = group_gradients_by_tier(flat, self._tier_of, every_tier=self.accumulates)
        leaves = optimizer_state_by_parameter(gradients, self.state)
        for name, schedule in self._schedulers.items():
            self.state[name] = _to_array(schedule(self.step))
        self.state["step"] = self.step + 1
        # Which tiers are due, and whether the gradients that count are finite
        due = {i: self.step % self.tiers[i].frequency == 0 for i in groups}
        idle = {i: mx.logical_not(is_due) for i, is_due in due.items() if not self._accumulates(i)}
        finite = self._accumulate_gradients(flat, leaves, used_gradients_finite(groups, idle))
        combined = self._new_or_accumulated_gradients(flat, leaves)
        updated = self._apply_to_ready_tiers(
            combined, values, leaves, due=due, ready=due, finite=finite
        )
        return tree_map_with_path(lambda name, _: updated[name], gradients)

    def flush(self, parameters: Any) -> Any:
        """Apply the accumulated gradients of chunks that are still open, without counting a step.

        A chunk is the steps from one update of a tier to the next, whose gradients it accumulates.
        Call it once, when training ends. A tier whose chunk is open but has no finite gradient
        counts a skipped update. `parameters` may have more leaves than those with accumulated
        gradients. Raises ValueError for one whose shape or dtype is not that of `init`.
        """
        if not self._initialized:
            self._init_state(parameters)
        values = flatten(parameters)
        specs = {n: self._specs[n] for n, tier in self._tier_of.items() if self._accumulates(tier)}
        check_flushed_parameters(values, specs)
        leaves = optimizer_state_by_parameter(
            tree_unflatten([(name, values[name]) for name in specs]) if specs else {}, self.state
        )
        # A tier's chunk is open between two of its updates, and may have no finite gradient
        gathered = self._tier_counters["gathered"]
        tiers = {self._tier_of[name] for name in leaves}
        is_open = {i: self.step % self.tiers[i].frequency != 0 for i in tiers}
        has_chunk = {i: mx.logical_and(is_open[i], gathered[i] > 0) for i in tiers}
        chunks = self._new_or_accumulated_gradients({}, leaves)
        updated = self._apply_to_ready_tiers(
            chunks, values, leaves, due=is_open, ready=has_chunk, finite=mx.array(True)
        )
        return tree_map_with_path(lambda name, value: updated.get(name, value), parameters)

    def get_tier_stats(self) -> list[TierStats]:
        """Return the size of each tier and its updates so far.

        Reads the counters from the device.
        """
        return tier_counters.read_tier_stats(
            self.tiers, self._tier_of, self._specs, self._tier_counters
        )

    @property
    def _tier_counters(self) -> Any:
        """The counters of all tiers, from the state or new ones."""
        return self.state.get(COUNTERS_KEY) or tier_counters.new_counters(self.tiers, self.step)

    def _accumulates(self, tier: int) -> bool:
        """Return whether a tier accumulates gradients between its updates."""
        return self.accumulates and self.tiers[tier].frequency > 1

    def _accumulate_gradients(
        self, flat: Flat, leaves: StateByParameter, finite: mx.array
    ) -> mx.array:
        """Add gradients to the sums of open chunks; return a flag whether all are finite.

        finite: whether the gradients are finite; if they or the new sums are not, no sum changes.
        """
        sums = {name: leaf["sum"] + flat[name] for name, leaf in leaves.items() if "sum" in leaf}
        finite = mx.logical_and(finite, all_finite(sums.values()))
        added = tier_counters.flags_to_counts(
            {self._tier_of[name]: finite for name in sums}, len(self.tiers)
        )
        self._tier_counters["gathered"] = self._tier_counters["gathered"] + added
        for name, total in sums.items():
            leaves[name]["sum"] = mx.where(finite, total, leaves[name]["sum"])
        return finite

    def _new_or_accumulated_gradients(self, flat: Flat, leaves: StateByParameter) -> Flat:
        """Return the gradients to apply: as given, or the mean or sum of an accumulated chunk."""
        combined = {}
        for name, leaf in leaves.items():
            combined[name] = leaf["sum"] if "sum" in leaf else flat[name]
            if "sum" in leaf and self.accumulate == "mean":
                count = self._tier_counters["gathered"][self._tier_of[name]]
                combined[name] = leaf["sum"] / count.astype(leaf["sum"].dtype)
        return combined

    def _apply_to_ready_tiers(
        self,
        gradients: Flat,
        values: Flat,
        leaves: StateByParameter,
        *,
        due: Flags,
        ready: Flags,
        finite: mx.array,
    ) -> Flat:
        """Clip the gradients, update the tiers that are `ready` if all are finite, and count.

        due, ready: flags by tier, arrays. Due is a tier whose update is scheduled now, ready one
            that has a gradient to be updated with. Due and not updated counts a skipped update.
        finite: whether the gradients in use are finite; else nothing is updated.
        leaves: the optimizer's state by parameter, which is changed.

        Returns every parameter with a gradient, updated or not.
        """
        groups = group_gradients_by_tier(gradients, self._tier_of)
        norm = norm_of_due_gradients(groups, ready)
        if self.max_grad_norm > 0:
            finite = mx.logical_and(finite, mx.isfinite(norm))  # squares overflow before values
            groups = clip_gradients(groups, norm, self.max_grad_norm)
        applied = {i: mx.logical_and(is_ready, finite) for i, is_ready in ready.items()}
        updated: Flat = {}
        for tier, group in groups.items():
            updated |= self._update_tier(tier, group, values, leaves, applied[tier])
        tier_counters.update_counters(self._tier_counters, due, applied, finite, norm)
        return updated

    def _update_tier(
        self, tier: int, gradients: Flat, values: Flat, leaves: StateByParameter, applies: mx.array
    ) -> Flat:
        """Return one tier's parameters after an update, or unchanged if `applies` is false.

        `applies` is an array, known only when the step is computed. So the update is always
        computed, and the old or the new value is chosen by it.

        tier: its index. gradients: of its parameters alone. values: of all parameters.
        leaves: the optimizer's state by parameter; the new state is written into it under the same
            condition.
        """
        inner = self._copy_inner_optimizer(tier, {name: leaves[name] for name in gradients})
        before = {name: values[name] for name in gradients}
        after = inner.apply_gradients(gradients, before)
        for name, gradient in gradients.items():
            leaf, new = leaves[name], inner.state[name]
            if "sum" in leaf:  # the accumulated gradient, which is used up by an update
                new["sum"] = mx.zeros_like(gradient)
            if HAD_GRADIENT in leaf:
                mark, is_nonzero = leaf[HAD_GRADIENT], gradient != 0
                if mark.shape != gradient.shape:  # a packed vector has a mark an element
                    is_nonzero = mx.any(is_nonzero)
                new[HAD_GRADIENT] = mx.maximum(mark, is_nonzero)
            for part, value in new.items():
                if value is not leaf[part]:
                    leaf[part] = mx.where(applies, value, leaf[part])
        return {name: mx.where(applies, after[name], before[name]) for name in gradients}

    def _copy_inner_optimizer(self, tier: int, leaves: StateByParameter) -> Optimizer:
        """Return a copy of a tier's inner optimizer with the tier's update count and state.

        Its schedules are removed, because they were already evaluated at the training step.
        """
        inner = copy.copy(self.optimizers[tier])
        inner._schedulers = {}
        scalars = {name: self.state[name] for name in self._scalars}
        scale = self.tiers[tier].learning_rate_scale
        if scale != 1.0:
            scalars["learning_rate"] = scalars["learning_rate"] * scale
        count = {"step": self._tier_counters["updates"][tier]}
        inner.state = count | scalars | {name: dict(leaf) for name, leaf in leaves.items()}
        return inner


class NestedAdam(Tiered):
    """mlx.optimizers.Adam (Kingma and Ba, arXiv 1412.6980, algorithm 1) with tiers.

    Args:
        learning_rate: a float, an mlx schedule, or any callable step -> rate (step from 0).
        betas: decay rates of the two moments, each in [0, 1).
        eps: added to the denominator.
        bias_correction: whether moments are divided by 1 - beta**updates.

    The others are those of `Tiered`.
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
        """Create Adam with tiers: the arguments of mlx's Adam, then those of `Tiered`.

        tiers: each one's parameters and how many steps apart they are updated; the default is one
            tier of all parameters, updated at every step.
        """
        if any(getattr(tier, "weight_decay", None) is not None for tier in tiers):
            raise ValueError("A tier's weight_decay needs NestedAdamW; NestedAdam has no decay.")
        super().__init__(
            lambda: optimizers.Adam(learning_rate, list(betas), eps, bias_correction),
            tiers,
            slow_gradients=slow_gradients,
            accumulate=accumulate,
            max_grad_norm=max_grad_norm,
        )


class NestedAdamW(NestedAdam):
    """mlx.optimizers.AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2) with tiers.

    `weight_decay` is decoupled, acts on due steps only, and holds for every tier that does not set
    its own. The other arguments are those of `NestedAdam`.
    """

    def __init__(
        self,
        learning_rate: float | Callable[[mx.array], Any],
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        bias_correction: bool = False,
        **nested: Any,
    ) -> None:
        """Create AdamW with tiers: the arguments of mlx's AdamW, and in `nested` those of `Tiered`.

        These are tiers, slow_gradients, accumulate and max_grad_norm. `Tiered.__init__` is called
        by name to pass over the class in between, which would make an Adam.
        """
        Tiered.__init__(
            self,
            lambda: optimizers.AdamW(
                learning_rate, list(betas), eps, weight_decay, bias_correction
            ),
            **nested,
        )


def _make_inner_optimizer(make_optimizer: Callable[[], Optimizer], tier: Tier) -> Optimizer:
    """Create a tier's inner optimizer with the tier's weight decay.

    Raises ValueError if it has no weight decay or learning rate for the tier to change.
    """
    inner = make_optimizer()
    name = type(inner).__name__
    if tier.weight_decay is not None:
        if not hasattr(inner, "weight_decay"):
            raise ValueError(f"A tier has a weight_decay of its own; {name} has no weight_decay.")
        inner.weight_decay = tier.weight_decay
    has_rate = "learning_rate" in inner.state and not getattr(inner, "relative_step", False)
    if tier.learning_rate_scale != 1.0 and not has_rate:
        raise ValueError(
            f"A tier has a learning_rate_scale, but {name} computes its own step size, without "
            f"the learning rate, while its relative_step is true. Give relative_step=False."
        )
    return inner


def _to_array(value: Any) -> mx.array:
    """Convert a number to a float32 array; an array is returned as it is."""
    return value if isinstance(value, mx.array) else mx.array(value, mx.float32)
