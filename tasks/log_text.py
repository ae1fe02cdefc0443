"""What Prefect's logs of runs hold: text of data, adapters and file names, escaped."""

from __future__ import annotations

import logging

from nested_core.text.foreign_text import escape_but_keep_newlines

LOGGERS_OF_RUNS = ("prefect.flow_runs", "prefect.task_runs")


def escape_foreign_text(record: logging.LogRecord) -> bool:
    """A filter that makes a record's message safe to show, whoever formed it; none is left out."""
    record.msg = escape_but_keep_newlines(record.getMessage())
    record.args = None
    return True


def escape_logs_of_runs() -> None:
    """Have all that `get_run_logger` and Prefect's engine log escaped; later calls do nothing."""
    for name in LOGGERS_OF_RUNS:
        logging.getLogger(name).addFilter(escape_foreign_text)
