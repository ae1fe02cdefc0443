"""One training step as a pure function, compiled once for each set of due tiers.

The gradient is taken with respect to the due parameters alone, so that the backward pass ends at
the lowest layer that is due. The model is borrowed: after a step it holds what it held before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from nested_core.pytree import flatten
from nested_core.single_clock import TieredOptimizer
from nested_core.slots import Slots, borrowed, put
from nested_core.tiers import TierMap
from nested_core.training.losses import LossRule

Flat = dict[str, mx.array]
MicroBatch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]  # tokens; what the loss masks by
Sums = dict[str, mx.array]


@dataclass(frozen=True)
class StepResult:
    """What a step computed, not yet evaluated.

    `micro` holds `loss`, `weight` and `tokens` of each micro-batch; `updates` the new value of each
    due parameter, by name, and nothing where the step was left incomplete.
    """

    micro: list[Sums]
    updates: Flat


class TrainStep:
    """Runs optimizer steps; each is one or more micro-batches and one call of the optimizer."""

    def __init__(
        self,
        model: nn.Module,
        slots: Slots,
        optimizer: TieredOptimizer,
        tiers: TierMap,
        rule: LossRule,
        *,
        draws: bool,
    ) -> None:
        self._model, self._slots, self._optimizer = model, slots, optimizer
        self._tiers, self._rule = tiers, rule
        self._captured = [optimizer.state, mx.random.state] if draws else [optimizer.state]
        self._compiled: dict[tuple[int, ...], Callable[..., Any]] = {}

    def run(
        self, params: Flat, batches: Sequence[MicroBatch], due: tuple[int, ...], *, complete: bool
    ) -> StepResult:
        """Take the gradients of the due tiers over all micro-batches; if `complete`, apply them."""
        if due not in self._compiled:
            self._compiled[due] = self._compile(due)
        step = self._compiled[due]
        micro: list[Sums] = []
        carried, updates = None, {}
        with borrowed(self._slots):
            for index, (tokens, mask) in enumerate(batches):
                is_last = complete and index == len(batches) - 1
                batch = mx.array(tokens), mx.array(mask)
                sums, carried, updates = step(params, carried, *batch, is_last)
                micro.append(sums)
        return StepResult(micro, updates)

    def _compile(self, due: tuple[int, ...]) -> Callable[..., Any]:
        names = frozenset[str]().union(*(self._tiers.names(tier) for tier in due))

        def step(
            params: Flat, carried: Any, tokens: mx.array, mask: mx.array, is_last: bool
        ) -> tuple[Sums, Any, Flat]:
            wanted = {name: value for name, value in params.items() if name in names}
            put(self._slots, params)
            (loss, count), gradients = mx.value_and_grad(self._loss)(wanted, tokens, mask)
            weight = self._rule.weight(count)
            micro = {"loss": loss, "weight": weight, "tokens": count}
            if carried is not None:
                gradients = {n: g + carried["gradients"][n] for n, g in gradients.items()}
                weight = carried["weight"] + weight
            if not is_last:
                return micro, {"gradients": gradients, "weight": weight}, {}
            return micro, None, self._apply(gradients, weight, wanted)

        return mx.compile(step, inputs=self._captured, outputs=self._captured)

    def _loss(self, wanted: Flat, tokens: mx.array, mask: mx.array) -> tuple[mx.array, mx.array]:
        put(self._slots, wanted)
        return self._rule.function(self._model, tokens, mask)

    def _apply(self, gradients: Flat, weight: mx.array, wanted: Flat) -> Flat:
        mean = {name: g / weight.astype(g.dtype) for name, g in gradients.items()}
        return flatten(self._optimizer.apply_gradients(nested(mean), nested(wanted)))


def nested(flat: Flat) -> Any:
    """A flat dictionary of dotted names as the tree that the optimizer's state mirrors."""
    return tree_unflatten(list(flat.items())) if flat else {}
