"""What nearly all rows of one split have and nearly none of another: how train and use differ.

Rows of one table are alike however they are split. A system text, a prefix, a trailing blank or
another case that one file alone has comes from two programs that wrote them.
"""

from __future__ import annotations

from collections.abc import Sequence

import polars as pl

from nested_core.records.dataset import Finding, Findings

MIN_ROWS, MAX_ROWS = 8, 10_000  # of each split: fewer are not compared, of more a part
MOST, FEWEST = 0.9, 0.1  # of the rows, of the one split and of the other
WIDTHS = {"system text": 40, "prompt": 12, "answer": 12}  # characters at an end
FOLDED_WIDTH = 2  # of them, with A for capitals, a for small letters and 9 for digits
SCHEMA = dict.fromkeys(
    ("system text begin", "prompt begin", "prompt end", "answer begin", "answer end"), pl.String
)


def cut_texts(turns: pl.Series) -> dict[str, pl.Series]:
    """Return the beginnings of system texts, prompts and answers, and the ends of these two.

    turns: lists of roles, turns and the answer. Where there is no prompt all are null; a row
        without a system text has an empty one.
    """
    is_plain = (turns.list.len() < 3).fill_null(value=True)
    lacks_system = ~turns.list.first().str.contains("s", literal=True).fill_null(value=True)
    columns = {}
    for name in SCHEMA:
        kind, _, end = name.rpartition(" ")
        place = {"system text": 1, "prompt": -2, "answer": -1}[kind]
        cut = _cut(turns.list.get(place, null_on_oob=True), end, WIDTHS[kind])
        cut = cut.set(lacks_system, "") if kind == "system text" else cut
        columns[name] = cut.set(is_plain, None)
    return columns


def compare_splits(splits: Sequence[pl.DataFrame], findings: Findings) -> None:
    """Add a finding for each part of rows that a held-out split writes otherwise than train.

    splits: their rows with `file` and the columns of `SCHEMA`, train first.
    """
    columns = [pl.col("file"), *map(pl.col, SCHEMA)]
    rows = [one.select(columns).filter(pl.col("answer end").is_not_null()) for one in splits]
    train, *held_out = (one.gather_every(1 + len(one) // MAX_ROWS) for one in rows)
    for other in held_out if len(train) >= MIN_ROWS else ():
        for name in SCHEMA if len(other) >= MIN_ROWS else ():
            told = _compare_part(train, other, name) or _compare_part(other, train, name)
            if told is not None:
                told += (
                    ". What is learnt and what is asked are written otherwise: write both in one "
                    "way, unless they differ on purpose"
                )
                file = other["file"][0]
                findings.listed.append(Finding(file, None, "warning", "splits-differ", told))


def _compare_part(many: pl.DataFrame, few: pl.DataFrame, name: str) -> str | None:
    """Say what nearly all rows of `many` have in a column, and nearly none of `few`; else None."""
    kind, _, end = name.rpartition(" ")
    ways = [(width, False) for width in range(WIDTHS[kind], 0, -1)]
    for width, is_folded in (*ways, (FOLDED_WIDTH, True), (1, True)):
        texts, others = (_cut(one[name], end, width, is_folded=is_folded) for one in (many, few))
        text, count = texts.value_counts(sort=True, name="count").row(0)
        found = int((others == text).sum())
        if text and count >= MOST * len(many) and found <= FEWEST * len(few):
            verb = "end in" if end == "end" else "begin with"
            another = few[name].filter(others != text)[0]
            return (
                f"{count:,} of {len(many):,} {kind}s of {many['file'][0]} {verb} {text!r}, "
                f"{found:,} of {len(few):,} of {few['file'][0]}, the first of them {another!r}"
            )
    return None


def _cut(texts: pl.Series, end: str, width: int, *, is_folded: bool = False) -> pl.Series:
    """Return the first characters of texts or, of their `end`, the last, with 9 for numbers.

    is_folded: with a for letters, too, and A for capitals.
    """
    folds = {r"\d+": "9"}  # dates and counts go on from split to split
    if is_folded:
        folds |= {r"[\p{L}--\p{Lu}]": "a", r"\p{Lu}": "A"}
    for pattern, kind in folds.items():
        cut = texts.str.tail(4 * width) if end == "end" else texts.str.head(4 * width)
        texts = cut.str.replace_all(pattern, kind)
    return texts.str.tail(width) if end == "end" else texts.str.head(width)
