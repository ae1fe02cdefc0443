"""The MLX backend made ready before mlx is first imported: OpenBLAS, memory, CUDA.

The mlx wheel for Linux CPUs links the reference BLAS. A library opened with RTLD_GLOBAL before the
first `import mlx.core` answers in its place, some thirty times faster in float32. MLX gives freed
arrays back to the C library, and that to the system: glibc is asked to keep more of them.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import shutil
import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, cast

if TYPE_CHECKING:
    import mlx.core as mx

CUDA_PACKAGES = ("mlx-cuda-13", "mlx-cuda-12")
M_MMAP_THRESHOLD, M_TRIM_THRESHOLD = -3, -1  # malloc.h
LARGEST_THRESHOLD, KEPT_BYTES = 32 * 2**20, 2**30
GRAPHS_VARIABLE, NO_GRAPHS = "MLX_USE_CUDA_GRAPHS", "0"
COMMIT_VARIABLE = "MLX_MAX_OPS_PER_BUFFER"
OPERATIONS = {2 * 10**8: "100", 10**9: "25"}  # of a commit, for models of fewer weights than that
OPERATIONS_IF_LARGER = "8"
OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")
CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
COMPILED = ("mlx.core", "_gc_func")  # the type of what mx.compile returns
DISABLE_VARIABLE = "NESTED_TUNE_NO_OPENBLAS"


@cache
def prepare() -> str | None:
    """Open OpenBLAS for the whole process and return its name, or None where there is none.

    Where MLX is the build for CUDA, kernels are started without graphs, unless somebody has chosen
    (`choose_commits` says why); where it is the one for CPUs, freed memory stays with the process,
    up to 1 GiB.

    No OpenBLAS is opened on macOS, where MLX uses Metal and Accelerate, nor when the environment
    variable NESTED_TUNE_NO_OPENBLAS is set (the benchmarks compare with and without). On every
    platform the process ends in order: see `_drop_compiled_functions`.
    """
    atexit.register(_drop_compiled_functions)
    if sys.platform != "linux":
        return None
    if is_for_cuda():
        os.environ.setdefault(GRAPHS_VARIABLE, NO_GRAPHS)
    else:
        _keep_freed_memory()
    if os.environ.get(DISABLE_VARIABLE):
        return None
    for name in OPENBLAS_NAMES:
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def choose_commits(weights: int) -> None:
    """Say how many operations MLX commits to a CUDA device at once, for a model of so many weights.

    MLX looks when a process first computes an array; whoever has set the variable decides. Where
    kernels are short, starting them is what takes the time, and each commit and each graph costs
    (0.5B, 4 x 512, H200 with slow CPU cores, mlx 0.32.4: 54 ms a step with graphs of 25 operations,
    48 without graphs, 34 with 100 operations a commit). But the host may be ten commits ahead, and
    memory is used again once what was committed has run. 0.5B took 3.9 to 5.6 GiB with 100
    operations, the more the faster the host, and 4.0 with 25, in 1.06 times the time; 7B takes 37.4
    with 20 and 32.6 with 8, in 1.01 times (1.7B: 15.0 with 16, 13.1 with 8, in the same time).
    """
    if is_for_cuda():
        chosen = (each for most, each in OPERATIONS.items() if weights < most)
        os.environ.setdefault(COMMIT_VARIABLE, next(chosen, OPERATIONS_IF_LARGER))


def is_for_cuda() -> bool:
    """Whether the MLX that is installed is a build for CUDA."""
    return any(map(_is_installed, CUDA_PACKAGES))


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def _keep_freed_memory() -> None:
    """Have glibc use freed memory again (mallopt(3)); another C library goes its own way."""
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_THRESHOLD)
        library.mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)


def _drop_compiled_functions() -> None:
    """Let go of what modules hold compiled, such as mlx.nn's activations.

    A thread's cache of traces is destroyed with the thread, the main one's after Python has ended;
    a function that has not gone by then, since a thread still waits somewhere with a way to it,
    leaves Python objects there and the process dies of SIGSEGV (mlx 0.32.4: CompileCache, and
    PyCompiledFun in python/src/transforms.cpp). Prefect's threads do that in a worker's runs.
    """
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        for name, value in list(names.items()):
            if (type(value).__module__, type(value).__name__) == COMPILED:
                names[name] = None


def has_cuda() -> bool:
    """Whether MLX computes on a CUDA device."""
    import mlx.core as mx

    return device() == "gpu" and mx.cuda.is_available()


def device() -> str:
    """The default device of MLX, "cpu" or "gpu"."""
    import mlx.core as mx

    return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"


def memory_bytes() -> int:
    """What the default device can hold: what Metal recommends, CUDA's total, or main memory."""
    import mlx.core as mx

    if device() == "gpu":
        info = mx.device_info()
        keys = ("max_recommended_working_set_size", "total_memory", "memory_size")
        return int(next(info[key] for key in keys if key in info))
    return main_memory_bytes()


@cache
def main_memory_bytes() -> int:
    """Main memory; a container's own limit counts as that (cgroup v2, memory.max)."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    allowed = CGROUP_LIMIT.read_text().strip() if CGROUP_LIMIT.exists() else ""
    return min(installed, int(allowed)) if allowed.isdigit() else installed


def compiles_kernels() -> bool:
    """Whether `mx.compile` fuses kernels here; on a Linux CPU it calls g++ at the trace."""
    return device() == "gpu" or sys.platform == "darwin" or shutil.which("g++") is not None


def to_float(value: mx.array) -> float:
    """A scalar array as a Python float, exact up to float32; this waits for the device."""
    return float(cast(float, value.item()))


def to_int(value: mx.array) -> int:
    """A scalar array as a Python int; this waits for the device."""
    return int(cast(int, value.item()))
