"""What makes a data set unfit (errors) or doubtful (warnings), as pandera models over its frames.

Each check is one expression that holds for a good row; null passes. Nothing is read or counted.
"""

from __future__ import annotations

import pandera.polars as pa
import polars as pl
from pandera.polars import PolarsData

from nested_core.data.rules.rule_table import READABLE, is_null

# A conversation so far: system first if at all, users and assistants in turn, results after a call.
# An orphan result (o) counts as one here, for it has a check of its own.
_ORDER = r"^s?(?:u(?:c[to]+)*a)*(?:u(?:c[to]+)*c?)?$"
_ORPHAN = r"o|(?:^|[^cto])t"
_ROLES = "the turns are {turns}; "


def _holds(data: PolarsData, expression: pl.Expr) -> pl.LazyFrame:
    return data.lazyframe.select(expression)


def _matches(data: PolarsData, pattern: str) -> pl.LazyFrame:
    """Whether the turns of a chat match; rows of other formats are null."""
    chats = pl.when(pl.col("format") == "chat").then(pl.col("roles").cast(pl.String))
    return data.lazyframe.select(chats.str.contains(pattern))


class RowErrors(pa.DataFrameModel):
    """What makes one line unfit to train on."""

    check: pl.Categorical = pa.Field(nullable=True)
    format: pl.Categorical = pa.Field(nullable=True)
    blank_field: pl.Categorical = pa.Field(nullable=True)
    roles: pl.Categorical = pa.Field(nullable=True)
    repeats: pl.Int32 = pa.Field(nullable=True)

    @pa.check("check", name=READABLE)
    @classmethod
    def _is_readable(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)

    @pa.check(
        "format",
        name="mixed-format",
        description="this line is {format}, most of the file is {file_format}; "
        "mlx-lm reads a file in one format",
    )
    @classmethod
    def _has_the_format_of_its_file(cls, data: PolarsData) -> pl.LazyFrame:
        return _holds(data, pl.col("format") == pl.col("file_format"))

    @pa.check("blank_field", name="blank-field", description="{blank_field} has no text in it")
    @classmethod
    def _has_text(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)

    @pa.check(
        "roles",
        name="no-assistant-turn",
        description=_ROLES + "without an assistant's there is nothing to learn",
    )
    @classmethod
    def _has_an_assistant(cls, data: PolarsData) -> pl.LazyFrame:
        return _matches(data, "[ac]")

    @pa.check(
        "roles",
        name="last-turn-not-assistant",
        description=_ROLES + "the last one is what is learnt and must be the assistant's",
    )
    @classmethod
    def _ends_with_the_assistant(cls, data: PolarsData) -> pl.LazyFrame:
        return _matches(data, "^[^ac]*$|[ac]$")

    @pa.check(
        "roles",
        name="tool-without-call",
        description=_ROLES + "a tool's result must follow the call that asked for it",
    )
    @classmethod
    def _has_a_call_for_each_result(cls, data: PolarsData) -> pl.LazyFrame:
        return _holds(data, ~pl.col("roles").cast(pl.String).str.contains(_ORPHAN))

    @pa.check(
        "roles",
        name="role-order",
        description=_ROLES + "expected system (optional), then user and assistant in turn, "
        "tool results right after their call",
    )
    @classmethod
    def _takes_turns(cls, data: PolarsData) -> pl.LazyFrame:
        return _matches(data, f"{_ORDER}|{_ORPHAN}")

    @pa.check(
        "repeats",
        name="leakage",
        description="the same example is in {train_file}:{repeats}; "
        "a loss on it says nothing about new data",
    )
    @classmethod
    def _is_not_in_train(cls, data: PolarsData) -> pl.LazyFrame:
        return _holds(data, pl.col("is_train") | pl.col("repeats").is_null())


class RowWarnings(pa.DataFrameModel):
    """What a person should look at in one line, or a habit of many, told at the first of them."""

    repeats: pl.Int32 = pa.Field(nullable=True)
    resembles: pl.Int32 = pa.Field(nullable=True)
    answers_otherwise: pl.Int32 = pa.Field(nullable=True)
    unknown_lines: pl.UInt32 = pa.Field(nullable=True)
    mark_lines: pl.UInt32 = pa.Field(nullable=True)
    crlf_lines: pl.UInt32 = pa.Field(nullable=True)
    has_control: pl.Boolean
    has_replacement: pl.Boolean

    @pa.check("repeats", name="duplicate", description="the same example as line {repeats}")
    @classmethod
    def _is_new(cls, data: PolarsData) -> pl.LazyFrame:
        return _holds(data, ~pl.col("is_train") | pl.col("repeats").is_null())

    @pa.check(
        "resembles",
        name="near-duplicate",
        description="like {train_file}:{resembles} but for case and white space",
    )
    @classmethod
    def _resembles_none(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)

    @pa.check(
        "answers_otherwise",
        name="same-prompt-other-answer",
        description="{train_file}:{answers_otherwise} answers this prompt otherwise",
    )
    @classmethod
    def _agrees_with_train(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)

    @pa.check(
        "unknown_lines",
        name="unknown-key",
        description="ignored: {unknown_keys} (lines with it: {unknown_lines})",
    )
    @classmethod
    def _has_known_keys(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)

    @pa.check(
        "mark_lines",
        name="byte-order-mark",
        description="the file begins with a byte-order mark, at which mlx-lm stops",
    )
    @classmethod
    def _has_no_mark(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)

    @pa.check(
        "crlf_lines",
        name="crlf",
        description="lines that end in CRLF: {crlf_lines}, from this one on",
    )
    @classmethod
    def _ends_in_line_feed(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)

    @pa.check("has_control", name="control-character", description="a text holds one")
    @classmethod
    def _is_printable(cls, data: PolarsData) -> pl.LazyFrame:
        return _holds(data, ~pl.col("has_control"))

    @pa.check(
        "has_replacement",
        name="replacement-character",
        description="U+FFFD in a text: something was decoded wrongly before it came here",
    )
    @classmethod
    def _was_decoded_well(cls, data: PolarsData) -> pl.LazyFrame:
        return _holds(data, ~pl.col("has_replacement"))
