"""What a process makes ready before it imports MLX or transformers, and what MLX computes on.

The mlx wheel for Linux CPUs links the reference BLAS. A library opened with RTLD_GLOBAL before the
first `import mlx.core` answers in its place, some thirty times faster in float32. MLX returns freed
arrays to the C library, and that returns them to the system: glibc is asked to keep more of them.
Nothing here happens on import: the command line, the flows, the tasks and every process that they
start call `prepare`; a notebook may. transformers is to find no torch in those processes
(`hide_torch_from_transformers`).
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, cast

from nested_core import seams
from nested_core.storage.main_memory import main_memory_bytes

if TYPE_CHECKING:
    import mlx.core as mx

CUDA_PACKAGES = ("mlx-cuda-13", "mlx-cuda-12")
# Those whose versions may change a run's numbers.
RECORDED_PACKAGES = (
    *("nested-tune", "mlx", "mlx-lm", "transformers", "tokenizers", "jinja2"),
    *("safetensors", "numpy"),
)

# Options of glibc's mallopt(3), and the values that they are given.
M_TRIM_THRESHOLD = -1
M_MMAP_THRESHOLD = -3
LARGEST_MMAP_THRESHOLD = 32 * 2**20  # bytes; glibc allows no more
TRIM_THRESHOLD_BYTES = 2**30

# MLX's variables for CUDA, and how many operations a commit has, for models of fewer weights than
# the key: how they were measured is in benchmarks/README.md, "Kernels without graphs".
CUDA_GRAPHS_VARIABLE = "MLX_USE_CUDA_GRAPHS"
# How many plans of attention MLX keeps, one for each shape; by default 256 and 64. Once a process
# has made twice as many, MLX raises "Cache thrashing is happening".
ATTENTION_CACHE_SIZES = {
    "MLX_CUDA_SDPA_CACHE_SIZE": "8192",
    "MLX_CUDA_SDPA_BACKWARD_CACHE_SIZE": "256",
}
OPERATIONS_PER_COMMIT_VARIABLE = "MLX_MAX_OPS_PER_BUFFER"
OPERATIONS_PER_COMMIT_BY_MODEL_SIZE = {2 * 10**8: "100", 9 * 10**8: "25"}
OPERATIONS_PER_COMMIT_OF_LARGE_MODELS = "8"

OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")
NO_OPENBLAS_VARIABLE = "NESTED_TUNE_NO_OPENBLAS"
# Its threads wait for the next product in a loop, by default 2**26 cycles (20 ms), which is all of
# the time between two products of a small model; after 2**18 (0.1 ms) they sleep.
OPENBLAS_WAIT_VARIABLE = "OPENBLAS_THREAD_TIMEOUT"
OPENBLAS_WAIT = "18"
COMPILED_FUNCTION_TYPE = ("mlx.core", "_gc_func")  # the type of what mx.compile returns


@dataclass(frozen=True)
class Preparation:
    """What `prepare` did for this process.

    blas: the name of the OpenBLAS library that answers for MLX, or None.
    came_too_late: whether mlx was imported before, and keeps the BLAS that it had then.
    """

    blas: str | None
    came_too_late: bool


_preparation: Preparation | None = None


def prepare() -> Preparation:
    """Make this process ready for MLX; call it before anything imports mlx. Later calls do nothing.

    On Linux kernels are compiled into a folder of this process alone (the room kernel_folder).
    With the MLX build for CPUs, it also opens OpenBLAS for the whole process, if the system has
    it. Its idle threads soon sleep, unless OPENBLAS_THREAD_TIMEOUT is set. Freed memory up to 1 GiB
    stays with the process. With the build for CUDA, kernels are started without graphs, and plans
    of attention are kept for thousands of shapes, unless MLX_USE_CUDA_GRAPHS and
    MLX_CUDA_SDPA_CACHE_SIZE are set. On macOS, where MLX uses Metal and Accelerate, none of this is
    needed. Compiled functions are dropped when the process ends, on every platform
    (`_drop_compiled_functions_at_exit`).

    NESTED_TUNE_NO_OPENBLAS=1 leaves OpenBLAS out. If mlx was imported before, a RuntimeWarning says
    what can no longer be done.
    """
    global _preparation
    if _preparation is None:
        atexit.register(_drop_compiled_functions_at_exit)
        _preparation = _prepare_linux() if sys.platform == "linux" else Preparation(None, False)
    return _preparation


def get_process_preparation() -> Preparation | None:
    """What `prepare` did for this process, or None if it was not called."""
    return _preparation


@contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """Look for no garbage in cycles within the block, which is to import modules.

    What it imported is left out of later collections too, for it stays: Python looked through all
    of it several times, and twice more when the process ended, which was a fifth of the processor
    time of `import mlx_lm` (benchmarks/README.md).
    """
    was_enabled = gc.isenabled()
    module_count = len(sys.modules)
    gc.disable()
    try:
        yield
    finally:
        if len(sys.modules) > module_count:  # else this would keep the caller's garbage for ever
            gc.freeze()
        if was_enabled:
            gc.enable()


def hide_torch_from_transformers() -> None:
    """Have transformers find no torch when this process first imports it, through mlx_lm or not.

    Where transformers finds torch it imports it, with whatever of its own needs torch, and neither
    is needed for a tokenizer: on a machine with a GPU that was 9 of 11 s (benchmarks/README.md).
    For the processes of nested-tune alone, not for a notebook: in this one transformers says from
    then on that there is no torch. Anything else can import it. Where torch or transformers were
    imported before, that stays.
    """
    if "transformers" not in sys.modules and _FinderOfTransformers not in sys.meta_path:
        sys.meta_path.insert(0, _FinderOfTransformers)


class _FinderOfTransformers:
    """Finds transformers where Python would, and has it loaded by `_LoaderWithoutTorch`."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The place of transformers; None for any other module."""
        spec = PathFinder.find_spec(name, path, target) if name == "transformers" else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LoaderWithoutTorch(spec.loader.name, spec.loader.path)
        return spec


class _LoaderWithoutTorch(SourceFileLoader):
    """Runs a package's __init__ while torch cannot be found; transformers keeps what it finds."""

    def exec_module(self, module: ModuleType) -> None:
        """Run it; torch can be imported again afterwards, whatever came of it."""
        modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
        modules.setdefault("torch", None)  # Python's own mark of a module that is not to be found
        try:
            super().exec_module(module)
        finally:
            if modules["torch"] is None:
                del modules["torch"]


def warn_if_unprepared() -> None:
    """Warn that training in this process is slow because `prepare` was not called."""
    if (
        _preparation is None
        and sys.platform == "linux"
        and not os.environ.get(NO_OPENBLAS_VARIABLE)
    ):
        warnings.warn(
            "nested_core.backend.prepare() was not called in this process. Without OpenBLAS, MLX "
            "on a Linux CPU trains some twenty times slower; on CUDA each step starts its kernels "
            "more slowly. Call it before anything imports mlx.",
            RuntimeWarning,
            stacklevel=2,
        )


def _prepare_linux() -> Preparation:
    came_too_late = "mlx.core" in sys.modules
    for use_private_kernel_folder in seams.load_all("kernel_folder"):
        use_private_kernel_folder()
    if is_mlx_built_for_cuda():
        for variable, value in {CUDA_GRAPHS_VARIABLE: "0", **ATTENTION_CACHE_SIZES}.items():
            os.environ.setdefault(variable, value)
    else:
        keep_freed_memory()
    if os.environ.get(NO_OPENBLAS_VARIABLE):
        return Preparation(None, came_too_late)
    if came_too_late:
        lost = (
            "kernels may be started through CUDA graphs"
            if is_mlx_built_for_cuda()
            else "it keeps the BLAS that it has, which may be thirty times slower than OpenBLAS"
        )
        warnings.warn(
            f"nested_core.backend.prepare() was called after mlx was imported: {lost}. Call it "
            f"before anything imports mlx.",
            RuntimeWarning,
            stacklevel=3,
        )
        return Preparation(None, came_too_late)
    return Preparation(_open_openblas(), came_too_late)


def _open_openblas() -> str | None:
    """Open OpenBLAS with its symbols for the whole process; None if the system has none."""
    os.environ.setdefault(OPENBLAS_WAIT_VARIABLE, OPENBLAS_WAIT)  # read when the library is opened
    for name in OPENBLAS_NAMES:
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def set_operations_per_commit(weight_count: int) -> None:
    """Set how many operations MLX commits to a CUDA device at once, by a model's weights.

    Few operations cost time where kernels are short; many let the host run ahead of the device and
    hold memory. MLX reads the variable when a process first computes an array. A variable that is
    set already stays, and a process that was not prepared is left alone.
    """
    if _preparation is not None and is_mlx_built_for_cuda():
        limits = OPERATIONS_PER_COMMIT_BY_MODEL_SIZE.items()
        fitting = (operations for most, operations in limits if weight_count < most)
        os.environ.setdefault(
            OPERATIONS_PER_COMMIT_VARIABLE, next(fitting, OPERATIONS_PER_COMMIT_OF_LARGE_MODELS)
        )


def is_mlx_built_for_cuda() -> bool:
    """Whether the MLX that is installed is a build for CUDA."""
    return any(map(_is_installed, CUDA_PACKAGES))


def _is_installed(package: str) -> bool:
    try:
        metadata.distribution(package)
    except metadata.PackageNotFoundError:
        return False
    return True


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory, by mallopt(3); any other C library is left alone."""
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        library.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)


def _drop_compiled_functions_at_exit() -> None:
    """Remove compiled functions, such as mlx.nn's activations, from all modules at exit.

    MLX keeps the traces of a compiled function in a cache of the thread, and the main thread's is
    destroyed after Python has ended. A function that still exists then, because a thread that waits
    can reach it, leaves Python objects in that cache, and the process dies of SIGSEGV (mlx 0.32.4:
    CompileCache, and PyCompiledFun in python/src/transforms.cpp). Prefect's threads do that in the
    runs of a worker.
    """
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        for name, value in list(names.items()):
            if (type(value).__module__, type(value).__name__) == COMPILED_FUNCTION_TYPE:
                names[name] = None


def computes_on_cuda() -> bool:
    """Whether MLX computes on a CUDA device."""
    import mlx.core as mx

    return device() == "gpu" and mx.cuda.is_available()


def device() -> str:
    """The default device of MLX, "cpu" or "gpu"."""
    import mlx.core as mx

    return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"


def device_name() -> str:
    """The default device's kind, "cpu" or "gpu", and what MLX calls it."""
    import mlx.core as mx

    return " ".join([device(), str(mx.device_info().get("device_name", ""))]).strip()


def device_memory_bytes() -> int:
    """Bytes that the default device can hold: as Metal recommends, CUDA's total, or main memory."""
    import mlx.core as mx

    if device() == "gpu":
        info = mx.device_info()
        keys = ("max_recommended_working_set_size", "total_memory", "memory_size")
        return int(next(info[key] for key in keys if key in info))
    return main_memory_bytes()


def can_compile_kernels() -> bool:
    """Whether `mx.compile` fuses kernels here; on a Linux CPU it calls g++ at the trace."""
    return device() == "gpu" or sys.platform == "darwin" or shutil.which("g++") is not None


def to_float(value: mx.array) -> float:
    """A scalar array as a Python float, exact up to float32; this waits for the device."""
    return float(cast(float, value.item()))


def to_int(value: mx.array) -> int:
    """A scalar array as a Python int; this waits for the device."""
    return int(cast(int, value.item()))
