"""Whether a module's low-rank product moved: the change that a user of the adapter can see.

Rescaling lora_a against lora_b, flipping both signs or permuting the rank changes every byte and
no product. The norm is taken through QR factors in float64; the product itself is never formed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from nested_core.adapters import Adapter, Tensor
from nested_core.errors import DamagedError
from nested_core.gate.verdict import Reason

Matrix = np.ndarray[Any, np.dtype[np.float64]]
ROUNDING = {"F64": 2.0**-52, "F32": 2.0**-23, "F16": 2.0**-10, "BF16": 2.0**-7}
ROUNDING_FACTOR = 4.0


def effect_reasons(initial: Adapter, trained: Adapter) -> list[Reason]:
    """One reason that names the tensors of every module whose effect is what it was."""
    idle = [m for m in _modules(trained) if not _moved(m, initial.tensors, trained.tensors)]
    if not idle:
        return []
    names = tuple(f"{module}.{leaf}" for module in idle for leaf in ("lora_a", "lora_b"))
    message = f"the product lora_a @ lora_b of {len(idle)} modules did not move, {idle[0]} first"
    return [Reason("no_effect", message, names)]


def require_factors(adapter: Adapter) -> None:
    """Raise DamagedError where a lora_a and its lora_b cannot be the factors of one product."""
    for module in _modules(adapter):
        a, b = (adapter.tensors[f"{module}.{leaf}"] for leaf in ("lora_a", "lora_b"))
        dense = len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0]
        switch = len(a.shape) == len(b.shape) == 3 and (a.shape[0], a.shape[1]) == b.shape[::2]
        if not (dense or switch) or not {a.dtype, b.dtype} <= ROUNDING.keys():
            raise DamagedError(
                f"{module}: lora_a {a.dtype} {a.shape} and lora_b {b.dtype} {b.shape} are no "
                f"low-rank factors; expected floating point (in, rank) and (rank, out)."
            )


def _modules(adapter: Adapter) -> list[str]:
    names = (name.removesuffix(".lora_a") for name in adapter.tensors if name.endswith(".lora_a"))
    return sorted(name for name in names if f"{name}.lora_b" in adapter.tensors)


def _moved(module: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> bool:
    magnitude = f"{module}.m"
    if magnitude in after and before[magnitude].data != after[magnitude].data:
        return True
    old_a, old_b = _factors(module, before)
    new_a, new_b = _factors(module, after)
    delta = product_difference(new_a, new_b, old_a, old_b)
    size = _norm(new_a) * _norm(new_b) + _norm(old_a) * _norm(old_b)
    rounding = ROUNDING[after[f"{module}.lora_a"].dtype]
    return bool(delta > ROUNDING_FACTOR * rounding * size)


def _factors(module: str, tensors: Mapping[str, Tensor]) -> tuple[Matrix, Matrix]:
    """Left (experts, in, rank) and right (experts, rank, out) factor in float64.

    A dense layer is one expert; mlx-lm stores a switch layer's factors transposed.
    """
    stored = tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]
    a, b = (tensor.to_numpy().astype(np.float64) for tensor in stored)
    if a.ndim == 3:
        return a.swapaxes(1, 2), b.swapaxes(1, 2)
    return a[None], b[None]


def product_difference(new_a: Matrix, new_b: Matrix, old_a: Matrix, old_b: Matrix) -> float:
    """Frobenius norm of new_a @ new_b - old_a @ old_b.

    With [new_a old_a] = Qa Ra and [new_b; -old_b]^T = Qb Rb the norm is that of Ra Rb^T, because Qa
    and Qb have orthonormal columns.
    """
    _, left = np.linalg.qr(np.concatenate([new_a, old_a], axis=2))
    _, right = np.linalg.qr(np.concatenate([new_b, -old_b], axis=1).swapaxes(1, 2))
    return _norm(left @ right.swapaxes(1, 2))


def _norm(matrix: Matrix) -> float:
    return float(np.linalg.norm(matrix))
