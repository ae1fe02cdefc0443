"""The rules for tokenized examples, and the frames that they check.

They use lengths and counts only, never a token.
"""

from __future__ import annotations

import math

import numpy as np
import polars as pl

from nested_core.data.data_settings import DataSettings
from nested_core.data.rules.rule_table import FrameRules, Rule
from nested_core.data.tokens.parallel_tokenization import TokenFacts

MIN_EXAMPLES_FOR_OUTLIERS = 20
MIN_OUTLIER_RATIO = 4


def make_token_frame(
    facts: TokenFacts, file: str, settings: DataSettings, context: int | None
) -> pl.DataFrame:
    """Build a frame with one row for each example and the columns of TOKEN_RULES.

    context: the model's context length in tokens; None if unknown.
    """
    names = facts.examples.dtype.names or ()
    frame = pl.DataFrame({name: np.ascontiguousarray(facts.examples[name]) for name in names})
    lost = pl.col("full_length") - pl.col("length")
    make_room = "raise max_seq_length"
    if context is not None and context <= settings.max_seq_length:
        make_room = f"take a model that sees more than {context} tokens"
    return frame.with_columns(
        file=pl.lit(file),
        lost=lost,
        lost_in_all=lost.cast(pl.Int64).sum(),
        max_seq_length=pl.lit(settings.max_seq_length),
        make_room=pl.lit(make_room),
        context=pl.lit(context and min(context, np.iinfo(np.int64).max), pl.Int64),
        may_be_cut=pl.lit(settings.policy.overlong != "error"),
        outlier_bound=pl.lit(length_outlier_bound(facts.examples["full_length"])),
    )


def length_outlier_bound(lengths: np.typing.NDArray[np.int32]) -> int:
    """Return the length above which an example counts as far longer than the rest of its file.

    Tukey's outer fence over the logarithms of the lengths (third quartile + 3 * interquartile
    range), but at least four times the third quartile. With few examples nothing is an outlier.
    """
    if len(lengths) < MIN_EXAMPLES_FOR_OUTLIERS:
        return int(np.iinfo(np.int32).max)
    first, third = np.percentile(lengths, (25, 75), method="inverted_cdf")
    fence = int(third) * max((int(third) / max(int(first), 1)) ** 3, MIN_OUTLIER_RATIO)
    return math.floor(min(fence, np.iinfo(np.int32).max))


def make_encoding_problem_frame(facts: TokenFacts, file: str) -> pl.DataFrame:
    """Build a frame with one row for each line that could not be tokenized."""
    schema = {"line": pl.Int32, "check": pl.Categorical, "message": pl.String}
    return pl.DataFrame(facts.problems, schema=schema, orient="row").with_columns(file=pl.lit(file))


def make_doubt_frame(facts: TokenFacts, file: str) -> pl.DataFrame:
    """Build a frame with one row for each kind of doubt, at the first line that has it."""
    rows = [(line, *doubt, count) for doubt, (line, count) in facts.doubts.items()]
    schema = {"line": pl.Int32, "check": pl.Categorical, "message": pl.String, "rows": pl.Int64}
    return pl.DataFrame(rows, schema=schema, orient="row").with_columns(file=pl.lit(file))


ENCODING_RULES = FrameRules(
    columns={"check": pl.Categorical, "message": pl.String},
    # A line names the check that it failed itself.
    rules=(Rule.error("{check}", pl.col("check").is_null(), "{message}", by="check"),),
)

DOUBT_RULES = FrameRules(
    columns={"check": pl.Categorical, "message": pl.String, "rows": pl.Int64},
    rules=(
        Rule.warning(
            "{check}", pl.col("check").is_null(), "{message} (lines with it: {rows})", by="check"
        ),
    ),
)

TOKEN_RULES = FrameRules(
    columns={
        "full_length": pl.Int32,
        "length": pl.Int32,
        "lost": pl.Int32,
        "lost_in_all": pl.Int64,
        "supervised": pl.Int32,
        "shortest": pl.Int32,
        "broken_turn": pl.Int32,
        "has_end": pl.Boolean,
        "max_seq_length": pl.Int32,
        "make_room": pl.String,
        "context": pl.Int64,
        "may_be_cut": pl.Boolean,
        "outlier_bound": pl.Int32,
    },
    rules=(
        Rule.error(
            "no-supervised-token",
            # Of an example with a broken turn it is not known what would be supervised.
            (pl.col("supervised") > 0) | (pl.col("broken_turn") >= 0),
            "{full_length} tokens, cut to {length}: none is left to learn "
            "(in mlx-lm the loss would be NaN); shorten the prompt or {make_room}",
        ),
        Rule.error(
            "prompt-not-a-prefix",
            pl.col("broken_turn") < 0,
            "the chat template writes what comes up to messages[{broken_turn}] otherwise by itself "
            "than within the whole, so the loss would count the wrong tokens; learn the last "
            "answer alone (no supervise: all), or take a template that changes no earlier turn",
        ),
        Rule.error(
            "overlong",
            (pl.col("lost") == 0) | pl.col("may_be_cut"),
            "{full_length} tokens, and max_seq_length is {max_seq_length}; shorten it, "
            "{make_room}, or let data_policy.overlong be truncate or drop",
        ),
        Rule.warning(
            "truncated",
            (pl.col("lost") == 0) | ~pl.col("may_be_cut"),
            "examples cut to {max_seq_length} tokens: {count}, tokens lost: {lost_in_all}; "
            "the worst is this one, of {full_length} tokens. Shorten them, or {make_room}",
            once=True,
            worst="lost",
        ),
        Rule.warning(
            "beyond-context",
            pl.col("length") <= pl.col("context"),
            "examples longer than the {context} tokens that the model can see "
            "(max_position_embeddings of its config.json): {count}; the longest is this one, of "
            "{length}. max_seq_length: {context} cuts them, and what is cut off is not learnt. "
            "Shorten them, or take a model that sees more",
            once=True,
            worst="length",
        ),
        Rule.warning(
            "short-answer",
            (pl.col("supervised") == 0) | (pl.col("shortest") >= 2),
            "examples with an answer of less than two tokens before its end: {count}, "
            "from this one on; right where answers are labels",
            once=True,
        ),
        Rule.warning(
            "length-outlier",
            pl.col("full_length") <= pl.col("outlier_bound"),
            "examples far longer than the rest, of more than {outlier_bound} tokens: {count}; "
            "the longest is this one, of {full_length}",
            once=True,
            worst="full_length",
        ),
        Rule.warning(
            "no-end-of-sequence",
            (pl.col("supervised") == 0) | (pl.col("lost") > 0) | pl.col("has_end"),
            "examples without an end-of-sequence token in what is supervised: {count}, "
            "from this one on; the model will not learn where to stop there",
            once=True,
        ),
    ),
)
