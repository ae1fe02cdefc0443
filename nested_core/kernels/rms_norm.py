"""RMS normalisation's backward pass on CUDA without the gradient of a weight that is frozen.

MLX always computes both, in three kernels; with the weight frozen one is enough.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core import backend
from nested_core.kernels.cuda.launch import DTYPE, MULTIPROCESSORS, WIDTH, launch
from nested_core.kernels.cuda.self_check import disagreement, is_sound
from nested_core.kernels.patching import standing_in

MOST_THREADS = 128
PACKS = 1, 2, 4, 8, 16  # loads of a thread, for which there are kernels
BLOCKS = 8 * MULTIPROCESSORS  # at most: each takes row after row
LONGEST = PACKS[-1] * WIDTH * MOST_THREADS  # a row that a block keeps in registers

Backward = Callable[[mx.array, mx.array, float, mx.array], mx.array]


def plain_backward(x: mx.array, weight: mx.array, eps: float, g: mx.array) -> mx.array:
    """The gradient with respect to x, by MLX."""
    return mx.vjp(lambda x: mx.fast.rms_norm(x, weight, eps), [x], [g])[1][0]


def backward_on_cuda(x: mx.array, weight: mx.array, eps: float, g: mx.array) -> mx.array:
    """The same in one kernel, for bfloat16 and rows of a multiple of WIDTH elements."""
    n = x.shape[-1]
    threads = min(MOST_THREADS, -(-n // (32 * WIDTH)) * 32)
    packs = min(each for each in PACKS if each * WIDTH * threads >= n)
    return launch(
        "norm_back",
        [x, weight, g],
        [(x.shape, x.dtype)],
        [x.size // n, n, eps],
        blocks=(min(x.size // n, BLOCKS), 1),
        threads=threads,
        PACKS=packs,
    )[0]


def normed_by(module: nn.RMSNorm, backward: Backward) -> Callable[[mx.array], mx.array]:
    """A call in the place of a norm's own, for a weight that no gradient is taken of."""

    @mx.custom_function
    def norm(x: mx.array) -> Any:
        return mx.fast.rms_norm(x, module.weight, module.eps)

    @norm.vjp
    def _(x: mx.array, cotangent: mx.array, output: mx.array) -> Any:
        return backward(x, module.weight, module.eps, cotangent)

    def call(x: mx.array) -> mx.array:
        """The norm with our backward pass for arrays that its kernel takes, else MLX's own."""
        fits = x.shape[-1] % WIDTH == 0 and x.shape[-1] <= LONGEST
        if not fits or not x.dtype == module.weight.dtype == DTYPE:
            return mx.fast.rms_norm(x, module.weight, module.eps)
        function: Any = norm
        result: mx.array = function(x)
        return result

    return call


@contextmanager
def frozen_norms(model: nn.Module) -> Iterator[None]:
    """Have the backward pass of a model's frozen norms in one kernel while the block runs."""
    with ExitStack() as stack:
        for _, module in model.named_modules() if backend.has_cuda() else ():
            is_frozen = type(module) is nn.RMSNorm and not module.trainable_parameters()
            if is_frozen and _agrees_here(module.weight.size):
                call = normed_by(module, backward_on_cuda)
                stack.enter_context(standing_in(module, call))
        yield


@cache
def _agrees_here(width: int) -> bool:
    if width % WIDTH or width > LONGEST:
        return False
    return is_sound("norms", trouble_with(backward_on_cuda, width))


def trouble_with(backward: Backward, width: int = 2600) -> str | None:
    """What is wrong with such a function for rows of this width, or None; blocks take several."""
    keys = mx.random.split(mx.random.key(0), 3)
    rows = 2 * BLOCKS + 5
    shapes = (rows, width), (width,), (rows, width)
    parts = (
        mx.random.normal(s, key=k).astype(mx.bfloat16) for s, k in zip(shapes, keys, strict=True)
    )
    x, weight, g = parts
    return disagreement(
        lambda: [backward(x, weight, 1e-5, g)], [plain_backward(x, weight, 1e-5, g)]
    )
