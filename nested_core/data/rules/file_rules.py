"""What makes the files of a data set unfit or doubtful as a whole, as pandera models.

Their frame has one row for each of train, valid and test, whether the file exists or not; that of
their counts one for each that exists.
"""

from __future__ import annotations

import pandera.polars as pa
import polars as pl
from pandera.polars import PolarsData


class FileErrors(pa.DataFrameModel):
    """What keeps a whole file from being trained on."""

    split: pl.String
    is_present: pl.Boolean
    format: pl.String = pa.Field(nullable=True)
    lacks_template: pl.Boolean

    @pa.check(
        "is_present", name="missing-train-file", description="there is no such file in {folder}"
    )
    @classmethod
    def _exists(cls, data: PolarsData) -> pl.LazyFrame:
        return data.lazyframe.select(pl.col("is_present") | (pl.col("split") != "train"))

    @pa.check(
        "format",
        name="mask-prompt-on-text",
        description="mask_prompt needs prompts; plain text has none (mlx-lm refuses it too)",
    )
    @classmethod
    def _has_prompts_to_mask(cls, data: PolarsData) -> pl.LazyFrame:
        return data.lazyframe.select(~pl.col("mask_prompt") | (pl.col("format") != "text"))

    @pa.check(
        "format",
        name="supervise-all-on-text",
        description="training.supervise: all needs turns; plain text has none",
    )
    @classmethod
    def _has_turns(cls, data: PolarsData) -> pl.LazyFrame:
        return data.lazyframe.select((pl.col("supervise") != "all") | (pl.col("format") != "text"))

    @pa.check(
        "lacks_template",
        name="chat-template-missing",
        description="the tokenizer has no chat template, which {format} data needs; "
        "use an instruction-tuned model or plain text",
    )
    @classmethod
    def _has_a_template(cls, data: PolarsData) -> pl.LazyFrame:
        return data.lazyframe.select(~pl.col("lacks_template"))


class CountErrors(pa.DataFrameModel):
    """What keeps a file from filling a batch once data_policy has dropped its part."""

    split: pl.String
    rows: pl.Int64
    batch_size: pl.Int64

    @pa.check("rows", name="empty-file", description="no example in its {lines} lines")
    @classmethod
    def _has_rows(cls, data: PolarsData) -> pl.LazyFrame:
        return data.lazyframe.select(pl.col("rows") > 0)

    @pa.check(
        "batch_size",
        name="too-few-rows",
        description="{rows} rows do not fill one batch of {batch_size}; lower batch_size",
    )
    @classmethod
    def _fills_a_batch(cls, data: PolarsData) -> pl.LazyFrame:
        is_other = (pl.col("split") != "train") | (pl.col("rows") == 0)
        return data.lazyframe.select(is_other | (pl.col("rows") >= pl.col("batch_size")))


class FileWarnings(pa.DataFrameModel):
    """What a run can do without, at a price."""

    is_present: pl.Boolean

    @pa.check(
        "is_present",
        name="no-validation-set",
        description="there is none in {folder}: the best checkpoint cannot be told from the last",
    )
    @classmethod
    def _validates(cls, data: PolarsData) -> pl.LazyFrame:
        return data.lazyframe.select(pl.col("is_present") | (pl.col("split") != "valid"))
