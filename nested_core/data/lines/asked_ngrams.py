"""What lines of train share with held-out texts: the n-grams and words of those, and of no others.

Held-out splits are read first, so that each range of train is asked for what they hold. What is
kept of train does not grow with it: an n-gram of many training examples is common and says nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nested_core.data.lines.word_ngrams import WordNgrams
from nested_core.storage.strict_files import read_regular

RARE_NGRAM_MAX_EXAMPLES = 10  # an n-gram in more training examples is common
MATCH_SCHEMA: dict[str, type[pl.DataType]] = {
    "row": pl.Int64,  # of the line, from 0
    "content": pl.UInt64,
    "halvings": pl.UInt8,
    "ngram": pl.UInt32,  # null where all words are equal
    "words": pl.UInt64,  # null where an n-gram is shared
}
_MIN_TABLE_BITS, _MAX_TABLE_BITS = 16, 24  # a table of 64 KiB to 16 MiB
_TABLE_ENTRIES_PER_NGRAM = 32
Values = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, eq=False)
class AskedNgrams:
    """The n-grams, uint32, and word sequences, uint64, of held-out texts; ascending, each once."""

    ngrams: Values
    words: Values

    @classmethod
    def of_frames(cls, held_out: list[pl.DataFrame]) -> AskedNgrams:
        """Those of all rows of frames with the columns of NGRAM_SCHEMA."""
        frame = pl.concat([frame.select("ngrams", "words") for frame in held_out])
        ngrams = frame["ngrams"].explode().drop_nulls()
        return cls(np.unique(ngrams.to_numpy()), np.unique(frame["words"].drop_nulls().to_numpy()))

    def write(self, path: Path) -> None:
        """Write it for a worker process."""
        content = BytesIO()
        np.savez(content, ngrams=self.ngrams, words=self.words)
        path.write_bytes(content.getvalue())

    @classmethod
    def read(cls, path: Path) -> AskedNgrams:
        """What `write` wrote."""
        with np.load(BytesIO(read_regular(path)), allow_pickle=False) as arrays:
            return cls(arrays["ngrams"], arrays["words"])

    def find_in(self, found: WordNgrams, contents: pl.Series) -> pl.DataFrame:
        """What texts share with those asked for, see MATCH_SCHEMA; `contents` has a key each."""
        hits = np.flatnonzero(self._may_hold(found.ngrams))
        hits = hits[_are_among(found.ngrams[hits], self.ngrams)]
        rows = np.flatnonzero(_are_among(found.words, self.words))
        owners = np.concatenate([found.owners[hits], rows])
        shared = pl.DataFrame(
            {
                "row": owners,
                "content": contents.gather(owners),
                "halvings": found.halvings[owners],
                "ngram": pl.Series(found.ngrams[hits]).extend_constant(None, len(rows)),
                "words": pl.concat(
                    [
                        pl.Series([None] * len(hits), dtype=pl.UInt64),
                        pl.Series(found.words[rows]),
                    ]
                ),
            },
            schema=MATCH_SCHEMA,
        )
        return drop_common_ngrams(shared)

    def _may_hold(self, ngrams: Values) -> Values:
        """False for most of those that are not asked for: a look into a table that fits a cache."""
        wanted = len(self.ngrams) * _TABLE_ENTRIES_PER_NGRAM
        bits = min(_MAX_TABLE_BITS, max(_MIN_TABLE_BITS, wanted.bit_length()))
        shift = np.uint32(32 - bits)
        table = np.zeros(1 << bits, np.bool_)
        table[self.ngrams >> shift] = True
        may_hold: Values = table[ngrams >> shift]
        return may_hold


def _are_among(values: Values, ascending: Values) -> Values:
    """Whether each value is among some ascending ones."""
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    is_among: Values = ascending[places] == values
    return is_among


def drop_common_ngrams(shared: pl.DataFrame) -> pl.DataFrame:
    """Matches, ascending by row, without those that can name no line.

    Of equal examples and of equal sequences of words the first line is named. Of an n-gram that is
    common one example more than a rare one has is kept, which says so.
    """
    ngrams = shared.filter(pl.col("ngram").is_not_null())
    ngrams = ngrams.unique(["ngram", "content"], keep="first", maintain_order=True)
    count = pl.int_range(pl.len()).over("ngram")
    words = shared.filter(pl.col("ngram").is_null())
    return pl.concat(
        [
            ngrams.filter(count <= RARE_NGRAM_MAX_EXAMPLES),
            words.unique("words", keep="first", maintain_order=True),
        ]
    )


class TrainMatches:
    """What all of train shares with held-out texts, gathered range by range in the order of lines.

    examples: how many training examples with an n-gram there were.
    """

    _ROWS_BETWEEN_LOOKS = 200_000

    def __init__(self) -> None:
        self.examples = 0
        self._kept = pl.DataFrame(schema=MATCH_SCHEMA)
        self._rows_after_look = 0

    def add_range(self, shared: pl.DataFrame, examples: int, first_row: int) -> None:
        """Add what a range shares, whose first line is row `first_row` of train."""
        self.examples += examples
        self._kept = pl.concat([self._kept, shared.with_columns(pl.col("row") + first_row)])
        if self._kept.height > 2 * self._rows_after_look + self._ROWS_BETWEEN_LOOKS:
            self._drop_common()

    def _drop_common(self) -> None:
        self._kept = drop_common_ngrams(self._kept.sort("row", maintain_order=True))
        self._rows_after_look = self._kept.height

    def finish(self, lines: pl.Series) -> pl.DataFrame:
        """The matches, with the number of each line in place of its row."""
        self._drop_common()
        return self._kept.with_columns(line=lines.gather(self._kept["row"])).drop("row")
