"""CUDA kernels that are used only if they agree with MLX on this machine.

Each kernel has its formula in MLX's operations beside it. Before its first use in a process it is
run on example inputs; a kernel that disagrees is not used, and a warning says so.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, ParamSpec, TypeVar, cast

import mlx.core as mx

from nested_core import backend
from nested_core.backend import to_float

TOLERANCE = 0.02  # of the largest element: a few roundings of a bfloat16

Inputs = ParamSpec("Inputs")
Outputs = TypeVar("Outputs", bound=mx.array | Sequence[mx.array])
Examples = Callable[..., Sequence[tuple[object, ...]]]


@dataclass(eq=False)
class CheckedKernel(Generic[Inputs, Outputs]):
    """A function that launches a CUDA kernel, its reference, and inputs to compare the two with.

    A kernel may be compiled in variants, such as one for each number of tiles. Callers ask
    `is_usable` first, and call the reference if it is not.

    name: what the kernel computes, for the warning.
    launch: the function that launches it.
    reference: the same formula in MLX's operations.
    examples: returns argument tuples to compare with, for a given variant.
    """

    name: str
    launch: Callable[Inputs, Outputs]
    reference: Callable[Inputs, Outputs]
    examples: Examples
    _checked: dict[tuple[int, ...], bool] = field(default_factory=dict, init=False)

    def __call__(self, *args: Inputs.args, **kwargs: Inputs.kwargs) -> Outputs:
        """Launch the kernel."""
        return self.launch(*args, **kwargs)

    def is_usable(self, *variant: int) -> bool:
        """Return whether MLX computes on CUDA here and the kernel agrees with its reference."""
        return backend.computes_on_cuda() and self.agrees_with_reference(*variant)

    def agrees_with_reference(self, *variant: int) -> bool:
        """Return whether the kernel agrees with its reference.

        Checked once per variant and process.
        """
        if variant not in self._checked:
            trouble = self.describe_disagreement(*variant)
            if trouble is not None:
                rest = "MLX's own operations are."
                warnings.warn(
                    f"Our CUDA kernel for {self.name} is not used: {trouble}. {rest}", stacklevel=2
                )
            self._checked[variant] = trouble is None
        return self._checked[variant]

    def describe_disagreement(self, *variant: int) -> str | None:
        """Describe how the kernel differs from its reference on the examples.

        Returns None if they agree.
        """
        for arguments in self.examples(*variant):
            try:
                outputs = cast(Any, self.launch)(*arguments)
                mx.eval(outputs)
            except RuntimeError as error:
                return f"it failed: {' '.join(str(error).split())[:200]}"
            difference = _describe_difference(outputs, cast(Any, self.reference)(*arguments))
            if difference is not None:
                return difference
        return None


def checked_kernel(
    name: str, *, reference: Callable[Inputs, Outputs], examples: Examples
) -> Callable[[Callable[Inputs, Outputs]], CheckedKernel[Inputs, Outputs]]:
    """Decorator that turns a function which launches a kernel into a `CheckedKernel`."""
    return lambda launch: CheckedKernel(name, launch, reference, examples)


def random_arrays(
    *shapes: tuple[int, ...], dtype: mx.Dtype = mx.bfloat16, seed: int = 0
) -> list[mx.array]:
    """Return arrays of normal random numbers of these shapes, the same for the same seed."""
    pairs = zip(shapes, mx.random.split(mx.random.key(seed), len(shapes)), strict=True)
    return [mx.random.normal(shape, key=key).astype(dtype) for shape, key in pairs]


def _describe_difference(outputs: Any, expected: Any) -> str | None:
    """Describe the first difference of shape or value beyond TOLERANCE; None without one.

    outputs: what the kernel returned: an array or a list of arrays. expected: what its reference
        returned.
    """
    if isinstance(outputs, mx.array):
        outputs, expected = [outputs], [expected]
    for ours, theirs in zip(outputs, expected, strict=True):
        if ours.shape != theirs.shape:
            return f"it gives the shape {ours.shape}, not {theirs.shape}"
        largest = to_float(mx.abs(theirs.astype(mx.float32)).max())
        difference = to_float(mx.abs(ours.astype(mx.float32) - theirs.astype(mx.float32)).max())
        if not difference <= TOLERANCE * largest:
            return f"it differs by {difference:.3g} where elements are up to {largest:.3g}"
    return None
