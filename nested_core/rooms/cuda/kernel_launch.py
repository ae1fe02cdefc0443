"""CUDA sources of this folder: compiled once a machine, and launched by MLX among its own kernels.

MLX can compile a kernel itself, which takes a second for each of them in every process, for its own
headers are read each time; ours need none, and the compiled programs are kept in the user's cache.
MLX hashes a program at every launch (mlx/backend/cuda/custom_kernel.cpp), in time that grows with
its size: so programs are compressed, which the driver loads as well.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

import mlx.core as mx
import numpy as np

from nested_core.kernels.device_operations import MAX_TILES, RANKS_PER_TILE

KERNEL_DTYPE = mx.bfloat16  # of the arrays that kernels compute with
MAX_THREADS_PER_BLOCK = 256  # of a block, at most
MULTIPROCESSORS = 132  # of an H200; every GPU gets grids of its size, which are right on each
INCLUDE_PATTERN = re.compile(r'^#include "(\w+\.cuh)"\n', re.MULTILINE)
ELEMENTS_PER_LOAD = 8  # elements of a load: 16 bytes of bfloat16

ArraySpec = tuple[tuple[int, ...], mx.Dtype]  # shape and dtype


def launch_kernel(
    name: str,
    inputs: Sequence[mx.array],
    outputs: Sequence[ArraySpec],
    numbers: Sequence[int | float],
    *,
    blocks: Sequence[int],
    threads: int = MAX_THREADS_PER_BLOCK,
    dtypes: Sequence[mx.Dtype] = (KERNEL_DTYPE,),
    **macros: int,
) -> list[mx.array]:
    """Launch the kernel of `<name>.cu` and return its outputs, which are computed lazily.

    Args:
        name: of the source file and of the kernel in it.
        inputs: arrays of any strides; the kernel sees each row by row.
        outputs: shapes and dtypes of the arrays that the kernel fills.
        numbers: its scalar arguments, after the arrays; floats as float32.
        blocks: the grid in blocks: across, down, and planes where there are several.
        threads: of one block.
        dtypes: what the kernel reads the inputs as; the last one holds for all that follow.
        macros: constants that the kernel is compiled with.

    Raises:
        TypeError: an input is of another dtype, whose bytes the kernel would misread.
        RuntimeError: the kernel cannot be compiled. MLX raises it where a kernel cannot be loaded,
            when the arrays are computed.
    """
    given = [array.dtype for array in inputs]
    expected = [dtypes[min(place, len(dtypes) - 1)] for place in range(len(inputs))]
    if given != expected:
        raise TypeError(f"the CUDA kernel {name} reads {expected}, and was given {given}")
    across, down, *planes = blocks
    return mx.fast.precompiled_cuda_kernel(
        name=name,  # MLX tells programs of one name apart by what is in them
        compiled_source=compile_kernel(name, **macros),
        inputs=inputs,
        output_shapes=[shape for shape, _ in outputs],
        output_dtypes=[dtype for _, dtype in outputs],
        scalars=[n if isinstance(n, int) else round_to_float32(n) for n in numbers],
        grid=(across * threads, down, planes[0] if planes else 1),
        threadgroup=(threads, 1, 1),
        ensure_row_contiguous=True,
    )


def round_to_float32(number: float) -> float:
    """Return the nearest float32: MLX refuses other numbers."""
    return float(np.float32(number))


@cache
def compile_kernel(name: str, **macros: int) -> bytes:
    """Compile a source file for this machine's GPU and compress it; RuntimeError if that fails."""
    try:
        from cuda.core import Device, Program, ProgramOptions
        from cuda.core.utils import FileStreamProgramCache

        defined = [(macro, str(value)) for macro, value in macros.items()]
        options = ProgramOptions(arch=f"sm_{Device().arch}", define_macro=defined or None)
        program = Program(read_source_with_includes(f"{name}.cu"), "c++", options)
        try:
            cubin = program.compile("cubin", cache=FileStreamProgramCache())
        except OSError:  # nothing can be kept where the home is read-only
            cubin = program.compile("cubin")
        return compress_program(bytes(cubin.code), Device().arch)
    except ImportError as error:
        raise RuntimeError(f"{error}: install nested-tune[cuda]") from error
    except Exception as error:  # cuda.core's errors have no common base that is public
        raise RuntimeError(str(error)) from error


def compress_program(cubin: bytes, arch: str) -> bytes:
    """Return a fat binary of one program for `arch`, such as 90, as small as nvFatbin makes it."""
    from cuda.bindings import nvfatbin

    options = ["-64", "-cuda", "-compress=true", "-compress-mode=size"]
    handle = nvfatbin.create(options, len(options))
    try:
        nvfatbin.add_cubin(handle, cubin, len(cubin), arch, "")
        program = bytearray(nvfatbin.size(handle))
        nvfatbin.get(handle, program)
    finally:
        nvfatbin.destroy(handle)
    return bytes(program)


def read_source_with_includes(file: str) -> str:
    """Read a source file, its includes replaced by their text: the compiler sees no folder."""
    text = (files("nested_core.rooms.cuda") / file).read_text()
    return INCLUDE_PATTERN.sub(lambda include: read_source_with_includes(include[1]), text)


COMPILED_TILE_COUNTS = 1, 2, 3, 4, 6, MAX_TILES  # numbers of tiles that a kernel is compiled for


def tiles_of_smallest_kernel(rank: int) -> int:
    """Return the tiles of the smallest kernel that takes factors up to this rank."""
    return min(tiles for tiles in COMPILED_TILE_COUNTS if RANKS_PER_TILE * tiles >= rank)
