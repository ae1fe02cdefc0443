"""Lines related to other lines: which line of train each repeats, and the format of its file.

Adds columns for the rules in line_rules.py; judges nothing.
"""

from __future__ import annotations

import numpy as np
import polars as pl

_KEYS = ("content", "folded", "prompt")
_RELATIONS = ("repeats", "resembles", "answers_otherwise")


def add_repeat_columns(files: list[tuple[str, pl.DataFrame]]) -> list[pl.DataFrame]:
    """The frames of train, valid and test with columns that relate each row to other lines.

    Adds file, train_file, is_train, file_format, and the train lines `repeats` (equal content),
    `resembles` (equal but for case and white space) and `answers_otherwise` (equal prompt, other
    content); and for valid and test `repeats_held_out`, the first line of the same file with equal
    content. The frame of test gets valid_file and `line_in_valid` (equal content) as well. What the
    rows were compared by, content, folded and prompt, is gone.
    """
    keys = [_select_keys(frame) for _, frame in files]
    first_by_key = {key: _find_first_train_rows(keys, key) for key in _KEYS}
    train, valid, test = (
        frame.drop(_KEYS).with_columns(
            _relate_to_train(rows, first_by_key, is_train=index == 0),
            file=pl.lit(file, pl.Categorical),
            train_file=pl.lit(files[0][0], pl.Categorical),
            is_train=pl.lit(index == 0),
            file_format=pl.lit(_most_frequent_format(frame), pl.Categorical),
        )
        for index, ((file, frame), rows) in enumerate(zip(files, keys, strict=True))
    )
    train = train.with_columns(repeats_held_out=pl.lit(None, pl.Int32))
    valid = valid.with_columns(repeats_held_out=_earlier_line_by_content(keys[1]))
    test = test.with_columns(
        repeats_held_out=_earlier_line_by_content(keys[2]),
        valid_file=pl.lit(files[1][0], pl.Categorical),
        line_in_valid=_first_line_by_content(keys[2]["content"], keys[1]),
    )
    return [train, valid, test]


def _select_keys(frame: pl.DataFrame) -> pl.DataFrame:
    """What the rows of a file are compared by; a line without an example has no content."""
    content = pl.when(pl.col("format").is_not_null()).then("content")
    return frame.select("line", content, "folded", "prompt").with_row_index("row")


def _find_first_train_rows(files: list[pl.DataFrame], key: str) -> pl.DataFrame:
    """Line and content of the first row of train with each key that more than one row has.

    Grouping by keys that one row has would take 300 bytes a row.
    """
    keys = np.concatenate([file[key].drop_nulls().to_numpy() for file in files])
    keys.sort()
    repeated = pl.Series(np.unique(keys[1:][keys[1:] == keys[:-1]]))
    rows = files[0].filter(pl.col(key).is_in(repeated.implode()))
    line = pl.col("line").first().alias(f"first_line_by_{key}")
    content = pl.col("content").first().alias(f"first_content_by_{key}")
    return rows.group_by(key).agg(line, *([] if key == "content" else [content]))


def _relate_to_train(
    rows: pl.DataFrame, first_by_key: dict[str, pl.DataFrame], *, is_train: bool
) -> list[pl.Series]:
    """The train lines that each row repeats, resembles or answers otherwise; most have none."""
    has_first = [pl.col(key).is_in(first[key].implode()) for key, first in first_by_key.items()]
    related = rows.filter(pl.any_horizontal(has_first))
    for key, first in first_by_key.items():
        related = related.join(first, on=key, how="left", maintain_order="left")
    related = related.with_columns(**_repeat_column_expressions(is_train=is_train))
    nothing = pl.repeat(None, rows.height, dtype=pl.Int32, eager=True)
    return [
        nothing.clone().scatter(related["row"], related[name]).alias(name) for name in _RELATIONS
    ]


def _repeat_column_expressions(*, is_train: bool) -> dict[str, pl.Expr]:
    is_own = pl.lit(is_train) & (pl.col("first_line_by_content") == pl.col("line"))
    repeats = pl.when(~is_own).then("first_line_by_content")
    is_other = pl.col("first_content_by_folded") != pl.col("content")
    resembles = pl.when(is_other & repeats.is_null()).then("first_line_by_folded")
    is_answered = pl.col("first_content_by_prompt") != pl.col("content")
    is_new = ~pl.lit(is_train) & repeats.is_null() & resembles.is_null()
    answers = pl.when(is_answered & is_new).then("first_line_by_prompt")
    return {"repeats": repeats, "resembles": resembles, "answers_otherwise": answers}


def _most_frequent_format(frame: pl.DataFrame) -> str | None:
    """The format of most rows; of two as frequent, the one that comes first."""
    formats = (
        frame.filter(pl.col("format").is_not_null())
        .group_by("format")
        .agg(pl.len(), pl.col("line").min())
        .sort("len", "line", descending=[True, False])
    )
    return formats["format"][0] if len(formats) else None


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
