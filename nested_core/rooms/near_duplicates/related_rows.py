"""Rows of valid and test, and the row of train that each of them nearly is.

Sequences of words that many training examples share, such as a template's, say nothing of two
examples and are left out. So the cost is linear in the number of lines: an n-gram has few training
examples, or none.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import ClassVar

import polars as pl

from nested_core.data.rules.rule_table import FrameRules, Rule
from nested_core.records.dataset import Severity
from nested_core.rooms.near_duplicates.word_ngrams import (
    NGRAM_SCHEMA,
    RARE_NGRAM_MAX_EXAMPLES,
    AskedNgrams,
    TrainMatches,
    WordHasher,
    hash_word_ngrams,
)

MIN_SHARED_NGRAM_SHARE = 0.6  # of a held-out example's n-grams that are not common
MIN_SHARED_NGRAMS = 2
# An n-gram in more than RARE_NGRAM_MAX_EXAMPLES is common; in a small training set at fewer.
RARE_NGRAM_MAX_EXAMPLES_IN_SMALL_SET = 2
RARE_NGRAM_TRAIN_SIZE_DIVISOR = 50


def find_near_duplicates(
    shared: pl.DataFrame, examples: int, held_out: pl.DataFrame
) -> pl.DataFrame:
    """For each row of `held_out` the line of train that it nearly is, and how much they share.

    `shared` is what `TrainMatches.finish` gives, of `examples` training examples; `held_out` has
    the columns of NGRAM_SCHEMA. Returns near (Int32), the first of the lines that share most, null
    if none shares enough, and shared (Int32), per cent of the n-grams; 100 for an equal sequence of
    words.
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


def add_near_duplicate_columns(held_out: pl.DataFrame, found: pl.DataFrame) -> pl.DataFrame:
    """Add near and shared to related rows, but where the row equals a training example."""
    return held_out.with_columns(found).with_columns(
        near=pl.when(pl.col("repeats").is_null()).then("near")
    )


def _pair_rows_by_shared_ngrams(
    hits: pl.DataFrame, examples: int, rows: pl.DataFrame
) -> pl.DataFrame:
    """Row, near and shared for the pairs of a held-out row and a train line that share enough."""
    asked = rows.select("row", "halvings", ngram="ngrams").explode("ngram").drop_nulls("ngram")
    asked = asked.unique()
    most = min(
        RARE_NGRAM_MAX_EXAMPLES,
        max(RARE_NGRAM_MAX_EXAMPLES_IN_SMALL_SET, examples // RARE_NGRAM_TRAIN_SIZE_DIVISOR),
    )
    common = (
        hits.group_by("ngram").agg(pl.col("content").n_unique()).filter(pl.col("content") > most)
    )
    asked = asked.join(common, on="ngram", how="anti")
    sizes = asked.group_by("row").agg(size=pl.len())
    pairs = asked.join(hits, on="ngram", suffix="_in_train")
    counts = pairs.group_by("row", "line").agg(
        pl.len().alias("count"),
        # an n-gram of the row is in a longer example's sample only so often
        halvings=(pl.col("halvings_in_train").cast(pl.Int32) - pl.col("halvings").cast(pl.Int32))
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
    """The rules for one line of valid or test, as it resembles a line of train."""
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


class NearDuplicates:
    """What the core is given: columns to read with each line, and what becomes of them.

    Asked holds the n-grams of held-out rows, Matches what train shares with them.
    """

    schema: ClassVar = NGRAM_SCHEMA
    Asked = AskedNgrams
    Matches = TrainMatches
    make_rules = staticmethod(make_near_duplicate_rules)

    @staticmethod
    def hash_texts(texts: Sequence[str | None]) -> dict[str, pl.Series]:
        """The columns of `schema` for texts, a row each."""
        return hash_word_ngrams(texts, WordHasher()).to_columns(texts)

    @staticmethod
    def relate(
        related: pl.DataFrame, read: pl.DataFrame, shared: pl.DataFrame, examples: int
    ) -> pl.DataFrame:
        """The rows of a held-out file with the columns that their rule judges.

        read: the same rows with the columns of `schema`; shared: what `Matches` gave, of so many
        training examples.
        """
        return add_near_duplicate_columns(related, find_near_duplicates(shared, examples, read))
