"""One training step as a pure function, compiled once for each set of due tiers.

The gradient is taken with respect to the due parameters alone, so that the backward pass ends at
the lowest layer that is due. The model is borrowed: after a step it holds what it held before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from nested_core.model import Slots
from nested_core.optimizers import NestedAdam
from nested_core.tiers import TierMap
from nested_core.training.losses import supervised_loss

Flat = dict[str, mx.array]
MicroBatch = tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]


@contextmanager
def borrowed(slots: Slots) -> Iterator[None]:
    """Give the model its own leaves back, whatever the block puts in their place."""
    held = [(module, key, module[key]) for module, key in slots.values()]
    try:
        yield
    finally:
        for module, key, value in held:
            module[key] = value


def put(slots: Slots, values: Flat) -> None:
    """Place arrays, tracers included, in the model."""
    for name, value in values.items():
        module, key = slots[name]
        module[key] = value


class TrainStep:
    """Runs optimizer steps; each is one or more micro-batches and one call of the optimizer.

    The gradients of micro-batches are summed and divided by all their supervised tokens, so every
    token weighs the same however the batch was cut.
    """

    def __init__(
        self, model: nn.Module, slots: Slots, optimizer: NestedAdam, tiers: TierMap, *, draws: bool
    ) -> None:
        self._model, self._slots, self._optimizer, self._tiers = model, slots, optimizer, tiers
        self._captured = [optimizer.state, mx.random.state] if draws else [optimizer.state]
        self._compiled: dict[tuple[int, ...], Callable[..., dict[str, Any]]] = {}

    def run(self, params: Flat, batches: Sequence[MicroBatch], due: tuple[int, ...]) -> Any:
        """Advance the optimizer by one step.

        Returns a dict, not yet evaluated: `updates` (the new value of each due parameter, by name),
        `loss` (sum over supervised tokens) and `tokens` (their number).
        """
        step = self._compiled.get(due)
        if step is None:
            step = self._compiled[due] = self._compile(due)
        carried: dict[str, Any] | None = None
        with borrowed(self._slots):
            for index, (tokens, bounds) in enumerate(batches):
                is_last = index == len(batches) - 1
                carried = step(params, carried, mx.array(tokens), mx.array(bounds), is_last)
        return carried

    def _compile(self, due: tuple[int, ...]) -> Callable[..., dict[str, Any]]:
        names = frozenset[str]().union(*(self._tiers.names(tier) for tier in due))

        def step(
            params: Flat, carried: dict[str, Any] | None, tokens: Any, bounds: Any, is_last: bool
        ) -> dict[str, Any]:
            wanted = {name: value for name, value in params.items() if name in names}
            put(self._slots, params)
            (loss, count), gradients = mx.value_and_grad(self._loss)(wanted, tokens, bounds)
            total = {"loss": loss, "tokens": count, "gradients": gradients}
            total = total if carried is None else _added(carried, total)
            return self._finish(total, wanted) if is_last else total

        return mx.compile(step, inputs=self._captured, outputs=self._captured)

    def _loss(self, wanted: Flat, tokens: mx.array, bounds: mx.array) -> tuple[mx.array, mx.array]:
        put(self._slots, wanted)
        return supervised_loss(self._model, tokens, bounds)

    def _finish(self, total: dict[str, Any], wanted: Flat) -> dict[str, Any]:
        tokens = total["tokens"].astype(mx.float32)
        mean = {name: g / tokens.astype(g.dtype) for name, g in total["gradients"].items()}
        updated = self._optimizer.apply_gradients(nested(mean), nested(wanted))
        updates = dict(tree_flatten(updated))
        return {"loss": total["loss"], "tokens": total["tokens"], "updates": updates}


def nested(flat: Flat) -> Any:
    """A flat dictionary of dotted names as the tree that the optimizer's state mirrors."""
    return tree_unflatten(list(flat.items())) if flat else {}


def _added(left: dict[str, Any], right: dict[str, Any]) -> dict[str, Any]:
    sums = {name: g + right["gradients"][name] for name, g in left["gradients"].items()}
    loss, tokens = left["loss"] + right["loss"], left["tokens"] + right["tokens"]
    return {"loss": loss, "tokens": tokens, "gradients": sums}
