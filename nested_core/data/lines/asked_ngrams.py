"""What lines of train share with held-out texts: the n-grams and words of those, and of no others.

Held-out splits are read first, so that each range of train is asked for what they hold. What is
kept of train does not grow with it: an n-gram of many training examples is common and says nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from nested_core.data.lines.word_ngrams import (
    NGRAM_SCHEMA,
    WordHasher,
    hash_word_ngrams,
    hash_word_sequences,
)
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


class AskedNgrams:
    """What is looked for in train: the n-grams and words of held-out texts.

    ngrams: uint32; words and bags: uint64, see NGRAM_SCHEMA. All ascending, each once.
    """

    def __init__(self, ngrams: Values, words: Values, bags: Values) -> None:
        self.ngrams = ngrams
        self.words = words
        self.bags = bags
        self._hasher = WordHasher()
        self._is_common = np.zeros(len(ngrams), np.bool_)  # those are looked for no more
        wanted = len(ngrams) * _TABLE_ENTRIES_PER_NGRAM
        bits = min(_MAX_TABLE_BITS, max(_MIN_TABLE_BITS, wanted.bit_length()))
        self._shift = np.uint64(64 - bits)
        self._table = np.zeros(1 << bits, np.bool_)  # True where an n-gram's first bits are
        self._table[ngrams >> np.uint32(32 - bits)] = True

    @classmethod
    def of_frames(cls, held_out: list[pl.DataFrame]) -> AskedNgrams:
        """Those of all rows of frames with the columns of NGRAM_SCHEMA."""
        frame = pl.concat([frame.select(list(NGRAM_SCHEMA)) for frame in held_out])
        ngrams = frame["ngrams"].explode().drop_nulls()
        with_words = frame.filter(pl.col("words").is_not_null())
        return cls(
            np.unique(ngrams.to_numpy()),
            np.unique(with_words["words"].to_numpy()),
            np.unique(with_words["bag"].to_numpy()),
        )

    def write(self, path: Path) -> None:
        """Write it for a worker process."""
        content = BytesIO()
        np.savez(content, ngrams=self.ngrams, words=self.words, bags=self.bags)
        path.write_bytes(content.getvalue())

    @classmethod
    def read(cls, path: Path) -> AskedNgrams:
        """What `write` wrote."""
        with np.load(BytesIO(read_regular(path)), allow_pickle=False) as arrays:
            return cls(arrays["ngrams"], arrays["words"], arrays["bags"])

    def find_in(self, texts: Sequence[str | None], contents: pl.Series) -> tuple[pl.DataFrame, int]:
        """What texts share with those asked for, and how many of the texts have n-grams.

        `contents` has a key for each text. The frame, see MATCH_SCHEMA, lacks n-grams that are
        common in the texts of an earlier call: the frame of that call has enough examples of them.
        """
        found = hash_word_ngrams(texts, self._hasher)
        may_be_asked = self._table[found.hashes >> self._shift] & found.is_sampled
        ngrams, hits = found.take(np.flatnonzero(may_be_asked))
        is_asked, places = _find_among(ngrams, self.ngrams)
        is_asked &= ~self._is_common[places]
        ngrams, hits = ngrams[is_asked], hits[is_asked]
        rows = self._rows_of_equal_words(texts, found.bags)
        owners = np.concatenate([hits, rows["row"].to_numpy()])
        shared = pl.DataFrame(
            {
                "row": owners,
                "content": contents.gather(owners),
                "halvings": found.halvings[owners],
                "ngram": pl.Series(ngrams).extend_constant(None, rows.height),
                "words": pl.repeat(None, len(hits), dtype=pl.UInt64, eager=True).append(
                    rows["words"]
                ),
            },
            schema=MATCH_SCHEMA,
        )
        shared = drop_common_ngrams(shared)
        self._remember_common(shared)
        sampled = np.concatenate([[0], np.cumsum(found.is_sampled)])[np.insert(found.ends, 0, 0)]
        return shared, int(np.count_nonzero(np.diff(sampled)))

    def _rows_of_equal_words(self, texts: Sequence[str | None], bags: Values) -> pl.DataFrame:
        """Row and words of the texts that are the same words in the same order as one asked for."""
        rows = np.flatnonzero(_find_among(bags, self.bags)[0])
        words = hash_word_sequences([texts[row] for row in rows.tolist()])
        is_equal = _find_among(words.fill_null(0).to_numpy(), self.words)[0]
        return pl.DataFrame({"row": rows, "words": words}).filter(is_equal)

    def _remember_common(self, shared: pl.DataFrame) -> None:
        examples = shared["ngram"].drop_nulls().value_counts()
        common = examples.filter(pl.col("count") > RARE_NGRAM_MAX_EXAMPLES)["ngram"].to_numpy()
        self._is_common[_find_among(common, self.ngrams)[1]] = True


def _find_among(values: Values, ascending: Values) -> tuple[Values, Values]:
    """Whether each value is among some ascending ones, and its place there."""
    if not len(ascending):
        return np.zeros(len(values), np.bool_), np.zeros(len(values), np.int64)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return ascending[places] == values, places


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
