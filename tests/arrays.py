"""Arrays for the tests of kernels, and what a launch of a kernel was given."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import mlx.core as mx
import pytest

from nested_core.backend import to_float


def normal(*shape: int, dtype: mx.Dtype = mx.bfloat16, seed: int = 0) -> mx.array:
    """Random numbers; the same for the same seed."""
    return mx.random.normal(shape, key=mx.random.key(seed)).astype(dtype)


def is_near(found: mx.array, expected: mx.array, share: float) -> bool:
    """Whether no element is further off than this share of the largest one."""
    difference = to_float(mx.abs(found.astype(mx.float32) - expected).max())
    return difference <= share * to_float(mx.abs(expected).max())


def note_launches(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each launch of a kernel by a module is given from now on; it gives zeros."""
    launches: list[dict[str, Any]] = []

    def note(
        name: str, inputs: Sequence[mx.array], outputs: Any, numbers: Sequence[Any], **grid: Any
    ) -> list[mx.array]:
        given = {"name": name, "inputs": inputs, "outputs": outputs, "numbers": numbers}
        launches.append(given | grid)
        return [mx.zeros(shape, dtype) for shape, dtype in outputs]

    monkeypatch.setattr(module, "launch_kernel", note)
    return launches
