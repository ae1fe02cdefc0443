"""Jobs on all cores: worker processes that are sent requests as JSON and answer with JSON.

Small work is done in this process, by the same functions. The standard ProcessPoolExecutor would
run the caller's `__main__` again in each worker, so that every script needed a guard; it pickles;
and when a worker is killed it says neither by which signal nor what the worker printed last.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

from nested_core import errors
from nested_core.backend import hide_torch_from_transformers, keep_freed_memory
from nested_core.errors import DataWorkerFailed, NestedTuneError
from nested_core.storage.compiled_kernels import environment_with_user_tmpdir
from nested_core.storage.strict_files import UNBOUNDED, open_regular

MIN_BYTES_FOR_WORKERS = 16 * 2**20  # below this, starting processes takes longer than the work
OnProgress = Callable[[str, int, int], None]  # what is done, how much of it, of how much
_WORKER_PROGRAM = f"from {__name__} import serve_requests; serve_requests()"
_MAX_SHOWN_ERROR_LINES = 9


class ByteRange(NamedTuple):
    """A range of bytes of a file, [start, end), that begins and ends at a line end."""

    start: int
    end: int


def count_usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_processes_for(size: int) -> int:
    """How many processes the work on `size` bytes is worth: at most one a core."""
    return max(1, min(count_usable_cores(), size // MIN_BYTES_FOR_WORKERS))


def cut_file_into_line_ranges(path: Path, size: int) -> list[ByteRange]:
    """Cut a file into ranges of about `size` bytes and whole lines; an empty file has none."""
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


def run_job(request: dict[str, Any]) -> dict[str, Any]:
    """Call the function that request["job"] names as "package.module:function" with the request.

    Requests and answers are JSON objects; what is large goes into files that the request names.
    """
    module, _, function = request["job"].partition(":")
    answer: dict[str, Any] = getattr(import_module(module), function)(request)
    return answer


def run_jobs(
    requests: Sequence[dict[str, Any]],
    *,
    processes: int,
    on_done: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the answer to each request, see `run_job`, in the order of the requests.

    An idle process takes the next request. `on_done` gets the number of requests answered so far.
    With one process the work is done here. Raises what the job raised if it is a NestedTuneError
    or an OSError, else DataWorkerFailed with the last lines that the process printed. However it
    ends, no process is left: close() ends it early.
    """
    if processes < 2 or len(requests) < 2:
        yield from _run_in_this_process(requests, on_done)
        return
    processes = min(processes, len(requests))
    workers: list[_Worker] = []
    idle: SimpleQueue[_Worker] = SimpleQueue()
    threads = ThreadPoolExecutor(processes)  # one waits for each worker

    def send_to_idle_worker(request: dict[str, Any]) -> dict[str, Any]:
        """Wait for a process that does nothing, and for its answer to the request."""
        worker = idle.get()
        try:
            return worker.send_request(request)
        finally:
            idle.put(worker)

    try:
        for _ in range(processes):
            workers.append(_Worker())
            idle.put(workers[-1])
        futures = {
            threads.submit(send_to_idle_worker, item): index for index, item in enumerate(requests)
        }
        answers: dict[int, dict[str, Any]] = {}
        yielded = 0
        for done, future in enumerate(as_completed(futures), start=1):
            answers[futures[future]] = future.result()
            if on_done is not None:
                on_done(done)
            while yielded in answers:
                yield answers.pop(yielded)
                yielded += 1
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in workers:
            worker.process.kill()
        threads.shutdown()
        for worker in workers:
            worker.close_after_kill()


def _run_in_this_process(
    requests: Sequence[dict[str, Any]], on_done: Callable[[int], None] | None
) -> Iterator[dict[str, Any]]:
    for done, request in enumerate(requests, start=1):
        answer = run_job(request)
        if on_done is not None:
            on_done(done)
        yield answer


class _Worker:
    """One worker process, as its parent sees it."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # without a name; closed with it
        environment = environment_with_user_tmpdir() | {
            "PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path),
            "TOKENIZERS_PARALLELISM": "false",  # each core has a process of its own already
            "POLARS_MAX_THREADS": "1",
        }
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _WORKER_PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
        )
        assert self.process.stdin is not None and self.process.stdout is not None  # noqa: S101, PT018
        self._stdin = self.process.stdin
        self._stdout = self.process.stdout

    def send_request(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send it a request and wait for the answer; raises what the job raised."""
        with suppress(BrokenPipeError):  # then it gives no answer either
            self._stdin.write(json.dumps(request).encode() + b"\n")
            self._stdin.flush()
        line = self._stdout.readline()
        if not line.endswith(b"\n"):
            raise self._death_error()
        outcome = json.loads(line)
        if "answer" in outcome:
            answer: dict[str, Any] = outcome["answer"]
            return answer
        if "errno" in outcome:
            raise OSError(outcome["errno"], outcome["message"], outcome["file"])
        if "known" in outcome:
            known: type[NestedTuneError] = getattr(errors, outcome["known"])
            raise known(outcome["message"])
        raise DataWorkerFailed(
            f"A data worker failed: {outcome['unknown']}.{self._last_error_lines()}"
        )

    def close_after_kill(self) -> None:
        """Wait for the killed process, so that no zombie stays, and close its pipes."""
        self.process.wait()
        with suppress(BrokenPipeError):  # a part of a request that it did not read
            self._stdin.close()
        self._stdout.close()
        self._errors.close()

    def _death_error(self) -> DataWorkerFailed:
        status = self.process.wait()
        how = f"with exit status {status}"
        if status < 0:
            how = f"by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            how += ", as when memory runs out"
        return DataWorkerFailed(
            f"A data worker (process {self.process.pid}) was ended {how}, before its work was "
            f"done. Nothing was written; start again.{self._last_error_lines()}"
        )

    def _last_error_lines(self) -> str:
        """The last lines of its standard error, to stand below a message."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return "".join(f"\n  {line}" for line in lines[-_MAX_SHOWN_ERROR_LINES:])


def serve_requests() -> None:
    """What a worker process does, until standard input ends, as it does when the parent is gone."""
    hide_torch_from_transformers()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes: the parent's
    keep_freed_memory()  # each request takes as much as the one before
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers:
        os.dup2(2, 1)  # what a library prints must not get between the answers
        for line in sys.stdin:
            answers.write(json.dumps(_answer_or_error(json.loads(line))) + "\n")
            answers.flush()


def _answer_or_error(request: dict[str, Any]) -> dict[str, Any]:
    """The answer, or the error in a form that the parent can raise again."""
    try:
        return {"answer": run_job(request)}
    except NestedTuneError as error:
        return {"known": type(error).__name__, "message": str(error)}
    except OSError as error:
        return {"errno": error.errno, "message": error.strerror, "file": error.filename}
    except Exception:
        traceback.print_exc(limit=-2)
        return {"unknown": traceback.format_exc().strip().splitlines()[-1]}
