"""The program of a `Child`: answers each request, a line of JSON on standard input, with another.

Started by its path with the name of a function, "package.module:function", or with the path of a
Python file, whose function is `answer`. It imports nothing of ours, so that such a file can be a
process without this project. What anything prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import runpy
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from importlib import import_module
from queue import SimpleQueue
from typing import Any, BinaryIO


class Requests:
    """The lines of standard input, read by a thread of its own, which notices the parent's end.

    When the parent closes its end, or is gone, a process that is idle ends as any program does; one
    that is at work is killed, with its group.
    """

    def __init__(self, source: BinaryIO) -> None:
        self._source = source
        self._lines: SimpleQueue[bytes | None] = SimpleQueue()
        self._unanswered = 0
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self._source:
            self._unanswered += 1
            self._lines.put(line)
        if self._unanswered:
            if os.getpgrp() == os.getpid():
                os.killpg(0, signal.SIGKILL)
            os._exit(1)
        self._lines.put(None)

    def next(self) -> bytes | None:
        """Wait for the next line; None when there is no more."""
        return self._lines.get()

    def note_answered(self) -> None:
        """Note that the answer to a request is about to be written."""
        self._unanswered -= 1


def main(name: str) -> None:
    """Load the function, and answer with it until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as answers, os.fdopen(os.dup(0), "rb") as file:
        nothing = os.open(os.devnull, os.O_RDONLY)
        os.dup2(nothing, 0)
        os.close(nothing)
        os.dup2(2, 1)
        requests = Requests(file)
        function: Callable[[Any], Any] | None = None
        failure: dict[str, Any] = {}
        try:
            function = load_function(name)
        except BaseException as error:  # the answer to whatever is asked
            failure = print_and_describe(error)
        while (line := requests.next()) is not None:
            reply = failure if function is None else call(function, json.loads(line))
            text = json.dumps(reply)
            requests.note_answered()
            answers.write(f"{text}\n")
            answers.flush()


def load_function(name: str) -> Callable[[Any], Any]:
    """The function of a module or of a file."""
    if name.endswith(".py"):
        of_file: Callable[[Any], Any] = runpy.run_path(name)["answer"]
        return of_file
    module, _, function = name.partition(":")
    of_module: Callable[[Any], Any] = getattr(import_module(module), function)
    return of_module


def call(function: Callable[[Any], Any], request: Any) -> dict[str, Any]:
    """The answer, or the error in a form that the parent raises again."""
    try:
        return {"answer": function(request)}
    except BaseException as error:  # whatever it is, the parent says it
        return print_and_describe(error)


def print_and_describe(error: BaseException) -> dict[str, Any]:
    """Print where an error comes from, and give it as a reply."""
    with suppress(OSError):  # such as a full disk
        traceback.print_exception(error, limit=-2)
        sys.stderr.flush()
    return {"error": describe_error(error)}


def describe_error(error: BaseException) -> dict[str, Any]:
    """An error as JSON values, from which `child.rebuild_error` makes it again."""
    advice = getattr(error, "advice", None)
    return {
        "type": type(error).__name__,
        "module": type(error).__module__,
        "text": str(error),
        "message": str(error.args[0]) if error.args else "",  # without the advice
        "advice": None if advice is None else vars(advice),
        "os": [getattr(error, name, None) for name in ("errno", "strerror", "filename")],
    }


if __name__ == "__main__":
    main(sys.argv[1])
