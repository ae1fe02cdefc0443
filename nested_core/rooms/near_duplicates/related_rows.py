"""Rows of valid and test, and the row of train that each of them nearly is.

Sequences of words that many training examples share, such as a template's, say nothing of two
examples and are left out. So the cost is linear in the number of lines: an n-gram has few training
examples, or none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import polars as pl

from nested_core.data.room_checks import NearDuplicates
from nested_core.data.rules.rule_table import FrameRules, Rule
from nested_core.records.dataset import Severity
from nested_core.rooms.near_duplicates.word_ngrams import (
    NGRAM_SCHEMA,
    RARE_NGRAM_MAX_EXAMPLES,
    AskedNgrams,
    TrainMatches,
    hash_word_ngrams,
)

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
