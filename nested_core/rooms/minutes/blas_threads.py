"""How many threads OpenBLAS has in a run of minutes, and in an export: as many as it had, or one.

On a machine that other programs use too, each product waits until all threads have had a core: a
token of an answer took 2.5 s with two threads and 0.5 s with one, beside four endless loops on two
cores. The last bits of a product may depend on the number, so that a run keeps it to its end.
"""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import mlx.core as mx

from nested_core.backend import find_openblas
from nested_core.config.schema import FineTuneConfig
from nested_core.models.parameters import in_evaluation_mode
from nested_core.models.session import Session
from nested_core.pipeline.device_lock import OnWait, locking_devices

THREADS_VARIABLE = "OPENBLAS_NUM_THREADS"
TRIED_TOKENS = 32  # of a pass: products between those of a training step and those of an answer
TRIED_PASSES = 3


def choose_blas_threads_of_run(
    config: FineTuneConfig, session: Session, on_wait: OnWait | None
) -> int | None:
    """Return what `choose_blas_threads` does with a run's base, while no other run computes."""
    with locking_devices(on_wait, session=session):
        model = session.load_base(config).model
        with in_evaluation_mode(model):
            return choose_blas_threads(model)


def choose_blas_threads(model: Any) -> int | None:
    """Return the number of OpenBLAS's threads that is quicker for a model: its present one, or 1.

    Both are measured by passes of the model. If OPENBLAS_NUM_THREADS is set, the present number is
    returned. None if MLX does not use OpenBLAS.
    """
    library = _open_library()
    if library is None:
        return None
    present = int(library.openblas_get_num_threads())
    if present == 1 or THREADS_VARIABLE in os.environ:
        return present
    tokens = mx.zeros((1, TRIED_TOKENS), dtype=mx.int32)
    mx.eval(model(tokens))  # compiles functions before the clock starts

    def seconds_with(count: int) -> float:
        """Return the seconds of the passes with so many threads."""
        with using_blas_threads(count):
            began = time.monotonic()
            for _ in range(TRIED_PASSES):
                mx.eval(model(tokens))
            return time.monotonic() - began

    return min((present, 1), key=seconds_with)


@contextmanager
def using_blas_threads(count: int | None) -> Iterator[None]:
    """Give OpenBLAS this number of threads in the block, here and in new processes.

    None changes nothing.
    """
    library = _open_library()
    if library is None or count is None:
        yield
        return
    threads, variable = library.openblas_get_num_threads(), os.environ.get(THREADS_VARIABLE)
    library.openblas_set_num_threads(count)
    os.environ[THREADS_VARIABLE] = str(count)
    try:
        yield
    finally:
        library.openblas_set_num_threads(threads)
        os.environ.pop(THREADS_VARIABLE)
        if variable is not None:
            os.environ[THREADS_VARIABLE] = variable


def using_quicker_blas_threads(model: Any) -> AbstractContextManager[None]:
    """Return a context in which OpenBLAS has the threads that `choose_blas_threads` chooses."""
    with in_evaluation_mode(model):
        count = choose_blas_threads(model)
    return using_blas_threads(count)


def _open_library() -> Any:
    """Return the OpenBLAS library that MLX computes with; None if it uses another one."""
    name = find_openblas()
    return None if name is None else ctypes.CDLL(name)
