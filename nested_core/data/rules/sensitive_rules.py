"""What a person should know of before a model learns it by heart, once a file and kind.

Lines and counts only: a value never gets here.
"""

from __future__ import annotations

import pandera.polars as pa
import polars as pl
from pandera.polars import PolarsData

from nested_core.data.lines.sensitive import KINDS
from nested_core.data.rules.rule_table import is_null
from nested_core.errors import list_first

_SHOWN_LINES = 5


class KindWarnings(pa.DataFrameModel):
    """A kind of secret or of personal data that a file may hold, named where it stands first."""

    secret: pl.String = pa.Field(nullable=True)
    personal: pl.String = pa.Field(nullable=True)

    @pa.check(
        "secret",
        name="likely-secret",
        description="what looks like a secret ({secret}) in {count} lines: {places}; "
        "take it out, and change it where it is in use",
    )
    @classmethod
    def _holds_no_secret(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)

    @pa.check(
        "personal",
        name="personal-data",
        description="what looks like personal data ({personal}) in {count} lines: {places}",
    )
    @classmethod
    def _holds_nothing_personal(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)


def kind_frame(lines: pl.DataFrame, file: str) -> pl.DataFrame:
    """One row for each kind that a file's lines may hold, at the first of them."""
    rows = []
    for bit, kind in enumerate(KINDS):
        holding = lines.filter(pl.col("sensitive") // 2**bit % 2 == 1)["line"]
        if len(holding):
            rows.append(
                {
                    "file": file,
                    "line": holding[0],
                    kind.group: kind.name,
                    "count": len(holding),
                    "places": list_first(holding.to_list(), _SHOWN_LINES),
                }
            )
    return pl.DataFrame(rows, schema=_SCHEMA)


_SCHEMA = {
    "file": pl.String,
    "line": pl.Int32,
    "secret": pl.String,
    "personal": pl.String,
    "count": pl.Int64,
    "places": pl.String,
}
