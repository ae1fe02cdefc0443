"""A log record as one line of JSON, for programs that collect logs."""

from __future__ import annotations

import json
import logging
import math
from datetime import UTC, datetime

FORMATS = ("text", "json")
_FIELDS_OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Time (UTC), level, logger and message, the exception, and what the record has beside them.

    That is what was given as `extra`, such as the flow run's name, where JSON has a value of its
    kind; a number that is not finite is null. All characters are ASCII: any stream can write them.
    """

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        line: dict[str, str | int | float | None] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in vars(record).keys() - _FIELDS_OF_EVERY_RECORD - line.keys():
            value = vars(record)[name]
            if isinstance(value, str | int | float | None):
                is_finite = not isinstance(value, float) or math.isfinite(value)
                line[name] = value if is_finite else None
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
