"""What the loop drives: parameters and optimizer state as a step keeps them, and their way back.

Between two looks at the model (a report, an evaluation, a checkpoint) only the packed arrays move;
the model and the optimizer hold by name what was last written into them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn

from nested_core.models.parameters import ParameterRefs, read_parameters
from nested_core.optim.gradients import Flat, leaf_states
from nested_core.optim.pytree import flatten
from nested_core.optim.tiered import Tiered
from nested_core.optim.tiers import TierMap
from nested_core.training.distributed import SINGLE_PROCESS, Sums, World
from nested_core.training.loss.supervised import LossRule, MicroBatch
from nested_core.training.packing import nested, packing_for
from nested_core.training.step import TrainStep


@dataclass(frozen=True)
class StepTaken:
    """A step: its first micro-batch, the tiers due, and the due arrays before and after.

    Among ranks: how many of them ask to stop, and the bytes of gradients that this one sent.
    """

    first_iteration: int
    due: tuple[int, ...]
    before: Flat
    updates: Flat
    votes: mx.array | None = None
    bytes_sent: int = 0


class Engine:
    """Takes steps from what model and optimizer hold now; `values` are the parameters since.

    `joins` is for small tensors, such as an adapter's; `draws` for a model that draws dropout.
    """

    def __init__(
        self,
        model: nn.Module,
        refs: ParameterRefs,
        optimizer: Tiered,
        tiers: TierMap,
        rule: LossRule,
        *,
        joins: bool = True,
        draws: bool = False,
        world: World = SINGLE_PROCESS,
    ) -> None:
        held = read_parameters(refs)
        self._optimizer, self._tiers = optimizer, tiers
        self.packing = packing_for(held, tiers, optimizer, small=joins)
        self._params = self.packing.pack(held)
        self._twin = self.packing.pack_optimizer(optimizer, held)
        self._moments = leaf_states(nested(held), optimizer.state)
        mx.eval(self._params, self._twin.state)
        self._step = TrainStep(
            model, refs, self._twin, self.packing, rule, draws=draws, world=world
        )

    def needed(self, step: int) -> tuple[int, ...]:
        """The tiers that a step needs gradients of."""
        if self._optimizer.gathers:
            return tuple(range(len(self._tiers.frequencies)))
        return self._tiers.due(step)

    def take(
        self,
        batches: Sequence[MicroBatch],
        due: tuple[int, ...],
        first: int,
        *,
        complete: bool,
        asks: bool = False,
    ) -> tuple[StepTaken, list[Sums]]:
        """Take one optimizer step, without waiting for the device, and count it.

        Among ranks `asks` is this one's wish to stop.
        """
        result = self._step.run(self._params, batches, due, complete=complete, asks=asks)
        mx.async_eval(result.updates, self._twin.state, result.micro, result.votes)
        before = {key: self._params[key] for key in result.updates}
        self._params = self._params | result.updates
        self.packing.share_clock(self._twin, self._optimizer)
        sent = self._step.bytes_sent.get(due, 0)
        return StepTaken(first, due, before, result.updates, result.votes, sent), result.micro

    def held(self) -> Flat:
        """Every array that the next step starts from, which all ranks have to agree on."""
        return self._params | flatten(self._twin.state)

    def values(self) -> Flat:
        """The parameters by name; the optimizer is given its state by name along with them."""
        self.packing.unpack_optimizer(self._twin, self._moments)
        return self.packing.unpack(self._params)
