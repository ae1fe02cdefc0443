"""Lines related to other lines: which line of train each repeats, and the format of its file.

Adds columns for the rules in line_rules.py; judges nothing.
"""

from __future__ import annotations

from itertools import accumulate

import polars as pl
import polars.selectors as cs


def add_repeat_columns(files: list[tuple[str, pl.DataFrame]]) -> list[pl.DataFrame]:
    """The frames of train, valid and test with columns that relate each row to other lines.

    Adds file, train_file, is_train, file_format, and the train lines `repeats` (equal content),
    `resembles` (equal but for case and white space) and `answers_otherwise` (equal prompt, other
    content); and for valid and test `repeats_held_out`, the first line of the same file with equal
    content. The frame of test gets valid_file and `line_in_valid` (equal content) as well.
    """
    named = [
        frame.with_columns(
            file=pl.lit(file, pl.Categorical),
            train_file=pl.lit(files[0][0], pl.Categorical),
            is_train=pl.lit(index == 0),
            content=pl.when(pl.col("format").is_not_null()).then("content"),
        )
        for index, (file, frame) in enumerate(files)
    ]
    frame = _add_file_format(pl.concat(named))
    for key in ("content", "folded", "prompt"):
        frame = _add_first_train_row_by_key(frame, key)
    related = frame.with_columns(**_repeat_column_expressions())
    related = related.drop("content", "folded", "prompt", cs.starts_with("first_"))
    starts = accumulate((frame.height for _, frame in files), initial=0)
    train, valid, test = (
        related.slice(start, frame.height)  # a view, not a copy
        for start, (_, frame) in zip(starts, files, strict=False)
    )
    train = train.with_columns(repeats_held_out=pl.lit(None, pl.Int32))
    valid = valid.with_columns(repeats_held_out=_earlier_line_by_content(named[1]))
    test = test.with_columns(
        repeats_held_out=_earlier_line_by_content(named[2]),
        valid_file=pl.lit(files[1][0], pl.Categorical),
        line_in_valid=_first_line_by_content(named[2]["content"], named[1]),
    )
    return [train, valid, test]


def _earlier_line_by_content(file: pl.DataFrame) -> pl.Series:
    """The first line of the same file with the content of each row; null for that line itself."""
    first = _first_line_by_content(file["content"], file)
    repeated = pl.when(pl.col("line") > pl.col("first")).then("first").cast(pl.Int32)
    return file.select("line").with_columns(first=first).select(repeated)["first"]


def _first_line_by_content(contents: pl.Series, file: pl.DataFrame) -> pl.Series:
    """The first line of a file with each of these contents, or null."""
    examples = file.filter(pl.col("content").is_not_null())
    first = examples.group_by("content").agg(pl.col("line").first())
    return contents.to_frame().join(first, on="content", how="left", maintain_order="left")["line"]


def _add_file_format(frame: pl.DataFrame) -> pl.DataFrame:
    """Add the format of most rows of the file; of two as frequent, the one that comes first."""
    formats = (
        frame.filter(pl.col("format").is_not_null())
        .group_by("file", "format")
        .agg(pl.len(), pl.col("line").min())
        .sort("len", "line", descending=[True, False])
        .group_by("file", maintain_order=True)
        .agg(pl.col("format").first().alias("file_format"))
    )
    return frame.join(formats, on="file", how="left", maintain_order="left")


def _add_first_train_row_by_key(frame: pl.DataFrame, key: str) -> pl.DataFrame:
    """Add line and content of the first row of train with the same key; null matches nothing."""
    content = pl.col("content").first().alias(f"first_content_by_{key}")
    line = pl.col("line").first().alias(f"first_line_by_{key}")
    keys = frame[key].drop_nulls().sort()
    repeated = keys.filter(keys == keys.shift()).unique()  # grouping all keys takes 300 bytes a row
    train = frame.filter(pl.col("is_train") & pl.col(key).is_in(repeated.implode()))
    first = train.group_by(key).agg(*((line,) if key == "content" else (line, content)))
    return frame.join(first, on=key, how="left", maintain_order="left")


def _repeat_column_expressions() -> dict[str, pl.Expr]:
    is_own = pl.col("is_train") & (pl.col("first_line_by_content") == pl.col("line"))
    repeats = pl.when(~is_own).then("first_line_by_content")
    is_other = pl.col("first_content_by_folded") != pl.col("content")
    resembles = pl.when(is_other & repeats.is_null()).then("first_line_by_folded")
    is_answered = pl.col("first_content_by_prompt") != pl.col("content")
    is_new = ~pl.col("is_train") & repeats.is_null() & resembles.is_null()
    answers = pl.when(is_answered & is_new).then("first_line_by_prompt")
    return {"repeats": repeats, "resembles": resembles, "answers_otherwise": answers}
