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

from nested_core.models.parameters import ParameterRefs, assign_parameters, restoring_parameters
from nested_core.optim.gradients import Flat
from nested_core.optim.pytree import flatten
from nested_core.optim.tiered import Tiered
from nested_core.training.distributed import SINGLE_PROCESS, Sums, World, pack_sums, unpack_sums
from nested_core.training.loss.supervised import LossRule, MicroBatch
from nested_core.training.packing import Packing, nested


@dataclass(frozen=True)
class StepResult:
    """What a step computed, not yet evaluated.

    `micro` holds `loss`, `weight` and `tokens` of each micro-batch; `updates` the new value of each
    due array, as the packing keeps them, and nothing where the step was left incomplete. `votes`
    is how many ranks ask to stop; None where there is one rank.
    """

    micro: list[Sums]
    updates: Flat
    votes: mx.array | None


class TrainStep:
    """Runs optimizer steps; each is one or more micro-batches and one call of the optimizer.

    `packing` says how the parameters come; `optimizer` holds the state for them as they come.
    Among ranks, gradients are summed once a step; `bytes_sent` is the size of that vector for each
    set of due tiers.
    """

    def __init__(
        self,
        model: nn.Module,
        refs: ParameterRefs,
        optimizer: Tiered,
        packing: Packing,
        rule: LossRule,
        *,
        draws: bool,
        world: World = SINGLE_PROCESS,
    ) -> None:
        self._world, self.bytes_sent = world, dict[tuple[int, ...], int]()
        self._model, self._refs, self._optimizer = model, refs, optimizer
        self._packing, self._rule = packing, rule
        self._places = {name: place for place, name in enumerate(refs)}
        self._captured = [optimizer.state, mx.random.state] if draws else [optimizer.state]
        self._compiled: dict[tuple[int, ...], Callable[..., Any]] = {}

    def run(
        self,
        params: Flat,
        batches: Sequence[MicroBatch],
        due: tuple[int, ...],
        *,
        complete: bool,
        asks: bool = False,
    ) -> StepResult:
        """Take the gradients of the due tiers over all micro-batches; if `complete`, apply them.

        `asks` is this rank's wish to stop, which the others hear of.
        """
        if due not in self._compiled:
            self._compiled[due] = self._compile(due)
        step = self._compiled[due]
        micro: list[Sums] = []
        carried, updates, votes = None, {}, None
        wish = None if self._world.is_single_process else mx.array(asks)
        with restoring_parameters(self._refs):
            for index, batch in enumerate(batches):
                is_last = complete and index == len(batches) - 1
                arrays = self._rule.arrange(batch)
                sums, carried, updates, votes = step(params, carried, wish, *arrays, is_last)
                micro.append(sums)
        return StepResult(micro, updates, votes)

    def _compile(self, due: tuple[int, ...]) -> Callable[..., Any]:
        keys = self._packing.of_tiers(due)

        def step(
            params: Flat, carried: Any, wish: Any, tokens: mx.array, learnt: mx.array, is_last: bool
        ) -> tuple[Sums, Any, Flat, Any]:
            """Of one micro-batch: sums, what is carried on, and at the last updates and votes."""
            wanted = {key: value for key, value in params.items() if key in keys}
            tensors = self._tensors(params)
            assign_parameters(self._refs, tensors)
            of_due = {name: tensors[name] for key in wanted for name in self._packing.names(key)}
            (loss, count), found = mx.value_and_grad(self._loss)(of_due, tokens, learnt)
            gradients = self._gradients(found, wanted)
            weight = self._rule.weight(count)
            micro = {"loss": loss, "weight": weight, "tokens": count}
            if carried is not None:
                gradients = {n: g + carried["gradients"][n] for n, g in gradients.items()}
                weight = carried["weight"] + weight
            if not is_last:
                return micro, {"gradients": gradients, "weight": weight}, {}, None
            votes = None
            if wish is not None:
                packed = pack_sums(gradients, weight, wish)
                self.bytes_sent[due] = packed.nbytes
                gradients, weight, votes = unpack_sums(self._world.sum_packed(packed), gradients)
            return micro, None, self._apply(gradients, weight, wanted), votes

        return mx.compile(step, inputs=self._captured, outputs=self._captured)

    def _tensors(self, params: Flat) -> Flat:
        """The parameters by name, in the dtype they compute in: one cast for a whole vector."""
        low = {key: value.astype(self._dtype_of(key)) for key, value in params.items()}
        return self._packing.unpack(low)

    def _dtype_of(self, key: str) -> mx.Dtype:
        return self._refs[next(iter(self._packing.names(key)))].dtype

    def _loss(self, wanted: Flat, tokens: mx.array, learnt: mx.array) -> tuple[mx.array, mx.array]:
        assign_parameters(self._refs, wanted)
        return self._rule.function(self._model, tokens, learnt)

    def _gradients(self, found: Flat, wanted: Flat) -> Flat:
        """The gradients packed as the parameters are, and in their dtype.

        All are asked for together, the deepest layers' first: the backward pass comes to them in
        that order, and where one waited for another, the activations it is made of would stay.
        """
        keys = sorted(wanted, key=self._depth, reverse=True)
        joined = [self._packing.leaves[key].join(found) for key in keys]
        ordered = dict(zip(keys, mx.depends(joined, joined) if joined else [], strict=True))
        return {key: ordered[key].astype(value.dtype) for key, value in wanted.items()}

    def _depth(self, key: str) -> int:
        """How far up in the model the last of an array's tensors is."""
        return max(self._places[name] for name in self._packing.names(key))

    def _apply(self, gradients: Flat, weight: mx.array, wanted: Flat) -> Flat:
        mean = {name: g / weight.astype(g.dtype) for name, g in gradients.items()}
        return flatten(self._optimizer.apply_gradients(nested(mean), nested(wanted)))
