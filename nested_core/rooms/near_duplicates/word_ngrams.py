"""Word n-grams of many texts at once, and which of them train shares with held-out texts.

A word is a run of letters, digits and underscores in small letters; punctuation falls away and all
digits count as one, so that "Order 17, please!" has the n-grams of "order 23 please". Of scripts
that are written without blanks, such as Chinese, each character is a word. Held-out
splits are read first, so that each range of train is asked for what they hold. What is kept of
train does not grow with it: an n-gram of many training examples is common and says nothing.

A row of valid or test is paired with the row of train that it nearly is, by the n-grams that few
training examples have: those of many, such as a template's, say nothing of two examples. So the
cost is linear in the number of lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from polars._typing import PolarsDataType

from nested_core.data.room_checks import NearDuplicates
from nested_core.data.rules.rule_table import FrameRules, Rule
from nested_core.records.dataset import Severity
from nested_core.storage.untrusted_files import read_regular

NGRAM_LENGTH = 3
_UNSPACED = r"\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
_WORD = rf"[{_UNSPACED}]|[\w--[{_UNSPACED}]]+"
# Of a text with more, those whose hash ends in enough zero bits: the same ones in every text.
MAX_NGRAMS_PER_TEXT = 32
MAX_CHARACTERS = 4_000_000  # of a text that is compared; words take some 15 bytes a character
NGRAM_SCHEMA: dict[str, PolarsDataType] = {
    "words": pl.UInt64,  # equal for equal sequences of words, digits as they are; null without one
    "ngrams": pl.List(pl.UInt32),  # a sample of its NGRAM_LENGTH-word sequences, digits folded
    "halvings": pl.UInt8,  # how often the sample was halved: 2 ** halvings times as many are there
    "bag": pl.UInt64,  # equal for texts of the same words in any order, digits folded
}
Hashes = np.ndarray[Any, np.dtype[np.uint64]]
Indices = np.ndarray[Any, np.dtype[np.int64]]
# Odd numbers, so that the order of the words matters.
_HASH_FACTORS = tuple(np.uint64(factor) for factor in (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 1))


@dataclass(frozen=True, eq=False)
class WordNgrams:
    """Hashes of the words of texts, which are the same in every process.

    hashes: uint64 [words], of the NGRAM_LENGTH words from each word on, digits folded.
    is_sampled: bool [words], whether they are in one text and in its sample.
    ends: int64 [texts], the number of words up to the end of each text.
    halvings: uint8 [texts], how often a text's sample was halved.
    bags: uint64 [texts], equal for texts of the same words in any order, digits folded; 0 without.
    """

    hashes: Hashes
    is_sampled: np.ndarray[Any, np.dtype[np.bool_]]
    ends: Indices
    halvings: np.ndarray[Any, np.dtype[np.uint8]]
    bags: Hashes

    def take_sample(self) -> tuple[np.ndarray[Any, np.dtype[np.uint32]], Indices]:
        """Return the sampled n-grams, uint32, and the index of the text that each is in."""
        places = np.flatnonzero(self.is_sampled)
        ngrams = (self.hashes[places] >> np.uint64(32)).astype(np.uint32)
        return ngrams, np.searchsorted(self.ends, places, side="right")

    def to_columns(self, texts: Sequence[str | None]) -> dict[str, pl.Series]:
        """Return the columns of NGRAM_SCHEMA, a row for each of the texts that were hashed."""
        ngrams, owners = self.take_sample()
        sampled = pl.DataFrame(
            {"owner": owners, "ngrams": ngrams}, schema={"owner": pl.Int64, "ngrams": pl.UInt32}
        )
        lists = sampled.group_by("owner", maintain_order=True).agg("ngrams")
        rows = pl.DataFrame({"owner": pl.int_range(len(texts), dtype=pl.Int64, eager=True)})
        joined = rows.join(lists, on="owner", how="left", maintain_order="left")["ngrams"]
        return {
            "words": hash_word_sequences(texts),
            "ngrams": joined,
            "halvings": pl.Series(self.halvings),
            "bag": pl.Series(self.bags),
        }


def hash_word_ngrams(texts: Sequence[str | None]) -> WordNgrams:
    """Return the hashes of the n-grams of words of texts, with a sample for each text.

    None, and a text of more than MAX_CHARACTERS, have no words.
    """
    words = _split_into_words(texts, folds_digits=True)
    counts = words.list.len().cast(pl.Int64).to_numpy()
    # The hash of a word is polars': it decides which n-grams of a long text are compared
    hashes: Hashes = words.explode().drop_nulls().hash(seed=0).to_numpy()
    ends = np.cumsum(counts)
    sizes = np.maximum(counts, MAX_NGRAMS_PER_TEXT + NGRAM_LENGTH - 1) - (NGRAM_LENGTH - 1)
    halvings = np.ceil(np.log2(sizes / MAX_NGRAMS_PER_TEXT)).astype(np.uint8)
    zeros = (np.uint64(1) << halvings.astype(np.uint64)) - np.uint64(1)
    ngrams = _hash_neighbouring_words(hashes)
    is_sampled = ngrams & np.repeat(zeros, counts) == 0
    for words_left in range(1, NGRAM_LENGTH):  # too few words of their text follow these
        is_sampled[(ends - words_left)[counts >= words_left]] = False
    return WordNgrams(ngrams, is_sampled, ends, halvings, _sum_by_text(hashes, counts))


def hash_word_sequences(texts: Sequence[str | None]) -> pl.Series:
    """A hash of all words of each text in their order, digits as they are; null without a word."""
    words = _split_into_words(texts)
    has_words = words.list.len() > 0
    return pl.select(pl.when(has_words).then(words.list.join(" ").hash(seed=0))).to_series()


def _split_into_words(texts: Sequence[str | None], *, folds_digits: bool = False) -> pl.Series:
    """The words of each text in small letters, a list each; with `folds_digits` each digit is 0.

    None and a text of more than MAX_CHARACTERS have no word.
    """
    compared = ["" if text is None or len(text) > MAX_CHARACTERS else text for text in texts]
    small = pl.Series(compared, dtype=pl.String).str.to_lowercase()
    if folds_digits:
        small = small.str.replace_all(r"\d", "0")
    return small.str.extract_all(_WORD)


def _sum_by_text(hashes: Hashes, counts: Indices) -> Hashes:
    """The sum of the hashes of each text, modulo 2**64."""
    sums = np.zeros(len(counts), np.uint64)
    has_words = counts > 0
    if has_words.any():
        sums[has_words] = np.add.reduceat(hashes, (np.cumsum(counts) - counts)[has_words])
    return sums


def _hash_neighbouring_words(hashes: Hashes) -> Hashes:
    """The hash of the NGRAM_LENGTH words from each word on; the last ones have fewer."""
    ngrams = np.zeros(len(hashes), np.uint64)
    for place, factor in enumerate(_HASH_FACTORS):
        following = hashes[place:]
        ngrams[: len(following)] += following * factor
    ngrams ^= ngrams >> np.uint64(29)  # the low bits, which choose the sample, need the high ones
    return ngrams


RARE_NGRAM_MAX_EXAMPLES = 10  # an n-gram in more training examples is common
MATCH_SCHEMA: dict[str, type[pl.DataType]] = {
    "row": pl.Int64,  # of the line, from 0
    "content": pl.UInt64,
    "halvings": pl.UInt8,
    "ngram": pl.UInt32,  # null where all words are equal
    "words": pl.UInt64,  # null where an n-gram is shared
}
_MATCHES_WORTH_A_LOOK = 1_000  # below this, those that can name no line cost less than finding them
Values = np.ndarray[Any, np.dtype[Any]]


class AskedNgrams:
    """What is looked for in train: the n-grams and words of held-out texts.

    ngrams: uint32; words and bags: uint64, see NGRAM_SCHEMA. All ascending, each once.
    """

    def __init__(self, ngrams: Values, words: Values, bags: Values) -> None:
        self.ngrams = ngrams
        self.words = words
        self.bags = bags
        self._is_common = np.zeros(len(ngrams), np.bool_)  # those are looked for no more

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
        """Return what texts share with those asked for, and how many of the texts have n-grams.

        The frame has the columns of MATCH_SCHEMA. If it gets long, matches that can name no line
        are left out; later calls also leave out the n-grams that were common in it, of which it
        has examples enough.

        contents: a key for each text.
        """
        hashed = hash_word_ngrams(texts)
        ngrams, text_numbers = hashed.take_sample()
        is_asked, places = _find_among(ngrams, self.ngrams)
        is_asked[is_asked] = ~self._is_common[places[is_asked]]
        ngrams, text_numbers = ngrams[is_asked], text_numbers[is_asked]
        equal = self._rows_of_equal_words(texts, hashed.bags)
        found = pl.DataFrame({"row": text_numbers, "ngram": ngrams})
        found = pl.concat([found, equal], how="diagonal")
        owners = found["row"].to_numpy()
        columns = {"content": contents.gather(owners), "halvings": hashed.halvings[owners]}
        shared = found.with_columns(**columns).select(*MATCH_SCHEMA)
        if shared.height > _MATCHES_WORTH_A_LOOK:
            shared = drop_common_ngrams(shared)
            examples = shared["ngram"].drop_nulls().value_counts()
            common = examples.filter(pl.col("count") > RARE_NGRAM_MAX_EXAMPLES)["ngram"].to_numpy()
            self._is_common[_find_among(common, self.ngrams)[1]] = True
        sampled = np.concatenate([[0], np.cumsum(hashed.is_sampled)])[np.insert(hashed.ends, 0, 0)]
        return shared, int(np.count_nonzero(np.diff(sampled)))

    def _rows_of_equal_words(self, texts: Sequence[str | None], bags: Values) -> pl.DataFrame:
        """Row and words of the texts that are the same words in the same order as one asked for."""
        rows = np.flatnonzero(_find_among(bags, self.bags)[0])
        words = hash_word_sequences([texts[row] for row in rows.tolist()])
        is_equal = _find_among(words.fill_null(0).to_numpy(), self.words)[0]
        return pl.DataFrame({"row": rows, "words": words}).filter(is_equal)


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

    _ROWS_BETWEEN_LOOKS = 50_000  # of which a look takes some 15 MiB for a moment

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


MIN_SHARED_NGRAM_SHARE = 0.6  # of a held-out example's n-grams that are not common
MIN_SHARED_NGRAMS = 2
# An n-gram in more than RARE_NGRAM_MAX_EXAMPLES is common; in a small training set at fewer.
RARE_NGRAM_MAX_EXAMPLES_IN_SMALL_SET = 2
RARE_NGRAM_TRAIN_SIZE_DIVISOR = 50
# Before a split an n-gram is in more examples than it will be in train. Of the factors from 1 to 3,
# this one left the fewest near-duplicates of a held-out row in train.
RARE_NGRAM_FACTOR_IN_ALL_ROWS = 1.5
_TEXTS_AT_ONCE = 20_000


def find_near_duplicates(
    shared: pl.DataFrame, examples: int, held_out: pl.DataFrame
) -> pl.DataFrame:
    """Return, for each held-out row, the line of train that it nearly is, and how much they share.

    The columns are near (Int32), the first of the lines that share most, null if none shares
    enough; and shared (Int32), per cent of the row's n-grams, 100 for the same sequence of words.

    shared: the n-grams of train that held-out rows have too, from `TrainMatches.finish`.
    examples: the number of training examples.
    held_out: the held-out rows, with the columns of NGRAM_SCHEMA.
    """
    rows = held_out.select("words", "ngrams", "halvings").with_row_index("row")
    first = shared.filter(pl.col("ngram").is_null()).select("words", near="line")
    equal = rows.join(first, on="words").select("row", "near", shared=pl.lit(100.0))
    hits = shared.filter(pl.col("ngram").is_not_null())
    found = pl.concat([equal, _pair_rows_by_shared_ngrams(hits, examples, rows)])
    best = found.sort("row", "shared", "near", descending=[False, True, False]).unique(
        "row", keep="first"
    )
    return rows.join(best, on="row", how="left", maintain_order="left").select(
        pl.col("near"), pl.col("shared").round().cast(pl.Int32)
    )


def pair_near_duplicates(texts: Sequence[str]) -> Iterator[tuple[int, int]]:
    """Yield pairs of texts, by index, that are the same words or share enough n-grams of words.

    N-grams that many of the texts have, such as those of a template, do not count. A pair may come
    more than once, and in both orders.
    """
    if not texts:
        return
    parts: list[pl.DataFrame] = []
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        part = texts[first : first + _TEXTS_AT_ONCE]
        columns = pl.DataFrame(hash_word_ngrams(part).to_columns(part))
        parts.append(columns.drop("bag").with_row_index("row", offset=first))
    rows = pl.concat(parts)
    same_words = rows.drop_nulls("words").select("row", near=pl.col("row").first().over("words"))
    is_another = pl.col("row") != pl.col("near")
    yield from same_words.filter(is_another).iter_rows()
    max_texts = int(RARE_NGRAM_FACTOR_IN_ALL_ROWS * _max_examples_of_rare_ngram(len(texts)))
    distinct = pl.col("ngrams").list.unique()
    ngrams = rows.select("row", "halvings", ngram=distinct).explode("ngram").drop_nulls()
    common = ngrams.group_by("ngram").len("texts").filter(pl.col("texts") > max_texts)
    rare = ngrams.join(common, on="ngram", how="anti")
    shared = rare.filter(rare["ngram"].is_duplicated()).rename({"row": "line"})
    for first in range(0, len(texts), _TEXTS_AT_ONCE):
        is_in_part = pl.col("row").is_between(first, first + _TEXTS_AT_ONCE - 1)
        pairs = _pair_by_rare_ngrams(rare.filter(is_in_part), shared)
        yield from pairs.filter(is_another).select("row", "near").iter_rows()


def _pair_rows_by_shared_ngrams(
    hits: pl.DataFrame, examples: int, rows: pl.DataFrame
) -> pl.DataFrame:
    """Return the pairs of a held-out row and a line of train that share enough rare n-grams.

    The columns are row, near (the line) and shared (per cent of the row's n-grams).

    hits: the n-grams of train that held-out rows have too.
    examples: the number of training examples.
    rows: the held-out rows.
    """
    max_examples = _max_examples_of_rare_ngram(examples)
    ngrams = rows.select("row", "halvings", ngram="ngrams").explode("ngram").drop_nulls("ngram")
    contents = hits.group_by("ngram").agg(pl.col("content").n_unique())
    common = contents.filter(pl.col("content") > max_examples)
    return _pair_by_rare_ngrams(ngrams.unique().join(common, on="ngram", how="anti"), hits)


def _max_examples_of_rare_ngram(examples: int) -> int:
    """Return the most examples, of this number, that may have an n-gram which is not common."""
    limit = max(RARE_NGRAM_MAX_EXAMPLES_IN_SMALL_SET, examples // RARE_NGRAM_TRAIN_SIZE_DIVISOR)
    return min(RARE_NGRAM_MAX_EXAMPLES, limit)


def _pair_by_rare_ngrams(ngrams: pl.DataFrame, others: pl.DataFrame) -> pl.DataFrame:
    """Return the pairs of rows that share enough n-grams: row, near and shared (per cent).

    ngrams: the n-grams of the rows, one in each line, without common ones.
    others: those of the rows that they are compared with, whose numbers are in `line`.
    """
    sizes = ngrams.group_by("row").agg(size=pl.len())
    pairs = ngrams.join(others, on="ngram", suffix="_of_other")
    counts = pairs.group_by("row", "line").agg(
        pl.len().alias("count"),
        # Of a longer text only a sample of n-grams is kept, which was halved more often: so many
        # times more would be shared with all of its n-grams
        halvings=(pl.col("halvings_of_other").cast(pl.Int32) - pl.col("halvings").cast(pl.Int32))
        .first()
        .clip(0),
    )
    share = pl.col("count") * 2 ** pl.col("halvings") / pl.col("size")
    return (
        counts.join(sizes, on="row")
        .with_columns(shared=share.clip(0, 1) * 100.0)
        .filter(
            (pl.col("count") >= MIN_SHARED_NGRAMS)
            & (pl.col("shared") >= MIN_SHARED_NGRAM_SHARE * 100)
        )
        .select("row", pl.col("line").alias("near"), "shared")
    )


@cache
def make_near_duplicate_rules(severity: Severity) -> FrameRules:
    """Return the rules that report a line of valid or test which nearly is a line of train."""
    is_reported = pl.col("resembles").is_not_null() & (severity == "warning")
    near = Rule(
        "near-duplicate",
        severity,
        pl.col("near").is_null() | is_reported,
        "nearly the row {train_file}:{near}, which is trained on: {shared} % of its sequences of "
        "three words are in it, digits and punctuation aside. Its loss says little about new data: "
        "take one of the two out, or set data_policy.near_duplicates: off if your rows are alike",
    )
    columns = {"near": pl.Int32, "shared": pl.Int32, "resembles": pl.Int32}
    return FrameRules(columns={**columns, "train_file": pl.Categorical}, rules=(near,))


def hash_texts(texts: Sequence[str | None]) -> dict[str, pl.Series]:
    """Return the columns of NGRAM_SCHEMA for texts, a row each."""
    return hash_word_ngrams(texts).to_columns(texts)


def relate(
    related: pl.DataFrame, read: pl.DataFrame, shared: pl.DataFrame, examples: int
) -> pl.DataFrame:
    """Return the rows of a held-out file with the columns that their rule judges.

    read: the same rows with the columns of NGRAM_SCHEMA.
    shared: what `TrainMatches` gave, of so many training examples.
    """
    found = find_near_duplicates(shared, examples, read)
    is_new = pl.col("repeats").is_null()  # else the row equals a training example
    return related.with_columns(found).with_columns(near=pl.when(is_new).then("near"))


NEAR_DUPLICATES = NearDuplicates(
    schema=NGRAM_SCHEMA,
    hash_texts=hash_texts,
    collect=AskedNgrams.of_frames,
    read_asked=AskedNgrams.read,
    start_matching=TrainMatches,
    relate=relate,
    add_findings=lambda rows, findings, severity: make_near_duplicate_rules(severity).add_findings(
        rows, findings
    ),
    pair=pair_near_duplicates,
)
