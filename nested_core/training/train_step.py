"""One optimizer step: forward and backward over its micro-batches, then the update.

A step is a pure function of the packed parameters and the optimizer state, compiled once for each
set of due tiers. It assigns parameters to the model for tracing and restores the model's own
afterwards. The gradient is taken with respect to the due parameters alone, so that the backward
pass ends at the lowest layer that is due.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import chain, pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core.kernels.views import knowing_views
from nested_core.models.parameters import ParameterRefs, assign_parameters, restoring_parameters
from nested_core.optim.gradients import Flat
from nested_core.optim.named_updates import flatten
from nested_core.optim.tier_assignment import TierMap
from nested_core.optim.tiered import Tiered
from nested_core.training.loss.loss_interface import Loss, MicroBatch
from nested_core.training.parameter_packing import PackedState, unflatten_names
from nested_core.training.world import SINGLE_PROCESS_WORLD, Sums, World


@dataclass(frozen=True)
class StepResult:
    """The result of one step; the device may still be computing it.

    Attributes:
        due: the tiers whose gradients were taken.
        micro_batches: `loss`, `weight` and `tokens` of each micro-batch.
        before: the due packed parameters before the step.
        updates: the due packed parameters after the step; like `before`, empty if the step was
            incomplete.
        requests: how many ranks made each of the requests, float32; None in a single process.
        gradient_bytes: the bytes that this rank sent to the others.
    """

    due: tuple[int, ...]
    micro_batches: list[Sums]
    before: Flat
    updates: Flat
    requests: mx.array | None
    gradient_bytes: int


@dataclass(kw_only=True, eq=False)
class TrainStep:
    """Takes optimizer steps over one or more micro-batches, starting from the model's parameters.

    Args:
        model: the model with its adapter attached; its parameters do not change.
        parameters: references to its trainable parameters.
        optimizer: an optimizer that was initialised with these parameters.
        tiers: the tier of each parameter.
        loss_fn: the loss to train with, in its form for this model.
        pack_by_tier: pack each tier into one vector; for small tensors, such as an adapter's.
        uses_dropout: whether the model draws random numbers.
        world: the ranks, whose gradients are summed once a step.
    """

    # What is computed
    model: nn.Module
    parameters: ParameterRefs
    optimizer: Tiered
    tiers: TierMap
    loss_fn: Loss
    pack_by_tier: bool = True
    uses_dropout: bool = False
    world: World = SINGLE_PROCESS_WORLD

    # The state that steps advance, and the arrays that compiled functions read and write implicitly
    packed: PackedState = field(init=False)
    captured: list[object] = field(init=False)

    def __post_init__(self) -> None:
        """Pack the parameters, and collect the state that compiled steps change."""
        self.packed = PackedState(
            self.parameters, self.optimizer, self.tiers, pack_by_tier=self.pack_by_tier
        )
        self._packing = self.packed.packing
        self._depth = {name: depth for depth, name in enumerate(self.parameters)}
        self.captured = [self.packed.optimizer.state]
        if self.uses_dropout:
            self.captured.append(mx.random.state)
        self.compiled: dict[tuple[int, ...], Callable[..., Any]] = {}  # by due tiers
        self._gradient_bytes: dict[tuple[int, ...], int] = {}

    def needed_tiers(self, step: int) -> tuple[int, ...]:
        """Return the tiers whose gradients a step needs: those due, or all if they accumulate."""
        if self.packed.optimizer.accumulates:
            return tuple(range(len(self.tiers.frequencies)))
        return self.tiers.due(step)

    def run(
        self,
        batches: Iterable[MicroBatch],
        due: tuple[int, ...],
        *,
        is_complete: bool = True,
        requests: mx.array | None = None,
    ) -> StepResult:
        """Compute losses and gradients of the micro-batches, and update the tiers that are due.

        A tier is a group of parameters that is updated every so many steps. The update is computed
        together with the last micro-batch. Does not wait for the device: the result holds arrays
        that are still being computed.

        Args:
            batches: the micro-batches, whose gradients are added up. They are read one after the
                other, so that few have to be in memory.
            due: the tiers to take gradients of and to update.
            is_complete: whether these are all micro-batches of a step. If not, nothing is updated
                and only the losses are of use.
            requests: this process's requests to stop or to save, from `World.requests_to_send`,
                which the step adds up over all processes.
        """
        if due not in self.compiled:
            self.compiled[due] = self._compile(due)
        compiled_step = self.compiled[due]
        params = self.packed.parameters
        micro_batches: list[Sums] = []
        accumulated: dict[str, Any] | None = None
        updates: Flat = {}
        summed_requests: mx.array | None = None
        # Tracing puts symbolic arrays into the model, which must not stay there.
        with restoring_parameters(self.parameters):
            for batch, following in pairwise(chain(batches, (None,))):  # None follows the last one
                is_last = is_complete and following is None
                arrays = self.loss_fn.prepare_batch(batch)
                sums, accumulated, updates, summed_requests = compiled_step(
                    params, accumulated, requests, is_last, *arrays
                )
                micro_batches.append(sums)
        mx.async_eval(updates, self.packed.optimizer.state, micro_batches, summed_requests)
        self.packed.update(updates)
        return StepResult(
            due=due,
            micro_batches=micro_batches,
            before={key: params[key] for key in updates},
            updates=updates,
            requests=summed_requests,
            gradient_bytes=self._gradient_bytes.get(due, 0),
        )

    def _compile(self, due: tuple[int, ...]) -> Callable[..., object]:
        """Compile the function that processes a micro-batch, and updates after the last one.

        due: the tiers to update. MLX compiles it once for each `is_last` and each batch shape.
        """
        due_keys = self._packing.keys_of_tiers(due)

        def train_step(
            params: Flat,
            accumulated: dict[str, Any] | None,
            requests: mx.array | None,
            is_last: bool,
            *batch: mx.array,
        ) -> tuple[Sums, dict[str, object] | None, Flat, mx.array | None]:
            """Process one micro-batch of a step, and compute the update after the last one.

            accumulated: the gradients and weight of the step's earlier micro-batches; None for the
                first one.
            requests: this process's requests to stop or save, summed over the processes.

            Returns the micro-batch's sums (loss, weight, tokens); what is accumulated, None after
            the last one; the updated parameters and the request counts, none before the last one.
            """
            due_params = {key: value for key, value in params.items() if key in due_keys}
            micro_batch, gradients = self.forward_backward(params, due_params, *batch)
            weight = micro_batch["weight"]
            if accumulated is not None:
                gradients = {n: g + accumulated["gradients"][n] for n, g in gradients.items()}
                weight = accumulated["weight"] + weight
            if not is_last:
                return micro_batch, {"gradients": gradients, "weight": weight}, {}, None
            summed = self.world.sum_gradients(gradients, weight, requests)
            self._gradient_bytes[due] = summed.sent_bytes
            updates = self.update(summed.gradients, summed.weight, due_params)
            return micro_batch, None, updates, summed.requests

        return mx.compile(train_step, inputs=self.captured, outputs=self.captured)

    def forward_backward(
        self, params: Flat, due_params: Flat, *batch: mx.array
    ) -> tuple[Sums, Flat]:
        """Return the sums of a prepared micro-batch, and the due parameters' packed gradients.

        Packed means that small tensors are joined into one array, of which `params` holds one value
        by key. Only the tensors of due parameters are differentiated.

        The sums are the loss, the weight that it is divided by, and the number of tokens.
        """
        stored = self._split_in_compute_dtype(params)
        # `_loss_of_micro_batch` replaces the due ones
        assign_parameters(self.parameters, self._packing.turn(stored))
        due_tensors = {n: stored[n] for key in due_params for n in self._packing.arrays[key].shapes}
        differentiate = mx.value_and_grad(self._loss_of_micro_batch)
        with knowing_views():
            (loss, count), gradients = differentiate(due_tensors, *batch)
        packed = self._pack_gradients(gradients, due_params)
        count_tokens = self.loss_fn.count_tokens
        return {
            "loss": loss,
            "weight": self.loss_fn.weight_of_micro_batch(count),
            "tokens": count if count_tokens is None else count_tokens(*batch),
        }, packed

    def _split_in_compute_dtype(self, params: Flat) -> Flat:
        """Return the parameters by name, as they are stored, in their compute dtype.

        A whole vector is cast at once.
        """
        cast = {}
        for key, value in params.items():
            first_name = next(iter(self._packing.arrays[key].shapes))
            cast[key] = value.astype(self.parameters[first_name].dtype)
        return self._packing.split(cast)

    def _loss_of_micro_batch(
        self, due_tensors: Flat, *batch: mx.array
    ) -> tuple[mx.array, mx.array]:
        """Compute the loss as a function of the due tensors, which MLX differentiates by.

        due_tensors: as they are stored.
        """
        assign_parameters(self.parameters, self._packing.turn(due_tensors))
        return self.loss_fn.function(self.model, *batch)

    def _pack_gradients(self, gradients: Flat, due_params: Flat) -> Flat:
        """Join the gradients like the parameters as they are stored, and in their dtypes.

        All are evaluated together, those of the deepest layers first, which is the order of the
        backward pass. If one gradient waited for another, the activations it is computed from would
        stay in memory.
        """

        def depth(key: str) -> int:
            """Return the largest depth of the parameters in a packed array."""
            return max(self._depth[name] for name in self._packing.arrays[key].shapes)

        keys = sorted(due_params, key=depth, reverse=True)
        packed = [self._packing.arrays[key].join(gradients) for key in keys]
        ordered = dict(zip(keys, mx.depends(packed, packed) if packed else [], strict=True))
        return {key: ordered[key].astype(value.dtype) for key, value in due_params.items()}

    def update(self, gradients: Flat, weight: mx.array, due_params: Flat) -> Flat:
        """Return the new values of the due parameters, from summed gradients and their weight."""
        mean = {name: g / weight.astype(g.dtype) for name, g in gradients.items()}
        updated = self.packed.optimizer.apply_gradients(
            unflatten_names(mean), unflatten_names(due_params)
        )
        return flatten(updated)
