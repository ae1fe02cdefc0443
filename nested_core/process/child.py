"""A child process that answers requests, from the parent's side.

Requests and answers are JSON values, one per line; large data goes into files that a request names.
The child ends when its parent ends in any way, and all processes that it started are killed with
it. The standard ProcessPoolExecutor has three problems: it runs the caller's `__main__` again in
each worker, so that every script needs a guard; it pickles; and when a worker is killed it reports
neither the signal nor the worker's last output.
"""

from __future__ import annotations

import json
import os
import resource
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any, Self

from nested_core import errors
from nested_core.errors import Advice, ChildFailed, NestedTuneError, shorten

PROGRAM = Path(__file__).with_name("child_main.py")
MAX_SHOWN_ERROR_LINES = 9
MAX_ERROR_CHARACTERS = 300
SECONDS_TO_EXIT = 10.0  # how long to wait for a process that has closed its output


@dataclass(frozen=True)
class Limits:
    """What a child process may use: bytes of address space, and whole seconds of processor time.

    What is not given is as in this process. macOS enforces no limit of the address space.
    """

    address_space: int = resource.RLIM_INFINITY
    processor_seconds: int = resource.RLIM_INFINITY


NO_LIMITS = Limits()


class Child:
    """A process that answers requests; as a context manager, it is killed when the block ends.

    Killing includes all processes of its process group.
    """

    def __init__(
        self,
        function: str | Path,
        *,
        environment: Mapping[str, str] | None = None,
        max_answer_bytes: int | None = None,
        limits: Limits = NO_LIMITS,
    ) -> None:
        """Start a process that answers requests with a function.

        Requests and answers are lines of JSON on its standard input and output.

        Args:
            function: what answers: "package.module:function", importable like in this process, or
                the path of a Python file with a function `answer`.
            environment: the process's environment variables; None is this process's.
            max_answer_bytes: a longer answer is an error; None sets no limit, for trusted
                functions.
            limits: of the process, from its start on.
        """
        env = dict(os.environ if environment is None else environment)
        if isinstance(function, str):
            env["PYTHONPATH"] = os.pathsep.join(str(Path(path).resolve()) for path in sys.path)
        self._max_answer_bytes = max_answer_bytes
        self._received = bytearray()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # `end` closes it
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(PROGRAM), str(function), *map(str, astuple(limits))],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=env,
                start_new_session=True,
            )
        except BaseException:
            self._errors.close()
            raise
        assert self.process.stdin is not None and self.process.stdout is not None  # noqa: S101, PT018
        self._input = self.process.stdin
        self._output = self.process.stdout
        os.set_blocking(self._input.fileno(), False)  # a full pipe must not outlast a time limit

    def __enter__(self) -> Self:
        """Return the running process."""
        return self

    def __exit__(self, *_: object) -> None:
        """Kill the process."""
        self.end()

    def ask(self, request: object, seconds: float | None = None) -> Any:
        """Send a request and return its answer; `seconds` limits sending and receiving each.

        Raises what `send` and `receive` raise.
        """
        self.send(request, seconds)
        return self.receive(seconds)

    def send(self, request: object, seconds: float | None = None) -> None:
        """Send a request. If the process has ended, `receive` reports it.

        Raises ChildFailed if the process does not read the request within `seconds`.
        """
        deadline = _deadline_in(seconds)
        unsent = memoryview(json.dumps(request).encode() + b"\n")
        while unsent:
            if not _wait(self._input, select.POLLOUT, deadline):
                raise ChildFailed(f"it took more than {seconds:g} seconds")
            try:
                unsent = unsent[os.write(self._input.fileno(), unsent) :]
            except BrokenPipeError:
                return

    def receive(self, seconds: float | None = None) -> Any:
        """Wait for the next answer, a line of JSON, and return it.

        seconds: how long to wait; None is without a limit.

        If the function raised a NestedTuneError, an OSError or a MemoryError, raises the same
        error. For any other error, and if no answer comes within `seconds`, raises ChildFailed,
        with the last lines that the process printed if it failed.
        """
        deadline = _deadline_in(seconds)
        while (end := self._received.find(b"\n")) < 0:
            if self._max_answer_bytes is not None and len(self._received) > self._max_answer_bytes:
                raise _not_an_answer()
            if not _wait(self._output, select.POLLIN, deadline):
                raise ChildFailed(f"it took more than {seconds:g} seconds")
            data = os.read(self._output.fileno(), 2**20)
            if not data:
                raise ChildFailed(f"{self._describe_end()}{self._last_error_lines()}")
            self._received += data
        line = bytes(self._received[:end])
        del self._received[: end + 1]
        try:
            reply = json.loads(line)
        except (ValueError, RecursionError):
            reply = None
        if isinstance(reply, dict) and list(reply) == ["answer"]:
            return reply["answer"]
        if isinstance(reply, dict) and list(reply) == ["error"]:
            raise self._rebuild_error(reply["error"])
        raise _not_an_answer()

    def has_answer(self, seconds: float) -> bool:
        """Whether `receive` would return or raise at once; waits for up to `seconds`."""
        return _wait(self._output, select.POLLIN, _deadline_in(seconds))

    def finish(self) -> None:
        """Close the process's input and wait for it to exit by itself, with its cleanup."""
        self._input.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_TO_EXIT)

    def kill(self) -> None:
        """Kill the process and all that it started; may be called from any thread.

        `receive` then raises ChildFailed.
        """
        with suppress(ProcessLookupError, PermissionError):  # all have ended already
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the process and all that it started, and close its pipes."""
        self.kill()
        self.process.wait()
        self._input.close()
        self._output.close()
        self._errors.close()

    def _rebuild_error(self, described: Any) -> Exception:
        """Return the error that the process described, as its own class or as a ChildFailed."""
        if (error := rebuild_error(described)) is not None:
            return error
        try:
            text = f"{described['type']}: {described['text']}"
        except (KeyError, TypeError):
            return _not_an_answer()
        return ChildFailed(f"{shorten(text, MAX_ERROR_CHARACTERS)}{self._last_error_lines()}")

    def _describe_end(self) -> str:
        """Say how the process ended: its exit status, or the signal that ended it."""
        try:
            code = self.process.wait(SECONDS_TO_EXIT)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        if code >= 0:
            return f"its process ended with exit status {code}"
        hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}"

    def _last_error_lines(self) -> str:
        """Return the last lines of the process's standard error, to append to a message."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return "".join(f"\n  {line}" for line in lines[-MAX_SHOWN_ERROR_LINES:])


def rebuild_error(described: Any) -> Exception | None:
    """Return the error that `child_main.describe_error` described; None for an unknown class."""
    try:
        error_class: Any = getattr(errors, described["type"], None)
        is_ours = isinstance(error_class, type) and issubclass(error_class, NestedTuneError)
        if described["module"] == errors.__name__ and is_ours:
            advice = None if described["advice"] is None else Advice(**described["advice"])
            our_error: NestedTuneError = error_class(described["message"], advice=advice)
            return our_error
        if described["type"] == "MemoryError":
            return MemoryError(described["text"])
        number, problem, file = described["os"]
    except (KeyError, TypeError, ValueError):
        return None
    return None if number is None else OSError(number, problem, file)


def _not_an_answer() -> ChildFailed:
    """Build the error for output of a child process that is not an answer."""
    return ChildFailed("something else than an answer came from its process")


def _deadline_in(seconds: float | None) -> float | None:
    """Return the time (of time.monotonic) in so many seconds; None for no limit."""
    return None if seconds is None else time.monotonic() + seconds


def _wait(file: Any, event: int, deadline: float | None) -> bool:
    """Wait until a pipe can be read or written, or the deadline; return whether it can.

    `deadline` is a time of time.monotonic(); None waits without limit.
    """
    poll = select.poll()  # a tenth of what a selector takes
    poll.register(file, event)
    timeout = None if deadline is None else 1000 * max(0.0, deadline - time.monotonic())
    return bool(poll.poll(timeout))
