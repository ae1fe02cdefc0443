"""What makes an example unfit or doubtful once it is tokens, as pandera models and their frames.

Sees lengths and counts only, never a token.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
import pandera.polars as pa
import polars as pl
from pandera.polars import PolarsData

from nested_core.data.rules.repeated_lines import count_once
from nested_core.data.rules.rule_table import is_null
from nested_core.data.settings import DataSettings
from nested_core.data.tokens.parallel_tokenization import TokenFacts

FEWEST_FOR_OUTLIERS = 20
LEAST_RATIO = 4


def token_frame(facts: TokenFacts, file: str, settings: DataSettings) -> pl.DataFrame:
    """One row an example; a habit of many lines stands at the first (truncation: the worst)."""
    names = facts.examples.dtype.names or ()
    frame = pl.DataFrame({name: np.ascontiguousarray(facts.examples[name]) for name in names})
    frame = frame.with_columns(
        lost=pl.col("full_length") - pl.col("length"),
        file=pl.lit(file),
        max_seq_length=pl.lit(settings.max_seq_length),
        may_be_cut=pl.lit(settings.policy.overlong != "error"),
    )
    is_cut = (pl.col("lost") > 0) & pl.col("may_be_cut")
    is_worst = is_cut & (pl.int_range(pl.len()) == pl.col("lost").arg_max())
    is_short = (pl.col("supervised") > 0) & (pl.col("shortest") < 2)
    bound = outlier_bound(facts.examples["full_length"])
    outliers = (pl.col("full_length") > bound).sum()
    is_longest = pl.int_range(pl.len()) == pl.col("full_length").arg_max()
    is_whole = (pl.col("supervised") > 0) & (pl.col("lost") == 0)
    return frame.with_columns(
        truncated_lines=pl.when(is_worst).then((pl.col("lost") > 0).sum()),
        lost_in_all=pl.col("lost").sum(),
        short_lines=count_once(is_short),
        outlier_lines=pl.when(is_longest & (outliers > 0)).then(outliers),
        outlier_bound=pl.lit(bound),
        endless_lines=count_once(is_whole & ~pl.col("has_end")),
    )


def outlier_bound(lengths: npt.NDArray[np.int32]) -> int:
    """The length above which an example is far longer than the rest of its file.

    Tukey's outer fence over the logarithms of the lengths, third quartile + 3 * interquartile
    range, but at least four times the third quartile; few examples have no outlier.
    """
    if len(lengths) < FEWEST_FOR_OUTLIERS:
        return int(np.iinfo(np.int32).max)
    first, third = np.percentile(lengths, (25, 75), method="inverted_cdf")
    fence = int(third) * max((int(third) / max(int(first), 1)) ** 3, LEAST_RATIO)
    return math.floor(min(fence, np.iinfo(np.int32).max))


def problem_frame(facts: TokenFacts, file: str) -> pl.DataFrame:
    """One row for each line at which the chat template raised."""
    schema = {"line": pl.Int32, "problem": pl.String}
    frame = pl.DataFrame(facts.problems, schema=schema, orient="row")
    return frame.with_columns(file=pl.lit(file))


class TemplateErrors(pa.DataFrameModel):
    """Lines that the model's chat template does not take."""

    problem: pl.String = pa.Field(nullable=True)

    @pa.check(
        "problem",
        name="chat-template-raised",
        description="the chat template does not take these turns: {problem}",
    )
    @classmethod
    def _is_taken(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)


class TokenErrors(pa.DataFrameModel):
    """What would teach nothing, or the wrong thing."""

    supervised: pl.Int32
    broken_turn: pl.Int32
    lost: pl.Int32

    @pa.check(
        "supervised",
        name="no-supervised-token",
        description="{full_length} tokens, cut to {length}: none is left to learn "
        "(in mlx-lm the loss would be NaN); raise max_seq_length or shorten the prompt",
    )
    @classmethod
    def _teaches(cls, data: PolarsData) -> pl.LazyFrame:
        is_broken = pl.col("broken_turn") >= 0  # what is learnt of it is not known then
        return data.lazyframe.select((pl.col("supervised") > 0) | is_broken)

    @pa.check(
        "broken_turn",
        name="prompt-not-a-prefix",
        description="the chat template writes what comes up to messages[{broken_turn}] otherwise "
        "by itself than within the whole, so the wrong tokens would be learnt; train without "
        "mask_prompt and supervise: all, or with another template",
    )
    @classmethod
    def _continues_its_prompt(cls, data: PolarsData) -> pl.LazyFrame:
        return data.lazyframe.select(pl.col("broken_turn") < 0)

    @pa.check(
        "lost",
        name="overlong",
        description="{full_length} tokens, and max_seq_length is {max_seq_length}; shorten it, "
        "raise max_seq_length, or let data_policy.overlong be truncate or drop",
    )
    @classmethod
    def _fits(cls, data: PolarsData) -> pl.LazyFrame:
        return data.lazyframe.select((pl.col("lost") == 0) | pl.col("may_be_cut"))


class TokenWarnings(pa.DataFrameModel):
    """What is learnt otherwise than its author may think, told once a file."""

    truncated_lines: pl.UInt32 = pa.Field(nullable=True)
    short_lines: pl.UInt32 = pa.Field(nullable=True)
    outlier_lines: pl.UInt32 = pa.Field(nullable=True)
    endless_lines: pl.UInt32 = pa.Field(nullable=True)

    @pa.check(
        "truncated_lines",
        name="truncated",
        description="examples cut to {max_seq_length} tokens: {truncated_lines}, "
        "tokens lost: {lost_in_all}; the worst is this one, of {full_length} tokens",
    )
    @classmethod
    def _is_whole(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)

    @pa.check(
        "short_lines",
        name="short-answer",
        description="examples with an answer of less than two tokens before its end: "
        "{short_lines}, from this one on",
    )
    @classmethod
    def _is_an_answer(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)

    @pa.check(
        "outlier_lines",
        name="length-outlier",
        description="examples far longer than the rest, of more than {outlier_bound} tokens: "
        "{outlier_lines}; the longest is this one, of {full_length}",
    )
    @classmethod
    def _is_like_the_rest(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)

    @pa.check(
        "endless_lines",
        name="no-end-of-sequence",
        description="examples without an end-of-sequence token in what is supervised: "
        "{endless_lines}, from this one on; the model will not learn where to stop there",
    )
    @classmethod
    def _ends(cls, data: PolarsData) -> pl.LazyFrame:
        return is_null(data)
