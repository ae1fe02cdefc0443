"""Whether a module's low-rank product lora_a @ lora_b, an adapter's only visible effect, changed.

Rescaling lora_a against lora_b, flipping both signs or permuting the rank changes every byte and no
product. The norm is taken through QR factors in float64; the product itself is never formed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import numpy as np

from nested_core.errors import DamagedError
from nested_core.gate.tensors.tensor_diff import frobenius_norm
from nested_core.models.lora_tensors import LORA_FACTORS
from nested_core.records.verdict import Reason
from nested_core.storage.adapter import Adapter
from nested_core.storage.safetensors_files import StoredTensor

Factor = np.typing.NDArray[np.floating]
Matrix = np.typing.NDArray[np.float64]
Factors = tuple[StoredTensor, StoredTensor]  # lora_a and lora_b of one module
# Unit roundoff and smallest normal number. Below the latter, errors do not shrink with the value.
PRECISION_BY_DTYPE = {
    "F64": (2.0**-53, 2.0**-1022),
    "F32": (2.0**-24, 2.0**-126),
    "F16": (2.0**-11, 2.0**-14),
    "BF16": (2.0**-8, 2.0**-126),
}
# Rescalings, rotations and permutations move the product by rounding alone. Of 3,000 random ones
# 99 % moved it by less than 0.93 times the bound below, and one, in subnormal float16, by over 1.5.
ROUNDING_FACTOR = 2.0
LARGEST_FLOAT32 = float(np.finfo(np.float32).max)
SAMPLED_PRODUCT_ROWS = 64  # rows and columns of a product that are compared before the whole of it


def no_effect_reasons(initial: Adapter, trained: Adapter) -> list[Reason]:
    """Return one reason that names the factors of every module whose product did not change."""
    unchanged = [
        module
        for module in _module_names(trained)
        if not _has_module_changed(module, initial.tensors, trained.tensors)
    ]
    if not unchanged:
        return []
    count, first = len(unchanged), unchanged[0]
    message = f"the product lora_a @ lora_b of {count} modules did not move, {first} first"
    return [Reason("no_effect", message, factor_names(unchanged))]


def factor_names(modules: Iterable[str]) -> tuple[str, ...]:
    """Return the names of the modules' LoRA factors: "q" gives "q.lora_a" and "q.lora_b"."""
    return tuple(f"{module}.{leaf}" for module in modules for leaf in LORA_FACTORS)


def overflow_reasons(initial: Adapter, trained: Adapter) -> list[Reason]:
    """Return reasons for modules whose update scale * lora_a @ lora_b overflows float32.

    Modules that already overflow in the initial adapter get a reason of their own, because training
    is not to blame for them.
    """
    before, after = (
        {
            module
            for module in _module_names(adapter)
            if product_overflows(adapter.tensors, module, adapter.meaning()["scale"] or 1.0)
        }
        for adapter in (initial, trained)
    )
    return [
        *overflow_reasons_of(before, "the initial adapter's"),
        *overflow_reasons_of(after - before, "the trained adapter's"),
    ]


def overflow_reasons_of(modules: Iterable[str], whose: str) -> list[Reason]:
    """Return one reason that names the factors of the overflowing modules; empty without modules.

    `whose` begins the message, such as "the trained adapter's".
    """
    ordered = sorted(modules)
    if not ordered:
        return []
    message = (
        f"{whose} scale * lora_a @ lora_b overflows float32 in {len(ordered)} modules, "
        f"{ordered[0]} first"
    )
    return [Reason("non_finite", message, factor_names(ordered))]


def product_overflows(tensors: Mapping[str, StoredTensor], module: str, scale: float) -> bool:
    """Whether an element of scale * lora_a @ lora_b is beyond float32, for finite factors."""
    a, b = _factor_pair(tensors, module)
    if scale * frobenius_norm(a) * frobenius_norm(b) <= LARGEST_FLOAT32:
        return False  # no element is larger than the product of the norms (Cauchy-Schwarz)
    left, right = _float64_factors((a, b), None)
    with np.errstate(all="ignore"):
        return any(
            not (
                scale * np.abs(left[:, row : row + SAMPLED_PRODUCT_ROWS] @ right) <= LARGEST_FLOAT32
            ).all()
            for row in range(0, left.shape[1], SAMPLED_PRODUCT_ROWS)
        )


def require_lora_factors(adapter: Adapter) -> None:
    """Raise DamagedError if a module's lora_a and lora_b cannot be multiplied.

    Accepted are floating point (in, rank) and (rank, out), and for switch layers (experts, rank,
    in) and (experts, out, rank).
    """
    for module in _module_names(adapter):
        a, b = _factor_pair(adapter.tensors, module)
        is_dense = len(a.shape) == len(b.shape) == 2 and a.shape[1] == b.shape[0]
        is_switch = len(a.shape) == len(b.shape) == 3 and (a.shape[0], a.shape[1]) == b.shape[::2]
        if not (is_dense or is_switch) or not {a.dtype, b.dtype} <= PRECISION_BY_DTYPE.keys():
            raise DamagedError(
                f"{module}: lora_a {a.dtype} {a.shape} and lora_b {b.dtype} {b.shape} are no "
                f"low-rank factors; expected floating point (in, rank) and (rank, out)."
            )


def _module_names(adapter: Adapter) -> list[str]:
    """Return the sorted names of the modules that have both lora_a and lora_b."""
    names = (name.removesuffix(".lora_a") for name in adapter.tensors if name.endswith(".lora_a"))
    return sorted(name for name in names if f"{name}.lora_b" in adapter.tensors)


def _factor_pair(tensors: Mapping[str, StoredTensor], module: str) -> Factors:
    """Return the tensors lora_a and lora_b of a module."""
    return tensors[f"{module}.lora_a"], tensors[f"{module}.lora_b"]


def _has_module_changed(
    module: str, before: Mapping[str, StoredTensor], after: Mapping[str, StoredTensor]
) -> bool:
    """Whether a module's product, or its DoRA magnitude, changed by more than rounding explains.

    The product is lora_a @ lora_b, which is all that the module adds to the base: factors can
    change and the product stay the same.

    before, after: the adapter's tensors by name.

    A sample of the product's rows and columns is compared first, because that is cheap and usually
    enough.
    """
    magnitude = f"{module}.m"  # DoRA's
    if magnitude in after and _moves_beyond_rounding(before[magnitude], after[magnitude]):
        return True
    old, new = _factor_pair(before, module), _factor_pair(after, module)
    # What rounding alone may move the product by is `roundoff` times a norm of the product.
    roundoff = ROUNDING_FACTOR * max(PRECISION_BY_DTYPE[t.dtype][0] for t in (*old, *new))
    squares = [_independent_rounding_squared(pair) for pair in (old, new)]
    rank = max(_float64_factors(pair, 1)[0].shape[2] for pair in (old, new))
    # A product's norm is at most sqrt(rank * square). If a part of the product moved by more than
    # the rounding of that norm, the whole product moved further than either bound below.
    if _norm_of_difference(new, old, SAMPLED_PRODUCT_ROWS) > roundoff * math.sqrt(
        rank * sum(squares)
    ):
        return True
    bound = math.hypot(
        *(
            max(math.sqrt(square), _product_norm(pair))
            for square, pair in zip(squares, (old, new), strict=True)
        )
    )
    return _norm_of_difference(new, old, None) > roundoff * bound


def _moves_beyond_rounding(before: StoredTensor, after: StoredTensor) -> bool:
    """Whether the norm of a tensor's change is more than rounding in its dtype explains."""
    roundoff = ROUNDING_FACTOR * max(PRECISION_BY_DTYPE[t.dtype][0] for t in (before, after))
    old, new = (tensor.to_numpy().astype(np.float64) for tensor in (before, after))
    bound = math.hypot(np.linalg.norm(old), np.linalg.norm(new))
    return float(np.linalg.norm(new - old)) > roundoff * bound


def _independent_rounding_squared(pair: Factors) -> float:
    """Return the sum over the rank of ||a_k||^2 ||b_k||^2, for columns a_k and rows b_k.

    If each element of both factors is rounded independently by a relative error u, the product
    moves by about u times the square root of this sum. If the errors agree, as when one factor is
    multiplied by c and the other by a rounded 1/c, it moves by u times the product's own norm.
    """
    tiny = max(PRECISION_BY_DTYPE[tensor.dtype][1] for tensor in pair)
    left, right = _oriented_factors(pair)
    columns = np.einsum("eir,eir->er", left, left, dtype=np.float64)
    rows = np.einsum("ero,ero->er", right, right, dtype=np.float64)
    columns += np.count_nonzero(left, axis=1) * tiny**2
    rows += np.count_nonzero(right, axis=2) * tiny**2
    return float((columns * rows).sum())


def _norm_of_difference(new: Factors, old: Factors, rows: int | None) -> float:
    """Return the norm of the product's change; with `rows`, that of a sample of rows and columns.

    The sample has about `rows` rows and as many columns.
    """
    new_a, new_b = _float64_factors(new, rows)
    old_a, old_b = _float64_factors(old, rows)
    if rows is None:
        return product_difference(new_a, new_b, old_a, old_b)
    return float(np.linalg.norm(new_a @ new_b - old_a @ old_b))


def _float64_factors(pair: Factors, rows: int | None) -> tuple[Matrix, Matrix]:
    """Return the left (experts, in, rank) and right (experts, rank, out) factor in float64.

    With `rows`, only about that many rows of the left and columns of the right factor, evenly
    spread.
    """
    left, right = _oriented_factors(pair)
    if rows is not None:
        left = left[:, :: max(1, left.shape[1] // rows)]
        right = right[:, :, :: max(1, right.shape[2] // rows)]
    return left.astype(np.float64), right.astype(np.float64)


def _oriented_factors(pair: Factors) -> tuple[Factor, Factor]:
    """Return the left (experts, in, rank) and right (experts, rank, out) factor.

    bfloat16 becomes float32. A dense layer counts as one expert; mlx-lm stores the factors of a
    switch layer transposed.
    """
    left, right = (tensor.to_numpy() for tensor in pair)
    return (left[None], right[None]) if left.ndim == 2 else (left.mT, right.mT)


def product_difference(new_a: Matrix, new_b: Matrix, old_a: Matrix, old_b: Matrix) -> float:
    """Return the Frobenius norm of new_a @ new_b - old_a @ old_b without forming the products.

    With [new_a old_a] = Qa Ra and [new_b; -old_b]^T = Qb Rb the norm is that of Ra Rb^T, because Qa
    and Qb have orthonormal columns.
    """
    left = _triangular_factor(np.concatenate([new_a, old_a], axis=2))
    right = _triangular_factor(np.concatenate([new_b, -old_b], axis=1).mT)
    return float(np.linalg.norm(left @ right.mT))


def product_norm(tensors: Mapping[str, StoredTensor], module: str) -> float:
    """Return the Frobenius norm of a module's lora_a @ lora_b; infinity if it overflows float64."""
    with np.errstate(all="ignore"):
        norm = _product_norm(_factor_pair(tensors, module))
    return norm if math.isfinite(norm) else math.inf


def _product_norm(pair: Factors) -> float:
    """Return the Frobenius norm of the product of two factors, without forming the product."""
    left, right = _float64_factors(pair, None)
    return float(np.linalg.norm(_triangular_factor(left) @ _triangular_factor(right.mT).mT))


def _triangular_factor(tall: Matrix) -> Matrix:
    """Return R of the QR factorisation, (experts, rank, rank), without forming the large Q."""
    return np.asarray(np.linalg.qr(tall, mode="r"))
