"""What Prefect's logs show here, or no longer; what it sends to its server stays as it is."""

from __future__ import annotations

import logging
import os

from prefect import runtime
from prefect.exceptions import CancelledRun
from prefect.logging.configuration import setup_logging
from prefect.logging.handlers import PrefectConsoleHandler

from flows.process.environment import LOG_FORMAT_VARIABLE
from flows.terminal.console import can_redraw, errors
from nested_core.errors import NestedTuneError
from nested_core.records.outcome_names import Outcome
from nested_core.text.json_log import JsonFormatter
from tasks.log_text import LOGGERS_OF_RUNS

OUTPUT_DESCRIPTORS = (1, 2)
FAILED_STATE_MESSAGES = tuple(
    f"Finished in state {name}" for name in ("Failed", "Rejected", Outcome.DAMAGED)
)
PARAGRAPH_ATTRIBUTE = "is_an_error_in_a_paragraph"  # of a record that the command line says too
# An error that the state says too, and the command line at its end; events that are sent at exit.
MESSAGES_SHOWN_ELSEWHERE = ("Encountered exception during execution", "Still processing items")


def _take_off_traceback(record: logging.LogRecord) -> bool:
    """A filter: of an error which task failed and no more, and nothing that is said elsewhere."""
    message = record.getMessage()
    if message.startswith(FAILED_STATE_MESSAGES):
        record.msg = message.partition("(")[0]
        record.args = ()
    record.exc_info = None
    record.exc_text = None
    is_said_elsewhere = message.startswith(MESSAGES_SHOWN_ELSEWHERE)
    return not is_said_elsewhere and not hasattr(record, PARAGRAPH_ATTRIBUTE)


def show_logs_from_level(level: int) -> None:
    """Show Prefect's records from `level` on; what failed, the command line says at its end."""
    setup_logging()  # later calls of it leave the handlers as they are
    for handler in _console_handlers():
        handler.setLevel(level)
        handler.addFilter(_take_off_traceback)
        if can_redraw():
            handler.console = errors  # its lines go above a live view, and not through it


class _ErrorAsParagraphFilter(logging.Filter):
    """Gives a record of one of our own errors its message in place of its traceback, and once.

    The task logs it with its state, and then the flow that the task raised it in.
    """

    def __init__(self) -> None:
        super().__init__()
        self._failed_state = ""  # as the last task that failed logged it

    def filter(self, record: logging.LogRecord) -> bool:
        """False for an error that was logged already; else the record is logged as a paragraph."""
        message = record.getMessage()
        if message.startswith(FAILED_STATE_MESSAGES):
            self._failed_state = message
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, CancelledRun):  # the engine's: how the run ended was just logged
            return False
        if not isinstance(error, NestedTuneError):
            return True
        if repr(str(error))[1:-1] in self._failed_state:  # which has its message as repr does
            self._failed_state = ""
            return False
        setattr(record, PARAGRAPH_ATTRIBUTE, True)
        record.msg = "%s: %s"
        record.args = (type(error).__name__, error.describe_for("page"))
        record.exc_info = None
        record.exc_text = None
        return True


_in_a_paragraph = _ErrorAsParagraphFilter()


def prepare_logs() -> None:
    """Log errors that a person can cause without a traceback, unless Prefect logs at DEBUG.

    With NESTED_TUNE_LOG_FORMAT=json what is printed is a line of JSON a record.
    """
    if os.environ.get(LOG_FORMAT_VARIABLE) == "json":
        print_records_as_json()
    for name in LOGGERS_OF_RUNS:
        logger = logging.getLogger(name)
        if not logger.isEnabledFor(logging.DEBUG):
            logger.addFilter(_in_a_paragraph)


def print_records_as_json() -> None:
    """Print each record, and each warning of Python's, as a line of JSON."""
    logging.captureWarnings(True)
    for handler in _console_handlers():
        handler.setFormatter(JsonFormatter())


def tolerate_closed_output() -> None:
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
    for descriptor in OUTPUT_DESCRIPTORS:
        os.dup2(nowhere, descriptor)
    os.close(nowhere)
