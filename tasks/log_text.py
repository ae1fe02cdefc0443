"""What Prefect's logs of runs hold: text of data, adapters and file names, escaped."""

from __future__ import annotations

import logging

from nested_core.text.foreign_text import escape_but_keep_newlines

LOGGERS_OF_RUNS = ("prefect.flow_runs", "prefect.task_runs")


class EscapeForeignText(logging.Filter):
    """Makes every record's message safe to show, whoever formed it; no record is left out."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Escape the message, with its arguments in it."""
        record.msg = escape_but_keep_newlines(record.getMessage())
        record.args = None
        return True


def escape_logs_of_runs() -> None:
    """Have all that `get_run_logger` and Prefect's engine log escaped; later calls do nothing."""
    for name in LOGGERS_OF_RUNS:
        logger = logging.getLogger(name)
        if not any(isinstance(each, EscapeForeignText) for each in logger.filters):
            logger.addFilter(EscapeForeignText())
