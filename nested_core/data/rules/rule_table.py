"""Runs pandera models over a frame and turns each failure into a finding with file and line.

The checks run whatever the environment says of pandera, and a model that does not fit its frame
is an error here, never a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pandera.polars as pa
import polars as pl
from pandera.config import CONFIG, ValidationDepth, config_context
from pandera.errors import SchemaErrors
from pandera.polars import PolarsData

from nested_core.data.rules.dataset_report import Finding, Severity
from nested_core.errors import list_first

READABLE = "readable"


def is_null(data: PolarsData) -> pl.LazyFrame:
    """The check of a column that says what is wrong with a row: null is good."""
    return data.lazyframe.select(pl.col(data.key).is_null())


def judge(
    model: type[pa.DataFrameModel], frame: pl.DataFrame, severity: Severity
) -> Iterator[Finding]:
    """Yield a finding for each check of `model` that fails at a row of `frame`.

    The frame needs `file` and `line` (null: the whole file). A check's name becomes the finding's,
    and its description, formatted with the row, the message. `readable` reports the row's own.
    """
    descriptions = _descriptions(model)
    failures = _failures(model, frame)
    rows = frame[failures["index"]].iter_rows(named=True)
    for check, row in zip(failures["check"], rows, strict=True):
        if check == READABLE:
            yield Finding(row["file"], row["line"], severity, row["check"], row["message"])
        else:
            message = descriptions[check].format_map(_spelled_out(row))
            yield Finding(row["file"], row["line"], severity, check, message)


def _failures(model: type[pa.DataFrameModel], frame: pl.DataFrame) -> pl.DataFrame:
    with _whatever_the_environment_says():
        try:
            model.validate(frame, lazy=True)
        except SchemaErrors as error:
            cases: pl.DataFrame = error.failure_cases
        else:
            return pl.DataFrame(schema={"check": pl.String, "index": pl.Int32})
    misfits = cases.filter(pl.col("index").is_null())
    if misfits.height:
        raise TypeError(f"{model.__name__} does not fit its frame: {misfits.to_dicts()[:3]}")
    return cases.select("check", "index")


@contextmanager
def _whatever_the_environment_says() -> Iterator[None]:
    """Every check on, and over polars itself: PANDERA_* variables decide nothing here."""
    narwhals, CONFIG.use_narwhals_backend = CONFIG.use_narwhals_backend, False
    try:
        with config_context(
            validation_enabled=True, validation_depth=ValidationDepth.SCHEMA_AND_DATA
        ):
            yield
    finally:
        CONFIG.use_narwhals_backend = narwhals


def _descriptions(model: type[pa.DataFrameModel]) -> dict[str, str]:
    columns = model.to_schema().columns.values()
    return {
        str(check.name): str(check.description) for column in columns for check in column.checks
    }


_ROLES = {
    "s": "system",
    "u": "user",
    "a": "assistant",
    "t": "tool",
    "c": "assistant (calls a tool)",
    "o": "tool (no call has its id)",
}
_SHOWN_TURNS = 12


def _spelled_out(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its turns in words, for messages."""
    letters = row.get("roles") or ""
    turns = [_ROLES[letter] for letter in letters]
    return row | {"turns": list_first(turns, _SHOWN_TURNS) or "none"}
