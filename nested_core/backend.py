"""The MLX backend made ready: OpenBLAS put in front on Linux CPUs, before mlx is first imported.

The mlx wheel for Linux CPUs links the reference BLAS. A library opened with RTLD_GLOBAL before the
first `import mlx.core` answers in its place, some thirty times faster in float32.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import sys
from functools import cache

OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")
DISABLE_VARIABLE = "NESTED_TUNE_NO_OPENBLAS"


@cache
def prepare() -> str | None:
    """Open OpenBLAS for the whole process and return its name, or None where there is none.

    It does nothing on macOS, where MLX uses Metal and Accelerate, nor when the environment
    variable NESTED_TUNE_NO_OPENBLAS is set (the benchmarks compare with and without).
    """
    if sys.platform != "linux" or os.environ.get(DISABLE_VARIABLE):
        return None
    for name in OPENBLAS_NAMES:
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def device() -> str:
    """The default device of MLX, "cpu" or "gpu"."""
    import mlx.core as mx

    return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"


def compiles_kernels() -> bool:
    """Whether `mx.compile` fuses kernels here; on a Linux CPU it calls g++ at the trace."""
    return device() == "gpu" or sys.platform == "darwin" or shutil.which("g++") is not None
