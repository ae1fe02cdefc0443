"""Work over ranges of a file on all cores: plain processes that are sent JSON and answer JSON.

No fork of a process with threads, no pickle, no second run of the caller's `__main__`. Small work
is done here, by the same function.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core import errors
from nested_core.backend import DISABLE_VARIABLE
from nested_core.data.worker import run_job
from nested_core.errors import NestedTuneError, WorkerFailed

SMALL_BYTES = 16 * 2**20  # below this, starting processes takes longer than the work
OnProgress = Callable[[str, int, int], None]  # what is done, how much of it, of how much
_COMMAND = [sys.executable, "-P", "-m", "nested_core.data.worker"]
_READ_BYTES = 2**16
_SHOWN_ERROR_LINES = 9


@dataclass(frozen=True)
class Span:
    """A range of bytes of a file, [start, end), that begins and ends at a line end."""

    start: int
    end: int


def usable_cores() -> int:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def processes_for(size: int) -> int:
    """How many processes the work on `size` bytes is worth: at most one a core."""
    return max(1, min(usable_cores(), size // SMALL_BYTES))


def line_spans(path: Path, size: int) -> list[Span]:
    """Cut a file into ranges of about `size` bytes and whole lines; an empty file has none."""
    spans, start = [], 0
    with path.open("rb") as file:
        total = file.seek(0, os.SEEK_END)
        while start < total:
            file.seek(min(total, start + size) - 1)
            file.readline()
            end = min(total, file.tell())
            spans.append(Span(start, end))
            start = end
    return spans


def run_jobs(
    requests: Sequence[dict[str, Any]],
    *,
    processes: int,
    on_done: Callable[[int], None] | None = None,
) -> Iterator[dict[str, Any]]:
    """Yield the answer to each request, in their order; an idle process takes the next one.

    A request is a JSON object whose "job" names a function, see `nested_core.data.worker.run_job`.
    `on_done` gets the number of requests answered so far. With one process the work is done here.
    Raises what the job raised where it is a NestedTuneError or an OSError, else WorkerFailed with
    the end of what the process said. However it ends, no process is left: close() ends it early.
    """
    if processes < 2 or len(requests) < 2:
        for done, request in enumerate(requests, start=1):
            answer = run_job(request)
            if on_done is not None:
                on_done(done)
            yield answer
        return
    workers: list[_Worker] = []
    try:
        yield from _run_apart(requests, min(processes, len(requests)), workers, on_done)
    finally:
        for worker in workers:
            worker.process.kill()
        for worker in workers:
            worker.clear_away()


def _run_apart(
    requests: Sequence[dict[str, Any]],
    processes: int,
    workers: list[_Worker],
    on_done: Callable[[int], None] | None,
) -> Iterator[dict[str, Any]]:
    waiting, answers, done = iter(enumerate(requests)), dict[int, dict[str, Any]](), 0
    with selectors.DefaultSelector() as selector:
        for _ in range(processes):
            workers.append(_Worker())
            selector.register(workers[-1].stdout, selectors.EVENT_READ, workers[-1])
            workers[-1].take(*next(waiting))
        for index in range(len(requests)):
            while index not in answers:
                for key, _ in selector.select():
                    worker: _Worker = key.data
                    if (answer := worker.receive()) is None:
                        continue
                    answers[worker.index], done = answer, done + 1
                    if on_done is not None:
                        on_done(done)
                    if (request := next(waiting, None)) is not None:
                        worker.take(*request)
            yield answers.pop(index)


class _Worker:
    """One process, and what has arrived of its answer to the request with number `index`."""

    def __init__(self) -> None:
        self.index = -1
        self._received = b""
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # without a name; closed with it
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in sys.path),
            DISABLE_VARIABLE: "1",  # it multiplies nothing
            "TOKENIZERS_PARALLELISM": "false",  # each core has a process of its own already
            "POLARS_MAX_THREADS": "1",
        }
        self.process = subprocess.Popen(
            _COMMAND,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=environment,
            bufsize=0,
        )
        assert self.process.stdin is not None and self.process.stdout is not None  # noqa: S101, PT018
        self._stdin, self.stdout = self.process.stdin, self.process.stdout

    def take(self, index: int, request: dict[str, Any]) -> None:
        """Send it a request; it must have answered the one before."""
        self.index = index
        left = memoryview(json.dumps(request).encode() + b"\n")
        try:
            while left:
                left = left[self._stdin.write(left) or 0 :]
        except BrokenPipeError:
            raise self._died() from None

    def receive(self) -> dict[str, Any] | None:
        """The whole answer once it is here, else None; raises what the job raised."""
        piece = os.read(self.stdout.fileno(), _READ_BYTES)
        if not piece:
            raise self._died()
        self._received += piece
        if not piece.endswith(b"\n"):
            return None
        outcome, self._received = json.loads(self._received), b""
        if "answer" in outcome:
            answer: dict[str, Any] = outcome["answer"]
            return answer
        if "errno" in outcome:
            raise OSError(outcome["errno"], outcome["message"], outcome["file"])
        if "known" in outcome:
            known: type[NestedTuneError] = getattr(errors, outcome["known"])
            raise known(outcome["message"])
        raise WorkerFailed(f"A data worker failed: {outcome['unknown']}.{self._said()}")

    def clear_away(self) -> None:
        """Wait for the killed process, so that no zombie stays, and close its pipes."""
        self.process.wait()
        for file in (self._stdin, self.stdout, self._errors):
            file.close()

    def _died(self) -> WorkerFailed:
        status = self.process.wait()
        how = f"with exit status {status}"
        if status < 0:
            how = f"by {signal.Signals(-status).name}"
        if status == -signal.SIGKILL:
            how += ", as when memory runs out"
        return WorkerFailed(
            f"A data worker (process {self.process.pid}) was ended {how}, before its work was "
            f"done. Nothing was written; start again.{self._said()}"
        )

    def _said(self) -> str:
        """The last lines of its standard error, to stand below a message."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return "".join(f"\n  {line}" for line in lines[-_SHOWN_ERROR_LINES:])
