"""What a process prepares before it imports MLX or transformers, and which device MLX uses.

The mlx wheel for Linux CPUs links the reference BLAS. A library opened with RTLD_GLOBAL before the
first `import mlx.core` replaces it, some thirty times faster in float32. MLX returns freed arrays
to the C library, which returns them to the system; glibc is told to keep more of them.

Nothing here happens on import: the command line, the flows, the tasks and every process that they
    start call `prepare`; a notebook may. In those processes transformers does not import torch
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import TYPE_CHECKING, Any, cast

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
SMALL_MODEL = 2 * 10**8  # weights, below
OPERATIONS_PER_COMMIT_BY_MODEL_SIZE = {SMALL_MODEL: "100", 9 * 10**8: "25"}
OPERATIONS_PER_COMMIT_OF_LARGE_MODELS = "8"
# Freed arrays, in bytes, that a process keeps on CUDA with a small model, where MLX would keep all:
# at 135M a whole command held 3.2 GB by NVML, with four times as much 3.7, and was no faster.
KEPT_BUFFERS_OF_SMALL_MODELS = 2**26

OPENBLAS_NAMES = ("libopenblas.so.0", "libopenblas.so")
NO_OPENBLAS_VARIABLE = "NESTED_TUNE_NO_OPENBLAS"
# Its threads wait for the next product in a loop, by default 2**26 cycles (20 ms), which is all of
# the time between two products of a small model; after 2**18 (0.1 ms) they sleep.
OPENBLAS_WAIT_VARIABLE = "OPENBLAS_THREAD_TIMEOUT"
OPENBLAS_WAIT = "18"
COMPILED_FUNCTION_TYPE = ("mlx.core", "_gc_func")  # the type of what mx.compile returns


_is_prepared = False
_openblas: str | None = None


def prepare() -> str | None:
    """Prepare this process for MLX, before anything imports mlx. Later calls do nothing.

    On Linux it opens OpenBLAS for MLX's build for CPUs (NESTED_TUNE_NO_OPENBLAS=1 leaves it out),
    sets MLX's variables for CUDA, and gives compiled kernels a private folder. If mlx was imported
    before, a RuntimeWarning says what is lost.

    Returns OpenBLAS's name, or None.
    """
    global _is_prepared, _openblas
    if not _is_prepared:
        _is_prepared = True
        atexit.register(_drop_compiled_functions_at_exit)
        _openblas = _prepare_linux() if sys.platform == "linux" else None
    return _openblas


def find_openblas() -> str | None:
    """Return the name of the OpenBLAS library that `prepare` opened; None if it did not."""
    return _openblas


@contextmanager
def collecting_no_garbage() -> Iterator[None]:
    """Switch the garbage collector off during a block that imports modules.

    The imported objects are then excluded from later collections (gc.freeze), because they stay for
    the life of the process. Collections were a fifth of the processor time of `import mlx_lm`
    (benchmarks/README.md).
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
    """Make transformers believe that torch is not installed, when it is first imported.

    Importing torch took 9 of 11 s on a machine with a GPU, and a tokenizer does not need it
    (benchmarks/README.md). Use it in nested-tune's own processes only, not in a notebook: the
    effect on transformers lasts, though other code can import torch. It does nothing if
    transformers was imported before.
    """
    if "transformers" not in sys.modules and _FinderOfTransformers not in sys.meta_path:
        sys.meta_path.insert(0, _FinderOfTransformers)


class _FinderOfTransformers:
    """An import finder that loads transformers by `_LoaderWithoutTorch`."""

    @staticmethod
    def find_spec(
        name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the import spec of transformers with our loader; None for any other module."""
        spec = PathFinder.find_spec(name, path, target) if name == "transformers" else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _LoaderWithoutTorch(spec.loader.name, spec.loader.path)
        return spec


class _LoaderWithoutTorch(SourceFileLoader):
    """Executes a package's __init__ while torch cannot be imported."""

    def exec_module(self, module: ModuleType) -> None:
        """Execute the module with torch blocked in sys.modules, and unblock it afterwards."""
        modules: dict[str, ModuleType | None] = sys.modules  # type: ignore[assignment]
        modules.setdefault("torch", None)  # Python's own mark of a module that is not to be found
        try:
            super().exec_module(module)
        finally:
            if modules["torch"] is None:
                del modules["torch"]


def warn_if_unprepared() -> None:
    """Warn on Linux if `prepare` was not called, so that training is slow."""
    if not _is_prepared and sys.platform == "linux" and not os.environ.get(NO_OPENBLAS_VARIABLE):
        warnings.warn(
            "nested_core.backend.prepare() was not called in this process. Without OpenBLAS, MLX "
            "on a Linux CPU trains some ten times slower; on CUDA each step starts its kernels "
            "more slowly. Call it before anything imports mlx.",
            RuntimeWarning,
            stacklevel=2,
        )


@dataclass(frozen=True)
class KernelFolder:
    """A room's folder for the kernels that MLX compiles.

    use: has MLX compile this process's kernels there.
    """

    use: Callable[[], object]


def _prepare_linux() -> str | None:
    """Prepare a Linux process: kernel folder, CUDA variables or memory, and OpenBLAS.

    Returns the name of the OpenBLAS library that was opened; None for none.
    """
    came_too_late = "mlx.core" in sys.modules
    for folder in seams.load_all(KernelFolder):
        folder.use()
    if is_mlx_built_for_cuda():
        for variable, value in {CUDA_GRAPHS_VARIABLE: "0", **ATTENTION_CACHE_SIZES}.items():
            os.environ.setdefault(variable, value)
    else:
        keep_freed_memory()
    if os.environ.get(NO_OPENBLAS_VARIABLE):
        return None
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
        return None
    return _open_openblas()


def _open_openblas() -> str | None:
    """Open OpenBLAS with its symbols for the whole process; None if the system does not have it."""
    os.environ.setdefault(OPENBLAS_WAIT_VARIABLE, OPENBLAS_WAIT)  # read when the library is opened
    for name in OPENBLAS_NAMES:
        try:
            ctypes.CDLL(name, ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return None


def prepare_for_model_size(weight_count: int) -> None:
    """Set how MLX uses a CUDA device, by the number of the model's weights.

    Does nothing without CUDA, and in a process that has not called `prepare`. Sets two things:

    - How many operations MLX sends to the device at once (a commit). The kernels of a large model
      are long: with many of them in a commit the host runs ahead of the device and holds memory.
      MLX reads this environment variable when a process first computes an array. If the variable is
      set already, its value stays.
    - For a small model, how many bytes of freed arrays MLX keeps for reuse.
    """
    if not _is_prepared or not is_mlx_built_for_cuda():
        return
    limits = OPERATIONS_PER_COMMIT_BY_MODEL_SIZE.items()
    allowed = (operations for max_weights, operations in limits if weight_count < max_weights)
    operations = next(allowed, OPERATIONS_PER_COMMIT_OF_LARGE_MODELS)
    os.environ.setdefault(OPERATIONS_PER_COMMIT_VARIABLE, operations)
    if weight_count < SMALL_MODEL:
        import mlx.core as mx

        mx.set_cache_limit(KEPT_BUFFERS_OF_SMALL_MODELS)


def is_mlx_built_for_cuda() -> bool:
    """Return whether the installed MLX is a build for CUDA."""
    return any(any(metadata.distributions(name=package)) for package in CUDA_PACKAGES)


def keep_freed_memory() -> None:
    """Tell glibc to keep freed memory for reuse (mallopt(3)); do nothing with another C library."""
    if library := _find_glibc():
        library.mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        library.mallopt(M_TRIM_THRESHOLD, TRIM_THRESHOLD_BYTES)


def release_freed_memory() -> None:
    """Give freed memory back to the system (malloc_trim(3)); only with glibc."""
    if library := _find_glibc():
        library.malloc_trim(0)


def _find_glibc() -> Any:
    """Return this process's C library; None for another than glibc."""
    library = ctypes.CDLL(None)
    return library if hasattr(library, "gnu_get_libc_version") else None


def _drop_compiled_functions_at_exit() -> None:
    """Remove compiled functions, such as mlx.nn's activations, from all modules at exit.

    MLX keeps the traces of a compiled function in a cache of the thread, and the main thread's
    cache is destroyed after Python has ended. A function that still exists then, because a waiting
    thread can reach it, leaves Python objects in that cache, and the process dies of SIGSEGV (mlx
    0.32.4: CompileCache, and PyCompiledFun in python/src/transforms.cpp). Prefect's threads cause
    that in a worker's runs.
    """
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", {})
        for name, value in list(names.items()):
            if (type(value).__module__, type(value).__name__) == COMPILED_FUNCTION_TYPE:
                names[name] = None


def computes_on_cuda() -> bool:
    """Return whether MLX computes on a CUDA device."""
    import mlx.core as mx

    return device() == "gpu" and mx.cuda.is_available()


def device() -> str:
    """Return MLX's default device, "cpu" or "gpu"."""
    import mlx.core as mx

    return "gpu" if mx.default_device() == mx.Device(mx.gpu) else "cpu"


def device_name() -> str:
    """Return the default device's kind, "cpu" or "gpu", and MLX's name for it."""
    import mlx.core as mx

    return " ".join([device(), str(mx.device_info().get("device_name", ""))]).strip()


def device_memory_bytes() -> int:
    """Return how many bytes the default device can hold.

    On Metal the recommended maximum, on CUDA the device's total, on a CPU main memory.
    """
    import mlx.core as mx

    if device() == "gpu":
        info = mx.device_info()
        keys = ("max_recommended_working_set_size", "total_memory", "memory_size")
        return int(next(info[key] for key in keys if key in info))
    return main_memory_bytes()


def can_compile_kernels() -> bool:
    """Return whether `mx.compile` can fuse kernels here; on a Linux CPU it needs g++."""
    return device() == "gpu" or sys.platform == "darwin" or shutil.which("g++") is not None


def to_float(value: mx.array) -> float:
    """Convert a scalar array to a Python float, exact up to float32; waits for the device."""
    return float(cast(float, value.item()))


def to_int(value: mx.array) -> int:
    """Convert a scalar array to a Python int; waits for the device."""
    return int(cast(int, value.item()))
