"""The interfaces of rooms that judge rows of a data set by their texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import polars as pl
from polars._typing import PolarsDataType

from nested_core.records.dataset import Finding, Findings, Severity


@dataclass(frozen=True)
class RowChecks:
    """Checks of rows.

    schema: the columns that are read with each line, by name.
    find: returns these columns of the lines' texts, whose turns are joined by NUL.
    add_findings: adds the findings on a file's lines, of a frame with these columns.
    judge: yields findings on valid Examples beside each other, by split and then by line, without
        `training.loss`; of a large split they are a part. Each names a split instead of a file.
    """

    schema: Mapping[str, PolarsDataType]
    find: Callable[[pl.Series], Mapping[str, pl.Series]]
    add_findings: Callable[[pl.DataFrame, Findings], None]
    judge: Callable[[Mapping[str, Mapping[int, Any]]], Iterator[Finding]] | None = None


class AskedTexts(Protocol):
    """What is looked for in train: n-grams of held-out texts."""

    def write(self, path: Path) -> None:
        """Write it to a file for another process."""

    def find_in(self, texts: Sequence[str | None], contents: pl.Series) -> tuple[pl.DataFrame, int]:
        """Return what texts share with those asked for, and how many of them have n-grams.

        contents: a key for each text.
        """


class SharedWithTrain(Protocol):
    """What train shares with the texts asked for, gathered range by range in the order of lines.

    examples: how many training examples with an n-gram there were.
    """

    examples: int

    def add_range(self, shared: pl.DataFrame, examples: int, first_row: int) -> None:
        """Add what `AskedTexts.find_in` gave of a range, whose first line is this row of train."""

    def finish(self, lines: pl.Series) -> pl.DataFrame:
        """Return all matches, with the number of each line, one of `lines`, in place of its row."""


@dataclass(frozen=True)
class NearDuplicates:
    """How near-duplicates are found.

    schema: the columns that are read with each line, by name.
    hash_texts: returns these columns of texts, a row each; None is no text.
    collect: returns the n-grams to look for in train: those of the held-out splits, whose frames
        have these columns.
    read_asked: reads what `AskedTexts.write` wrote.
    start_matching: returns a SharedWithTrain without matches, to which `read` adds them.
    relate: adds the columns that the rules judge to the rows of a held-out file, of these rows,
        the same rows with the columns of `schema`, the matches and the number of examples in train.
    add_findings: adds the findings on a held-out file's rows, of this severity.
    pair: yields pairs of the indices of texts that nearly are one another.
    """

    schema: Mapping[str, PolarsDataType]
    hash_texts: Callable[[Sequence[str | None]], Mapping[str, pl.Series]]
    collect: Callable[[list[pl.DataFrame]], AskedTexts]
    read_asked: Callable[[Path], AskedTexts]
    start_matching: Callable[[], SharedWithTrain]
    relate: Callable[[pl.DataFrame, pl.DataFrame, pl.DataFrame, int], pl.DataFrame]
    add_findings: Callable[[pl.DataFrame, Findings, Severity], None]
    pair: Callable[[Sequence[str]], Iterable[Sequence[int]]]
