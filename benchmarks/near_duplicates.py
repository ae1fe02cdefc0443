"""How many held-out rows nearly are a row of train after `init --split`, by how it groups rows.

    python -m benchmarks.near_duplicates ROWS.jsonl [ROWS.jsonl ...]

Of each file: split row by row, only equal rows together, and in groups of near-duplicates for
several values of RARE_NGRAM_FACTOR_IN_ALL_ROWS. A tenth is held out for valid and a tenth for test.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import polars as pl

from nested_core.data.lines.example_parsing import FieldNames
from nested_core.rooms.near_duplicates import word_ngrams
from nested_core.rooms.near_duplicates.word_ngrams import NEAR_DUPLICATES, find_near_duplicates
from nested_core.rooms.tables import dataset_split

FACTORS = (None, 1.0, 1.25, 1.5, 2.0, 3.0)  # None: no group of near-duplicates
SHARE = 0.1


def list_texts(rows: list[bytes]) -> list[str]:
    """What is compared of each row."""
    return [dataset_split.RowTexts.of(row, FieldNames()).whole for row in rows]


def count_near_duplicates(parts: dict[str, list[bytes]]) -> int:
    """How many rows of valid and test `validate` would call nearly a row of train."""
    train, held_out = list_texts(parts["train"]), list_texts([*parts["valid"], *parts["test"]])
    asked = pl.DataFrame(NEAR_DUPLICATES.hash_texts(held_out))
    keys = pl.Series(range(len(train)), dtype=pl.UInt64)
    matches = NEAR_DUPLICATES.start_matching()
    shared, examples = NEAR_DUPLICATES.collect([asked]).find_in(train, keys)
    matches.add_range(shared, examples, 0)
    lines = pl.Series(range(1, len(train) + 1), dtype=pl.Int32)
    found = find_near_duplicates(matches.finish(lines), examples, asked)
    return int(found["near"].is_not_null().sum())


def split(rows: list[bytes], factor: float | None) -> dict[str, list[bytes]]:
    """The rows of train, valid and test."""
    if factor is None:
        patch = mock.patch.object(dataset_split, "_pair_near_duplicates", return_value=[])
    else:
        patch = mock.patch.object(word_ngrams, "RARE_NGRAM_FACTOR_IN_ALL_ROWS", factor)
    with patch:
        drawn = dataset_split.draw_splits(rows, dataset_split.SplitRequest(SHARE, 0))
    if drawn is None:
        raise SystemExit("too few rows to split")
    return drawn.lines


def main() -> None:
    """Print a line for each file and factor."""
    for path in map(Path, sys.argv[1:]):
        rows = [row for line in path.read_bytes().split(b"\n") if (row := line.strip())]
        for factor in FACTORS:
            parts = split(rows, factor)
            sizes = ", ".join(f"{name} {len(part):,}" for name, part in parts.items())
            how = "equal rows" if factor is None else f"factor {factor:g}"
            print(f"{path} ({sizes}), {how}: {count_near_duplicates(parts):,}")


if __name__ == "__main__":
    main()
