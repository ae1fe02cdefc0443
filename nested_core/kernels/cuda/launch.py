"""Our CUDA kernels, in `cuda/`: compiled once a machine, and started by MLX among its own.

MLX can compile a kernel itself, which takes a second for each of them in every process, for its own
headers are read each time; ours need none, and what they become is kept in the user's cache. MLX
takes the hash of a program at every launch (mlx/backend/cuda/custom_kernel.cpp), 0.18 us for each
1,000 bytes: so programs are compressed to a third, which the driver loads as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import mlx.core as mx
import numpy as np

DTYPE = mx.bfloat16  # of the arrays that kernels compute with
THREADS = 256  # of a block, at most
MULTIPROCESSORS = 132  # of an H200, which grids are made for
INCLUDE = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)
WIDTH = 8  # elements of a load: 16 bytes of bfloat16

Shaped = tuple[tuple[int, ...], mx.Dtype]


def launch(
    name: str,
    inputs: Sequence[mx.array],
    outputs: Sequence[Shaped],
    numbers: Sequence[int | float],
    *,
    blocks: Sequence[int],
    threads: int,
    **macros: int,
) -> list[mx.array]:
    """What the kernel of `cuda/<name>.cu` gives, compiled with `macros`, in a grid of `blocks`.

    Inputs come to it row by row, whatever their strides. Raises RuntimeError where it cannot be
    compiled; MLX does where it cannot be loaded, when the arrays are computed.
    """
    across, down, *planes = blocks
    return mx.fast.precompiled_cuda_kernel(
        name=name,  # MLX tells programs of one name apart by what is in them
        compiled_source=compiled(name, **macros),
        inputs=inputs,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[each for _, each in outputs],
        scalars=[each if isinstance(each, int) else in_float32(each) for each in numbers],
        grid=(across * threads, down, planes[0] if planes else 1),
        threadgroup=(threads, 1, 1),
        ensure_row_contiguous=True,
    )


def in_float32(number: float) -> float:
    """The nearest number that is a float32: MLX refuses others."""
    return float(np.float32(number))


@cache
def compiled(name: str, **macros: int) -> bytes:
    """The program of a source file for this machine's GPU; RuntimeError says what is missing."""
    try:
        from cuda.core import Device, Program, ProgramOptions
        from cuda.core.utils import FileStreamProgramCache

        defined = [(macro, str(value)) for macro, value in macros.items()]
        options = ProgramOptions(arch=f"sm_{Device().arch}", define_macro=defined or None)
        program = Program(text_of(f"{name}.cu"), "c++", options)
        try:
            cubin = program.compile("cubin", cache=FileStreamProgramCache())
        except OSError:  # nothing can be kept where the home is read-only
            cubin = program.compile("cubin")
        return compressed(bytes(cubin.code), Device().arch)
    except ImportError as error:
        raise RuntimeError(f"{error}: install nested-tune[cuda]") from error
    except Exception as error:  # cuda.core's errors have no common base that is public
        raise RuntimeError(str(error)) from error


def compressed(cubin: bytes, arch: str) -> bytes:
    """A fat binary of one program for `arch`, such as 90, as small as it gets."""
    from cuda.bindings import nvfatbin

    options = ["-64", "-cuda", "-compress=true", "-compress-mode=size"]
    handle = nvfatbin.create(options, len(options))
    try:
        nvfatbin.add_cubin(handle, cubin, len(cubin), arch, "")
        found = bytearray(nvfatbin.size(handle))
        nvfatbin.get(handle, found)
    finally:
        nvfatbin.destroy(handle)
    return bytes(found)


def text_of(file: str) -> str:
    """A source file with what it includes in its place, for the compiler sees no folder."""
    text = (files("nested_core.kernels") / "cuda" / file).read_text()
    return INCLUDE.sub(lambda found: text_of(found[1]), text)
