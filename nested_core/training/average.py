"""A moving average of the adapter, kept beside it from step to step and offered in its place.

After optimizer step n the average is s = d s + (1 - d) w of the adapter w, from the initial
adapter, with d = min(decay, (1 + n) / (10 + n)). `ema` offers s. `bema` adds (10 + n)**-0.2
(w - w0), which takes away the bias towards the initial adapter w0 (BEMA, arXiv 2508.00180,
algorithm 1, with its power 0.2 and lag 10).

A checkpoint of a run with an average publishes what is offered. The trained values and s lie beside
the optimizer's state, so that a resumed run goes on to the bit.
"""

from __future__ import annotations

import mlx.core as mx

from nested_core.config.sections import AverageSection
from nested_core.optim.gradients import Flat
from nested_core.training.parameter_packing import PackedState, Packing

LAG = 10
BIAS_POWER = -0.2


class AdapterAverage:
    """The average of one run: s, and what is offered of it."""

    def __init__(self, section: AverageSection, initial: Flat) -> None:
        self._section = section
        self._initial = initial
        self._values = initial
        self._packing: Packing | None = None
        self._packed: Flat = {}

    def resume(self, values: Flat) -> None:
        """Go on from s, by name, as a checkpoint has it."""
        self._values = values
        self._packing = None

    def after_step(self, step: int, state: PackedState) -> None:
        """Take in what the parameters are after an optimizer step, from 1, without waiting."""
        if self._packing is None:
            self._packing = state.packing
            self._packed = state.packing.pack(self._values)
        decay = min(self._section.decay, (1 + step) / (LAG + step))
        trained = state.parameters
        self._packed = {k: decay * s + (1 - decay) * trained[k] for k, s in self._packed.items()}
        mx.async_eval(self._packed)

    def values(self) -> Flat:
        """The average s by name."""
        return self._values if self._packing is None else self._packing.unpack(self._packed)

    def offered(self, step: int, trained: Flat) -> Flat:
        """What is evaluated and published after a step, by name."""
        slow = self.values()
        if self._section.kind == "ema":
            return slow
        share = (LAG + step) ** BIAS_POWER
        return {n: s + share * (trained[n] - self._initial[n]) for n, s in slow.items()}
