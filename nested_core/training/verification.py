"""Whether what steps computed is in the model, and, among ranks, in each of them alike."""

from __future__ import annotations

from collections.abc import Callable

import mlx.nn as nn

from nested_core.optim.gradients import Flat
from nested_core.optim.pytree import verify_updates
from nested_core.optim.tiered import Tiered
from nested_core.optim.tiers import TierMap
from nested_core.training.distributed import World
from nested_core.training.engine import Engine, StepTaken
from nested_core.training.red_flags import flag_updates, idle_names
from nested_core.training.state import TrainingState


class UpdateCheck:
    """Has what an engine holds written into the model, reads it back, and flags what is not there.

    The first step of each set of due tiers is looked at, and every step that a person will see.
    `write` writes what the steps so far have computed, by name, and returns all of it.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Tiered,
        tiers: TierMap,
        world: World,
        write: Callable[[Engine], Flat],
    ) -> None:
        self._model, self._optimizer = model, optimizer
        self._tiers, self._world, self._write = tiers, world, write
        self._seen_due: set[tuple[int, ...]] = set()

    def look(self, engine: Engine, taken: StepTaken, state: TrainingState, *, must: bool) -> None:
        """Before the model is looked at, write what is new into it and read that back.

        Raises RanksDiffer where the ranks are no longer equal.
        """
        if taken.due in self._seen_due and not must:
            return
        written = self._write(engine)
        self._world.require_equal(engine.held(), state.step)
        if not taken.updates:
            return
        self._seen_due.add(taken.due)
        before = engine.packing.unpack(taken.before)
        report = verify_updates(before, {name: written[name] for name in before}, self._model)
        idle = idle_names(self._optimizer, self._tiers, state.step, report.unmoved)
        flag_updates(state, report, idle)
        state.verified_steps.append(state.step)
