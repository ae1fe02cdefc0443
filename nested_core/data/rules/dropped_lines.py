"""`data_policy`: which sound lines are left out of training, and the warnings that say so.

A line that is in valid or test too is dropped from train, never from those: the data that a run is
measured on stays the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import polars as pl

from nested_core.config.data import DataPolicy
from nested_core.data.rules.findings import Finding
from nested_core.errors import join_first_values

Dropped = Mapping[str, frozenset[int]]
_MAX_SHOWN_LINES = 20
_DROP_REASON_TEXTS = {
    "duplicate": "they repeat an earlier example",
    "leakage": "valid or test has the same example",
    "overlong": "they are longer than max_seq_length",
}


def separate_dropped_lines(
    train: pl.DataFrame, held_out: list[pl.DataFrame], policy: DataPolicy
) -> tuple[pl.DataFrame, list[pl.DataFrame], Dropped]:
    """The frames to judge, and the lines of train that are dropped for their content, by reason.

    In those frames `repeats` is null for what is dropped, so that no rule reports it as well.
    """
    dropped: dict[str, frozenset[int]] = {}
    no_line = pl.lit(None, pl.Int32)
    if policy.leakage == "drop":
        leaked = pl.concat([frame["repeats"] for frame in held_out]).drop_nulls().unique().implode()
        is_leaked = pl.col("line").is_in(leaked) | pl.col("repeats").is_in(leaked)
        dropped["leakage"] = _line_numbers(train.filter(is_leaked))
        train = train.with_columns(repeats=pl.when(~is_leaked).then("repeats"))
        held_out = [frame.with_columns(repeats=no_line) for frame in held_out]
    if policy.duplicates == "drop":
        dropped["duplicate"] = _line_numbers(train.filter(pl.col("repeats").is_not_null()))
        train = train.with_columns(repeats=no_line)
    return train, held_out, dropped


def _line_numbers(frame: pl.DataFrame) -> frozenset[int]:
    return frozenset(frame["line"].to_list())


def describe_dropped_lines(file: str, dropped: Dropped) -> Iterator[Finding]:
    """One warning for each reason, at the first line, with the count and the first lines."""
    for reason, lines in dropped.items():
        if lines:
            shown = sorted(lines)
            message = (
                f"lines dropped because {_DROP_REASON_TEXTS[reason]}: {len(lines):,} "
                f"({join_first_values(shown, _MAX_SHOWN_LINES)})"
            )
            yield Finding(file, shown[0], "warning", f"dropped-{reason}", message)
