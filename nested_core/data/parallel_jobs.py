"""Run jobs on all cores: worker processes that receive requests as JSON and answer with JSON.

Small work is done in this process, by the same functions.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from nested_core.backend import keep_freed_memory
from nested_core.errors import ChildFailed, DataWorkerFailed
from nested_core.models.tokenizer_cell import ONE_CORE, TokenizerCell, ask_kept_cell
from nested_core.process.child import Child
from nested_core.process.child_main import load_function
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular
from nested_core.storage.user_tmpdir import environment_with_user_tmpdir

MIN_BYTES_FOR_WORKERS = 16 * 2**20  # below this, starting processes takes longer than the work
OnProgress = Callable[[str, int, int], None]  # what is done, how much of it, of how much


class ByteRange(NamedTuple):
    """A range of bytes of a file, [start, end), that begins and ends at a line end."""

    start: int
    end: int


def count_usable_cores() -> int:
    """Return how many cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_processes_for(size: int) -> int:
    """Return how many processes are worthwhile for `size` bytes of work: at most one a core."""
    return max(1, min(count_usable_cores(), size // MIN_BYTES_FOR_WORKERS))


def cut_file_into_line_ranges(path: Path, size: int) -> list[ByteRange]:
    """Cut a file into ranges of whole lines, of about `size` bytes each."""
    ranges = []
    start = 0
    with open_regular(path, UNBOUNDED, follow_links=True) as (file, total):
        while start < total:
            file.seek(min(total, start + size) - 1)
            file.readline()
            end = min(total, file.tell())
            ranges.append(ByteRange(start, end))
            start = end
    return ranges


def run_job(request: dict[str, Any]) -> dict[str, object]:
    """Call the function named by request["job"] ("package.module:function") with the request.

    Requests and answers are JSON objects; large data is in files that the request names.
    """
    answer: dict[str, object] = load_function(request["job"])(request)  # type: ignore[assignment]
    return answer


def run_jobs(
    requests: Sequence[dict[str, object]],
    *,
    processes: int,
    on_done: Callable[[int], None] = lambda _: None,
    in_cells: bool = False,
) -> Iterator[dict[str, Any]]:
    """Run the requests in worker processes; yield their answers in the order of the requests.

    on_done: called with the number of answers so far, before each is yielded.
    in_cells: whether the processes have limits, as the jobs use a tokenizer (`TokenizerCell`).

    With one process the work is done here, or in the cell that this process keeps.

    Raises what a job raised if it is a NestedTuneError or an OSError, else DataWorkerFailed with
    the last lines that the process printed. All worker processes end with the iterator; close()
    ends it early.
    """
    processes = min(processes, len(requests))
    if processes < 2:
        ask = ask_kept_cell if in_cells else run_job
        for done, request in enumerate(requests, start=1):
            answer = ask(request)
            on_done(done)
            yield answer
        return
    environment = environment_with_user_tmpdir() | ONE_CORE
    start = partial(Child, f"{__name__}:run_job_in_worker", environment=environment)
    workers: list[Child] = []
    idle: SimpleQueue[Child] = SimpleQueue()
    threads = ThreadPoolExecutor(processes)  # one waits for each worker

    def ask_idle_worker(request: dict[str, object]) -> dict[str, object]:
        """Wait for an idle worker process, and for its answer to the request."""
        worker = idle.get()  # each of the threads gets one, as there are as many workers
        try:
            answer: dict[str, Any] = worker.ask(request)
            return answer
        except ChildFailed as failure:
            raise DataWorkerFailed(
                f"A data worker failed, and nothing was written. Start again: {failure}"
            ) from failure
        finally:
            idle.put(worker)

    try:
        for _ in range(processes):
            workers.append(TokenizerCell() if in_cells else start())
            idle.put(workers[-1])
        for done, answer in enumerate(threads.map(ask_idle_worker, requests), start=1):
            on_done(done)
            yield answer
    finally:
        # Killing the workers first frees threads that wait for an answer, so that shutdown() ends
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.kill()
        threads.shutdown()
        for worker in workers:
            worker.end()


def run_job_in_worker(request: dict[str, object]) -> dict[str, object]:
    """Run a job in a worker process, whose memory use stays constant over requests."""
    keep_freed_memory()
    return run_job(request)
