"""A process of ours that answers requests, as its parent sees it.

Requests and answers are JSON values, a line each; what is large goes into files that a request
names. The child ends with its parent, however that ends, and all processes that it started are
killed with it. The standard ProcessPoolExecutor would run the caller's `__main__` again in each
worker, so that every script needed a guard; it pickles; and when a worker is killed it says neither
by which signal nor what the worker printed last.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

from nested_core import errors
from nested_core.errors import Advice, ChildFailed, NestedTuneError, shorten

PROGRAM = Path(__file__).with_name("child_main.py")
MAX_SHOWN_ERROR_LINES = 9
MAX_ERROR_CHARACTERS = 300
SECONDS_TO_EXIT = 10.0  # of a process that has closed its output


class Child:
    """A process that was started to answer; killed with its group when the block ends."""

    def __init__(
        self,
        function: str | Path,
        *,
        environment: Mapping[str, str] | None = None,
        max_answer_bytes: int | None = None,
    ) -> None:
        """Start it.

        Args:
            function: what answers: "package.module:function", found as this process would find it,
                or a Python file, whose function is `answer`.
            environment: the process's; None is this one's.
            max_answer_bytes: a longer answer is an error; None for a function that is trusted.
        """
        given = dict(os.environ if environment is None else environment)
        if isinstance(function, str):
            given["PYTHONPATH"] = os.pathsep.join(str(Path(path).resolve()) for path in sys.path)
        self._max_answer_bytes = max_answer_bytes
        self._received = bytearray()
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # without a name; closed with it
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-P", str(PROGRAM), str(function)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                env=given,
                start_new_session=True,
            )
        except BaseException:
            self._errors.close()
            raise
        assert self.process.stdin is not None and self.process.stdout is not None  # noqa: S101, PT018
        self._input = self.process.stdin
        self._output = self.process.stdout
        os.set_blocking(self._input.fileno(), False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def ask(self, request: Any, seconds: float | None = None) -> Any:
        """Send a request and return its answer; see `send` and `receive`, which wait so long."""
        self.send(request, seconds)
        return self.receive(seconds)

    def send(self, request: Any, seconds: float | None = None) -> None:
        """Send a request; of a process that has ended `receive` tells.

        Raises ChildFailed if the process does not read it in so many seconds.
        """
        deadline = _deadline_in(seconds)
        unsent = memoryview(json.dumps(request).encode() + b"\n")
        while unsent:
            if not _wait(self._input, selectors.EVENT_WRITE, deadline):
                raise ChildFailed(f"it took more than {seconds:g} seconds")
            try:
                unsent = unsent[os.write(self._input.fileno(), unsent) :]
            except BrokenPipeError:
                return

    def receive(self, seconds: float | None = None) -> Any:
        """The next answer.

        Raises what the function raised if that is a NestedTuneError, an OSError or a MemoryError;
        ChildFailed, with the last lines that were printed, for any other error, and where no answer
        comes in so many seconds.
        """
        deadline = _deadline_in(seconds)
        while (end := self._received.find(b"\n")) < 0:
            if self._max_answer_bytes is not None and len(self._received) > self._max_answer_bytes:
                raise _not_an_answer()
            if not _wait(self._output, selectors.EVENT_READ, deadline):
                raise ChildFailed(f"it took more than {seconds:g} seconds")
            more = os.read(self._output.fileno(), 2**20)
            if not more:
                raise ChildFailed(f"{self._describe_end()}{self._last_error_lines()}")
            self._received += more
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
        """Whether `receive` would return or raise at once, after waiting for that so long."""
        return _wait(self._output, selectors.EVENT_READ, _deadline_in(seconds))

    def finish(self) -> None:
        """Let a process that has answered end by itself, with what it does at its end."""
        self._input.close()
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(SECONDS_TO_EXIT)

    def kill(self) -> None:
        """Kill the process and all that it started, from any thread; `receive` tells of it."""
        with suppress(ProcessLookupError, PermissionError):  # all have ended
            os.killpg(self.process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill the process and all that it started, whatever it is at, and close its pipes."""
        self.kill()
        self.process.wait()
        self._input.close()
        self._output.close()
        self._errors.close()

    def _rebuild_error(self, described: Any) -> Exception:
        if (error := rebuild_error(described)) is not None:
            return error
        try:
            text = f"{described['type']}: {described['text']}"
        except (KeyError, TypeError):
            return _not_an_answer()
        return ChildFailed(f"{shorten(text, MAX_ERROR_CHARACTERS)}{self._last_error_lines()}")

    def _describe_end(self) -> str:
        try:
            code = self.process.wait(SECONDS_TO_EXIT)
        except subprocess.TimeoutExpired:
            return "it closed its output"
        if code >= 0:
            return f"its process ended with exit status {code}"
        hint = ", as when memory runs out" if code == -signal.SIGKILL else ""
        return f"its process was ended by {signal.Signals(-code).name}{hint}"

    def _last_error_lines(self) -> str:
        """The last lines of its standard error, to stand below a message."""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 4000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return "".join(f"\n  {line}" for line in lines[-MAX_SHOWN_ERROR_LINES:])


def rebuild_error(described: Any) -> Exception | None:
    """The error of `child_main.describe_error` as it was; None for a class that is not known."""
    try:
        error_class: Any = getattr(errors, described["type"], None)
        is_ours = isinstance(error_class, type) and issubclass(error_class, NestedTuneError)
        if described["module"] == errors.__name__ and is_ours:
            advice = None if described["advice"] is None else Advice(**described["advice"])
            known: NestedTuneError = error_class(described["message"], advice=advice)
            return known
        if described["type"] == "MemoryError":
            return MemoryError(described["text"])
        number, problem, file = described["os"]
    except (KeyError, TypeError, ValueError):
        return None
    return None if number is None else OSError(number, problem, file)


def _not_an_answer() -> ChildFailed:
    return ChildFailed("something else than an answer came from its process")


def _deadline_in(seconds: float | None) -> float | None:
    return None if seconds is None else time.monotonic() + seconds


def _wait(file: Any, event: int, deadline: float | None) -> bool:
    """Whether a pipe can be read or written, once it can or the deadline has passed."""
    with selectors.DefaultSelector() as selector:
        selector.register(file, event)
        left = None if deadline is None else max(0.0, deadline - time.monotonic())
        return bool(selector.select(left))
