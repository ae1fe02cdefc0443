"""Causal attention on CUDA for lengths that MLX's fused backward pass does not take.

It takes multiples of 128 alone (ScaledDotProductAttentionVJP::use_fallback). For others MLX makes
the scores again in the arrays' own dtype, in some twenty operations and five arrays of that size.
Here queries, keys and values are padded with zeros to the next multiple, and the output is cut: no
real query sees a padded key, and no gradient comes to a padded query. Heads of more than 128
elements have no fused backward pass at any length, and are computed in blocks of queries.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import base

from nested_core.kernels.device_operations import FUSED_LENGTH_MULTIPLE
from nested_core.kernels.patching import replacing_function
from nested_core.kernels.self_check import checked_kernel, random_arrays
from nested_core.rooms.cuda.blocked_attention import attend_in_blocks
from nested_core.rooms.cuda.kernel_launch import MAX_THREADS_PER_BLOCK, launch_kernel

PATCHED_FUNCTION_NAME = "scaled_dot_product_attention"
FUSED_DTYPES = (mx.bfloat16, mx.float16)
LARGEST_FUSED_HEAD = 128
LOAD_BYTES = 16
ARRAYS_PER_LAUNCH = 3

plain_attention: Any = base.scaled_dot_product_attention

Arrays = Sequence[mx.array]
ChangeLength = Callable[[Arrays, int], Arrays]


def change_length_in_mlx(arrays: Arrays, length: int) -> Arrays:
    """Pad arrays (batch, length, heads, width) with zeros, or cut them, to another length."""
    more = length - arrays[0].shape[1]
    if more < 0:
        return [array[:, :length] for array in arrays]
    return [mx.pad(array, [(0, 0), (0, more), (0, 0), (0, 0)]) for array in arrays]


def _example_inputs() -> list[tuple[Arrays, int]]:
    arrays = random_arrays((3, 37, 4, 16), (3, 37, 2, 16), (3, 37, 2, 24))
    return [(arrays, 128), (arrays, 5), (arrays[:1], 64)]


@checked_kernel("attention's padding", reference=change_length_in_mlx, examples=_example_inputs)
def change_length_on_cuda(arrays: Arrays, length: int) -> Arrays:
    """Do the same in one kernel, for up to ARRAYS_PER_LAUNCH arrays with heads of whole loads."""
    batch, before = arrays[0].shape[:2]
    widths = [array.shape[2] * array.shape[3] * array.itemsize // LOAD_BYTES for array in arrays]
    missing = ARRAYS_PER_LAUNCH - len(arrays)
    outputs = [((batch, length, *array.shape[2:]), array.dtype) for array in arrays]
    loads = batch * length * max(widths)
    return launch_kernel(
        "change_length",
        [*arrays, *[arrays[0]] * missing],
        [*outputs, *[((0,), arrays[0].dtype)] * missing],
        [batch, before, length, *widths, *[0] * missing],
        blocks=(-(-loads // MAX_THREADS_PER_BLOCK), len(arrays)),
        dtypes=[arrays[0].dtype],
    )[: len(arrays)]


def make_padded_attention(
    change_length: ChangeLength, is_training: Callable[[], bool]
) -> Callable[..., mx.array]:
    """Make mlx-lm's scaled_dot_product_attention, padded inside if that lets it be fused."""

    def change(heads: Arrays, length: int) -> Arrays:
        """Change the length of heads (batch, heads, length, width), differentiably."""
        before = heads[0].shape[2]

        @mx.custom_function
        def changed(*arrays: mx.array) -> Any:
            return list(change_length(arrays, length))

        @changed.vjp
        def _(primals: Any, cotangents: Any, outputs: Any) -> Any:
            return tuple(change_length(cotangents, before))

        outputs: Any = changed(*(each.swapaxes(1, 2) for each in heads))
        return [each.swapaxes(1, 2) for each in outputs]

    def attention(  # noqa: PLR0917 -- mlx-lm calls it with its own function's arguments
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Any,
        scale: float,
        mask: Any,
        sinks: mx.array | None = None,
    ) -> mx.array:
        """Compute attention; arguments as in mlx-lm."""
        length = queries.shape[2]
        is_causal = isinstance(mask, str) and mask == "causal" and cache is None and sinks is None
        if is_causal and is_training() and _is_too_wide_to_be_fused(queries, keys, values):
            attend = mx.checkpoint(lambda q, k, v: attend_in_blocks(q, k, v, scale))
            return attend(queries, keys, values)
        missing = -length % FUSED_LENGTH_MULTIPLE
        if not (
            is_causal and missing and is_training() and _fits_fused_kernels(queries, keys, values)
        ):
            return cast(mx.array, plain_attention(queries, keys, values, cache, scale, mask, sinks))
        padded = change([queries, keys, values], length + missing)
        output = plain_attention(*padded, None, scale, mask)
        return change([output], length)[0]

    return attention


def _is_too_wide_to_be_fused(queries: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Tell whether MLX computes these heads' scores, four arrays, since no kernel takes them."""
    return (
        queries.dtype == keys.dtype == values.dtype
        and queries.dtype in FUSED_DTYPES
        and queries.shape[2] == keys.shape[2]
        and max(queries.shape[3], values.shape[3]) > LARGEST_FUSED_HEAD
    )


def _fits_fused_kernels(queries: mx.array, keys: mx.array, values: mx.array) -> bool:
    """Tell whether cuDNN would take these heads at another length, and ours can copy them."""
    return (
        queries.dtype == keys.dtype == values.dtype
        and queries.dtype in FUSED_DTYPES
        and queries.shape[2] == keys.shape[2]
        and all(
            heads.shape[3] <= LARGEST_FUSED_HEAD
            and heads.shape[3] * heads.itemsize % LOAD_BYTES == 0
            for heads in (queries, values)
        )
    )


def using_padded_attention(model: nn.Module) -> AbstractContextManager[None]:
    """Pad a model's causal attention while it trains in this context, on CUDA."""
    if not change_length_on_cuda.is_usable():
        return nullcontext()
    attention = make_padded_attention(change_length_on_cuda, lambda: bool(model.training))
    return replacing_function(model, PATCHED_FUNCTION_NAME, plain_attention, attention)
