"""What Prefect's logs show on this terminal; what it sends to its server stays as it is."""

from __future__ import annotations

import logging

from prefect.logging.configuration import setup_logging
from prefect.logging.handlers import PrefectConsoleHandler

from nested_core.errors import NestedTuneError


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
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.addFilter(_ForTerminal(level))
