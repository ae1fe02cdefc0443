"""A log record as one line of JSON."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import Any

from nested_core.text.json_log import JsonFormatter


def line_of(message: str, *arguments: object, **options: Any) -> dict[str, Any]:
    logger = logging.getLogger("nested_tune.test")
    extra = options.pop("extra", None)
    record = logger.makeRecord(
        logger.name, logging.WARNING, "f.py", 1, message, arguments, options.get("exc_info"),
        extra=extra,
    )  # fmt: skip
    text = JsonFormatter().format(record)
    assert "\n" not in text
    assert text.isascii()
    line: dict[str, Any] = json.loads(text)
    return line


def test_a_record_has_its_time_level_logger_and_message_on_one_line() -> None:
    line = line_of("two\nlines of %s: \x1b[31m", 'a "name"')
    assert line.keys() == {"time", "level", "logger", "message"}
    assert (line["level"], line["logger"]) == ("WARNING", "nested_tune.test")
    assert line["message"] == 'two\nlines of a "name": \x1b[31m'
    assert line["time"].endswith("+00:00")


def test_what_was_given_beside_the_message_is_a_field_where_json_can_hold_it() -> None:
    extra = {"status": 200, "adapter": None, "seconds": 0.5, "place": Path("x"), "ok": True}
    line = line_of("asked", extra=extra)
    assert {key: line[key] for key in ("status", "adapter", "seconds", "ok")} == {
        "status": 200,
        "adapter": None,
        "seconds": 0.5,
        "ok": True,
    }
    assert "place" not in line


def test_a_line_is_json_and_ascii_whatever_it_holds() -> None:
    extra = {"loss": float("nan"), "rate": float("-inf"), "adapter": "caf\udce9"}
    line = line_of("read data/caf\udce9.jsonl, not café.jsonl", extra=extra)
    assert (line["loss"], line["rate"], line["adapter"]) == (None, None, "caf\udce9")
    assert line["message"] == "read data/caf\udce9.jsonl, not café.jsonl"


def test_an_exception_is_a_field_of_the_same_line() -> None:
    try:
        raise ValueError("bad")
    except ValueError:
        line = line_of("failed", exc_info=sys.exc_info())
    assert "ValueError: bad" in line["exception"]
    assert line["exception"].startswith("Traceback")
