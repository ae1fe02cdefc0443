"""A log formatter that writes each record as one line of JSON."""

from __future__ import annotations

import json
import logging
import math
from datetime import UTC, datetime

FORMATS = ("text", "json")
_FIELDS_OF_EVERY_RECORD = {*vars(logging.makeLogRecord({})), "message", "asctime", "taskName"}


class JsonFormatter(logging.Formatter):
    """Formats a log record as a line of JSON: time (UTC), level, logger, message, exception.

    Extra fields of the record are kept if they are a string, number, boolean or None; a number that
    is not finite becomes null. All characters are ASCII, so any stream can write them.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Return the record as a line of JSON, without the line end."""
        line: dict[str, str | int | float | None] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
        }
        for name in vars(record).keys() - _FIELDS_OF_EVERY_RECORD - line.keys():
            value = vars(record)[name]
            if isinstance(value, str | int | float | None):
                line[name] = value if not isinstance(value, float) or math.isfinite(value) else None
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)
