"""A machine's first kernels for CUDA, compiled in several processes before the first step.

MLX compiles a kernel when it first computes with it, one after the other on one core, which is
most of a first run of a few minutes (benchmarks/README.md). So each of several processes,
`kernel_worker`, computes one part of the run in small, on a base whose layers share their weights.
What they compile is recorded as every process records it, and this one takes it over.
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from nested_core import backend
from nested_core.config.loading import render_config
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import ContinualSection, RegistrySection
from nested_core.data.parallel_jobs import count_usable_cores
from nested_core.errors import ChildFailed, NestedTuneError, shorten
from nested_core.models.base_model import model_compute_dtype
from nested_core.models.session import Session
from nested_core.pipeline.device_lock import locking_devices
from nested_core.pipeline.processes import count_processes
from nested_core.pipeline.run_in_progress import AroundRun, RunInProgress
from nested_core.process.child import Child
from nested_core.rooms.kernel_folder import compiled_kernels
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.user_tmpdir import environment_with_user_tmpdir
from nested_core.text.duration_format import format_clock

PARTS = ("evaluation", "gradients", "updates", "answers")
WORKER: str | Path = "nested_core.rooms.kernel_folder.kernel_worker:answer"
SECONDS_BETWEEN_LOOKS = 0.05
MAX_SECONDS = 600.0  # after which a process is ended, and its kernels are compiled when needed

_log = logging.getLogger(__name__)


def compiling_kernels_of(work: RunInProgress) -> AbstractContextManager[None]:
    """Return the context that compiles the first kernels of a run."""
    return compiling_first_kernels(work.config, work.run, work.steps.on_message, work.session)


@contextmanager
def compiling_first_kernels(
    config: FineTuneConfig, run: RunDirectory, on_message: Callable[[str], None], session: Session
) -> Iterator[None]:
    """Compile a run's kernels within the block if this machine has none.

    The run's data is validated by then; training waits by the session. Waits for the device, and
    holds it while the processes are started. Where they cannot be, a log line says why.
    """
    if not are_worth_compiling_ahead(config, run):
        yield
        return
    try:
        with locking_devices(on_message, session=session):
            started = FirstKernels(config, run, on_message)
    except OSError as error:
        _log.warning("MLX's kernels are compiled as they are needed, and not ahead: %s", error)
        yield
        return
    session.await_kernels = started.take
    try:
        yield
    finally:
        session.await_kernels = None
        started.end()


def are_worth_compiling_ahead(config: FineTuneConfig, run: RunDirectory) -> bool:
    """Return whether a run computes on CUDA, with no kernel kept, in one process, on cores enough.

    Under `full`, and under DoRA at a precision of its own, layers do not share their weights;
    measured importances take a pass over the data; a limit of memory is one for each process.
    """
    has_shared_layers = config.fine_tune_type == "lora" or (
        config.fine_tune_type == "dora" and model_compute_dtype(config) is None
    )
    return (
        compiled_kernels.began_without_kernels()
        and backend.computes_on_cuda()
        and count_usable_cores() > len(PARTS)
        and count_processes(config) == 1
        and has_shared_layers
        and config.training.memory_limit_gb is None
        and config.nested.strategy != "parameter_importance"
        and not run.result.exists()
    )


class FirstKernels:
    """The processes that compile a run's kernels, one a part, each with a folder of its own."""

    def __init__(
        self, config: FineTuneConfig, run: RunDirectory, on_message: Callable[[str], None]
    ) -> None:
        self._on_message = on_message
        self._began = time.monotonic()
        self._folder = TemporaryDirectory(
            prefix="nested-tune-first-kernels-", ignore_cleanup_errors=True
        )
        self._processes: dict[str, Child] = {}
        on_message(
            f"kernels: MLX has compiled none on this machine yet: {len(PARTS)} processes compile "
            f"those of evaluation, gradients, updates and answers"
        )
        try:
            for part in PARTS:
                folder = Path(self._folder.name, part)
                write_small_run(config, run, part, folder)
                self._processes[part] = start_worker(part, folder)
        except BaseException:
            self.end()
            raise

    def take(self, is_stop_requested: Callable[[], bool]) -> None:
        """Wait for all, and take over what they compiled; say so, and who failed."""
        if not self._processes:  # taken before
            return
        deadline = self._began + MAX_SECONDS
        for part, process in self._processes.items():
            try:
                while not process.has_answer(SECONDS_BETWEEN_LOOKS):
                    if is_stop_requested():
                        self._end_processes()
                        return
                    if time.monotonic() > deadline:
                        raise ChildFailed(f"it took more than {MAX_SECONDS:g} seconds")  # noqa: TRY301
                process.receive()
                process.finish()  # which records what it compiled
            except (NestedTuneError, OSError, MemoryError) as error:
                _log.warning(
                    "The kernels of %s are compiled as they are needed: the process that was to "
                    "compile them ahead failed: %s",
                    part,
                    shorten(error, 300),
                )
        self._end_processes()
        try:
            count = compiled_kernels.take_recorded_kernels()
        except (NestedTuneError, OSError) as error:
            _log.warning("MLX's kernels that were compiled ahead cannot be used: %s", error)
            return
        taken = format_clock(time.monotonic() - self._began)
        self._on_message(f"kernels: {count} were compiled ahead in {taken}, and are kept")

    def _end_processes(self) -> None:
        for process in self._processes.values():
            process.end()
        self._processes = {}

    def end(self) -> None:
        """End the processes that are left, and remove their folders."""
        self._end_processes()
        self._folder.cleanup()


def write_small_run(config: FineTuneConfig, run: RunDirectory, part: str, folder: Path) -> None:
    """Write a run directory that has as much of a run as a part needs: batches of one row."""
    small = config.model_copy(
        update={
            "batch_size": 1,
            "iters": max(config.nested.frequencies) * config.grad_accumulation_steps,
            "val_batches": min(1, abs(config.val_batches)) if part == "evaluation" else 0,
            "training": config.training.model_copy(update={"epochs": None}),
            "continual": ContinualSection(),
            "registry": RegistrySection(),
            "adapter_path": None,
            "report_to": None,
        }
    )
    folder.mkdir()
    target = RunDirectory(folder)
    target.config.write_bytes(render_config(small))
    shutil.copyfile(run.dataset, target.dataset)


def start_worker(part: str, folder: Path) -> Child:
    """Start the process of a part."""
    worker = Child(WORKER, environment=environment_with_user_tmpdir())
    worker.send({"part": part, "folder": str(folder)})
    return worker


AROUND = AroundRun(training=compiling_kernels_of)
