"""The formulas of Adam and AdamW, for one parameter, as mlx.optimizers computes them.

The operations and their order are those of mlx.optimizers.Adam.apply_single: equal to the bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx


@dataclass(frozen=True)
class AdamRule:
    """The constants of the formula; `bias_correction` divides the moments by 1 - beta**updates."""

    betas: tuple[float, float]
    eps: float
    bias_correction: bool

    def __post_init__(self) -> None:
        for i, beta in enumerate(self.betas):
            if not 0.0 <= beta < 1.0:
                raise ValueError(
                    f"Adam beta{i + 1} should be in [0, 1), {beta} was provided instead"
                )
        if not 0.0 <= self.eps < math.inf:
            raise ValueError(f"Adam epsilon should be >=0, {self.eps} was provided instead")

    def refuse_float16(self, parameters: Mapping[str, mx.array]) -> None:
        """Raise ValueError for float16 parameters: eps underflows, 0 / 0 follows."""
        half = [name for name, value in parameters.items() if value.dtype == mx.float16]
        if half:
            raise ValueError(
                f"Parameters {half[:3]} are float16: eps={self.eps} is 0 there, and a zero "
                f"gradient gives NaN. Keep trainable parameters in float32 or bfloat16."
            )

    def update(
        self,
        parameter: mx.array,
        gradient: mx.array,
        leaf: Mapping[str, mx.array],
        rate: mx.array,
        update: mx.array,
    ) -> dict[str, mx.array]:
        """`parameter`, `m` and `v` after this update; `update` counts the parameter's, from 1."""
        b1, b2 = self.betas
        m = b1 * leaf["m"] + (1 - b1) * gradient
        v = b2 * leaf["v"] + (1 - b2) * mx.square(gradient)
        return {"parameter": self._moved(parameter, m, v, rate, update), "m": m, "v": v}

    def _moved(
        self, parameter: mx.array, m: mx.array, v: mx.array, rate: mx.array, update: mx.array
    ) -> mx.array:
        """Kingma and Ba, algorithm 1, with the bias corrections or without."""
        if not self.bias_correction:
            return parameter - rate * m / (mx.sqrt(v) + self.eps)
        b1, b2 = self.betas
        c1 = (rate / (1 - b1**update)).astype(m.dtype)
        c2 = mx.rsqrt(1 - b2**update).astype(m.dtype)
        return parameter - c1 * m / (mx.sqrt(v) * c2 + self.eps)


def decayed(parameter: mx.array, rate: mx.array, weight_decay: float | None) -> mx.array:
    """Decoupled weight decay (Loshchilov and Hutter, algorithm 2); None is plain Adam."""
    return parameter if weight_decay is None else parameter * (1 - rate * weight_decay)


def returning_arrays(learning_rate: float | Callable[[mx.array], Any]) -> Any:
    """A schedule may return a plain number; an optimizer's state holds arrays only."""
    if not callable(learning_rate):
        return learning_rate

    def schedule(step: mx.array) -> mx.array:
        value = learning_rate(step)
        return value if isinstance(value, mx.array) else mx.array(value, mx.float32)

    return schedule
