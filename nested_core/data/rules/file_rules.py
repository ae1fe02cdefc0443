"""The rules for a file of a data set as a whole.

FILE_RULES check a frame with one row for each of train, valid and test, whether the file exists or
not; ROW_COUNT_RULES one with a row for each existing file and its number of rows after data_policy.
"""

from __future__ import annotations

import polars as pl

from nested_core.data.lines.example_parsing import UNTEMPLATED_FORMATS
from nested_core.data.rules.rule_table import FrameRules, Rule

MIN_HELD_OUT_ROWS = 5  # as many as an interval of paired differences needs
_IS_TRAIN_SPLIT = pl.col("split") == "train"
_IS_TEXT_FORMAT = pl.col("format").is_in(UNTEMPLATED_FORMATS)

FILE_RULES = FrameRules(
    columns={
        "split": pl.String,
        "folder": pl.String,
        "held": pl.String,
        "columns": pl.String,
        "format": pl.String,
        "is_present": pl.Boolean,
        "mask_prompt": pl.Boolean,
        "supervise": pl.String,
        "lacks_template": pl.Boolean,
    },
    rules=(
        Rule.error(
            "missing-train-file",
            pl.col("is_present") | (pl.col("split") != "train"),
            "there is none in {folder}, which holds {held}; name the file to train on train.jsonl, "
            "or several train-1.jsonl, train-2.jsonl",
        ),
        Rule.error(
            "mask-prompt-on-text",
            ~pl.col("mask_prompt") | ~_IS_TEXT_FORMAT,
            "mask_prompt needs prompts; plain text has none (mlx-lm refuses it too)",
        ),
        Rule.error(
            "supervise-all-on-text",
            (pl.col("supervise") != "all") | ~_IS_TEXT_FORMAT,
            "training.supervise: all needs turns; plain text has none",
        ),
        Rule.error(
            "chat-template-missing",
            ~pl.col("lacks_template"),
            "the tokenizer has no chat template, which {format} data needs; "
            "use an instruction-tuned model or plain text",
        ),
        Rule.warning(
            "no-validation-set",
            pl.col("is_present") | (pl.col("split") != "valid"),
            "there is none in {folder}, which holds {held}: the best checkpoint cannot be told "
            "from the last; name the file valid.jsonl, or draw one from train with `nested-tune "
            "init --data {folder} --model MODEL{columns} --split 0.1 -o lora-split.yaml`",
        ),
    ),
)

ROW_COUNT_RULES = FrameRules(
    columns={
        "split": pl.String,
        "lines": pl.Int64,
        "rows": pl.Int64,
        "has_one_answer": pl.Boolean,
        "batch_size": pl.Int64,
        "faulty": pl.String,
        "dropped": pl.String,
        "remedy": pl.String,
        "is_whole": pl.Boolean,
    },
    rules=(
        Rule.error(
            "empty-file",
            pl.col("rows") > 0,
            "it holds no example (lines: {lines}{dropped}); {remedy}",
        ),
        Rule.error(
            "too-few-rows",
            (pl.col("split") != "train")
            | (pl.col("rows") == 0)
            | ~pl.col("is_whole")
            | (pl.col("rows") >= pl.col("batch_size")),
            "it holds {rows} of the {batch_size} rows that fill one batch{faulty}; lower "
            "batch_size",
        ),
        Rule(
            "few-held-out-rows",
            "info",
            _IS_TRAIN_SPLIT | ~pl.col("rows").is_between(1, MIN_HELD_OUT_ROWS - 1),
            "{rows} rows can show no difference between two adapters beyond chance; "
            f"{MIN_HELD_OUT_ROWS} or more are needed",
        ),
        Rule.warning(
            "one-answer",
            _IS_TRAIN_SPLIT | (pl.col("rows") < MIN_HELD_OUT_ROWS) | ~pl.col("has_one_answer"),
            "all {rows} answers are the same: a model that says nothing else would pass",
        ),
    ),
)
