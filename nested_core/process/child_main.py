"""The program of a `Child`: answers each request, a line of JSON on standard input, with a line.

Its arguments are the name of a function, "package.module:function", or the path of a Python file
with a function `answer`, and the numbers of `child.Limits`. It imports nothing of this project, so
that such a file can run without it. Anything printed goes to standard error.
"""

from __future__ import annotations

import json
import os
import resource
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from queue import SimpleQueue
from typing import BinaryIO


class Requests:
    """The lines of standard input, read by a thread that also notices when the parent ends.

    When the parent closes the pipe or is gone, an idle process exits normally. A process that is
    working on a request is killed with its process group.
    """

    def __init__(self, source: BinaryIO) -> None:
        """Start the thread that reads lines from `source`."""
        self._source = source
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._unanswered = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        """Queue the lines of the source; when it ends during a request, kill this process group."""
        for line in self._source:
            self._unanswered += 1
            self._lines.put(line)
        if self._unanswered:
            if os.getpgrp() == os.getpid():  # otherwise the group includes the parent
                os.killpg(0, signal.SIGKILL)
            os._exit(1)
        self._lines.put(None)

    def next(self) -> bytes | None:
        """Wait for the next line and return it; None when the input has ended."""
        return self._lines.get()

    def note_answered(self) -> None:
        """Note that the answer to a request is about to be written."""
        self._unanswered -= 1


def main(name: str) -> None:
    """Load the function, and answer requests with it until standard input ends.

    name: "package.module:function", or the path of a Python file. Requests and answers are lines of
    JSON. Standard input and output are replaced, so that the function cannot read requests or write
    answers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # a limit of processor time, see cell.py
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers, os.fdopen(os.dup(0), "rb") as file:
        null_device = os.open(os.devnull, os.O_RDONLY)
        os.dup2(null_device, 0)
        os.close(null_device)
        os.dup2(2, 1)  # what the function prints goes to standard error
        requests = Requests(file)
        function: Callable[[object], object] | None = None
        failure: dict[str, object] = {}
        try:
            function = load_function(name)
        except BaseException as error:  # every request is answered with this error
            failure = print_and_describe(error)
        while (line := requests.next()) is not None:
            reply = failure if function is None else call(function, json.loads(line))
            try:
                text = json.dumps(reply)
            except (TypeError, ValueError) as error:  # no JSON value
                text = json.dumps(print_and_describe(error))
            requests.note_answered()
            answers.write(f"{text}\n")
            answers.flush()


def load_function(name: str) -> Callable[[object], object]:
    """Load a function by "package.module:function", or `answer` of a Python file."""
    if name.endswith(".py"):
        answer: Callable[[object], object] = runpy.run_path(name)["answer"]
        return answer
    module, _, function_name = name.partition(":")
    function: Callable[[object], object] = getattr(import_module(module), function_name)
    return function


def call(function: Callable[[object], object], request: object) -> dict[str, object]:
    """Return a reply with the function's result, or with its error for the parent to raise."""
    try:
        return {"answer": function(request)}
    except BaseException as error:  # of any kind: the parent reports it
        return print_and_describe(error)


def print_and_describe(error: BaseException) -> dict[str, object]:
    """Print the traceback of an error, and return the error as a reply."""
    with suppress(OSError):  # such as a full disk
        traceback.print_exception(error, limit=-2)
        sys.stderr.flush()
    return {"error": describe_error(error)}


def describe_error(error: BaseException) -> dict[str, object]:
    """Return an error as JSON values, from which `child.rebuild_error` creates it again."""
    advice = getattr(error, "advice", None)
    return {
        "type": type(error).__name__,
        "module": type(error).__module__,
        "text": str(error),
        "message": str(error.args[0]) if error.args else "",  # without the advice
        "advice": None if advice is None else vars(advice),
        "os": [getattr(error, name, None) for name in ("errno", "strerror", "filename")],
    }


def limit(kind: int, number: int) -> None:
    """Limit a resource of this process, such as resource.RLIMIT_AS, unless it is less already."""
    soft, hard = resource.getrlimit(kind)
    if number != resource.RLIM_INFINITY and not 0 <= soft < number:
        with suppress(ValueError, OSError):  # macOS does not limit the address space
            resource.setrlimit(kind, (number, hard))


if __name__ == "__main__":
    function, address_space, processor_seconds = sys.argv[1:]
    limit(resource.RLIMIT_AS, int(address_space))
    limit(resource.RLIMIT_CPU, int(processor_seconds))  # SIGXCPU ends it then
    limit(resource.RLIMIT_CORE, 0)  # its memory may hold rows
    main(function)
