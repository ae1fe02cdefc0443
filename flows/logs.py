"""What Prefect's logs show here, or no longer; what it sends to its server stays as it is."""

from __future__ import annotations

import logging
import os

from prefect import runtime
from prefect.logging.configuration import setup_logging
from prefect.logging.handlers import PrefectConsoleHandler

from nested_core.errors import NestedTuneError

OUTPUTS = (1, 2)


class _ForTerminal(logging.Filter):
    """Lets records through from a level on, without the traceback of an error of ours."""

    def __init__(self, level: int) -> None:
        super().__init__()
        self._level = level

    def filter(self, record: logging.LogRecord) -> bool:
        if record.exc_info and isinstance(record.exc_info[1], NestedTuneError):
            record.exc_info = record.exc_text = None
        return record.levelno >= self._level


def quieten(level: int) -> None:
    """Show Prefect's records from `level` on; an error that a person can cause is one paragraph."""
    setup_logging()  # later calls of it leave the handlers as they are
    for handler in _console_handlers():
        handler.addFilter(_ForTerminal(level))


def outlive_the_worker() -> None:
    """Have a deployment's run go on where nobody reads its output any more.

    It prints into a pipe that its worker reads. A worker that is killed leaves its runs alone, but
    at the next line rich would end the program (rich/console.py, on_broken_pipe).
    """
    if runtime.deployment.id is None:
        return
    for handler in _console_handlers():
        handler.console.on_broken_pipe = _drop_output  # type: ignore[method-assign]


def _console_handlers() -> list[PrefectConsoleHandler]:
    handlers = logging.getLogger().handlers
    return [each for each in handlers if isinstance(each, PrefectConsoleHandler)]


def _drop_output() -> None:
    """Send what is printed from now on, by child processes too, nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in OUTPUTS:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
