"""A log record as one line of JSON, for programs that collect logs."""

from __future__ import annotations

import json
import logging
from datetime import UTC, datetime

FORMATS = ("text", "json")
_FIELDS_OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Time (UTC), level, logger and message, the exception, and what the record has beside them.

    That is what was given as `extra`, such as the flow run's name, where JSON has a value of its
    kind.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in vars(record).keys() - _FIELDS_OF_EVERY_RECORD - line.keys():
            if isinstance(vars(record)[name], str | int | float | None):
                line[name] = vars(record)[name]
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)
