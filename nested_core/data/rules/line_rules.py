"""The rules for one line of a data set: an error makes it unfit for training, a warning doubtful.

The columns are those of a line as it is read (lines/line_table.py), and of its relations to other
lines (related_lines.py).
"""

from __future__ import annotations

from functools import cache

import polars as pl

from nested_core.data.lines.example_parsing import CONVERSATION_FORMATS
from nested_core.data.lines.line_table import LINE_SCHEMA
from nested_core.data.rules.rule_table import FrameRules, Rule
from nested_core.records.dataset import Severity

# A conversation so far: system first if at all, users and assistants in turn, results after a call.
# An orphan result (o) counts as one here, for it has a check of its own.
_VALID_TURN_ORDER_PATTERN = r"^s?(?:u(?:c[to]+)*a)*(?:u(?:c[to]+)*c?)?$"
_ORPHAN_RESULT_PATTERN = r"o|(?:^|[^cto])t"
_ROLES_COLUMN = pl.col("roles").cast(pl.String)
_CHAT_ROLES_COLUMN = pl.when(pl.col("format").is_in(CONVERSATION_FORMATS)).then(_ROLES_COLUMN)

LINE_RULES = FrameRules(
    columns={
        **LINE_SCHEMA,
        "is_train": pl.Boolean,
        "train_file": pl.Categorical,
        "file_format": pl.Categorical,
        "repeats": pl.Int32,
        "repeats_held_out": pl.Int32,
        "resembles": pl.Int32,
        "answers_otherwise": pl.Int32,
    },
    rules=(
        # A line that could not be read as an example names the check that it failed itself.
        Rule.error("{check}", pl.col("check").is_null(), "{message}", by="check"),
        Rule.error(
            "mixed-format",
            pl.col("format") == pl.col("file_format"),
            "this line is {format}, most of the file is {file_format}; "
            "mlx-lm reads a file in one format",
        ),
        Rule.error(
            "blank-field", pl.col("blank_field").is_null(), "{blank_field} has no text in it"
        ),
        Rule.error(
            "no-assistant-turn",
            _CHAT_ROLES_COLUMN.str.contains("[ac]"),
            "the turns are {turns}; without an assistant's there is nothing to learn",
        ),
        Rule.error(
            "last-turn-not-assistant",
            _CHAT_ROLES_COLUMN.str.contains("^[^ac]*$|[ac]$"),
            "the turns are {turns}; the last one is what the model learns "
            "and must be the assistant's",
        ),
        Rule.error(
            "tool-without-call",
            ~_ROLES_COLUMN.str.contains(_ORPHAN_RESULT_PATTERN),
            "the turns are {turns}; a tool's result must follow the call that asked for it",
        ),
        Rule.error(
            "role-order",
            _CHAT_ROLES_COLUMN.str.contains(
                f"{_VALID_TURN_ORDER_PATTERN}|{_ORPHAN_RESULT_PATTERN}"
            ),
            "the turns are {turns}; expected system (optional), then user and assistant in turn, "
            "tool results right after their call",
        ),
        Rule.error(
            "leakage",
            pl.col("is_train") | pl.col("repeats").is_null(),
            "the same example is in {train_file}:{repeats}; "
            "a loss on it says nothing about new data",
        ),
        Rule.warning(
            "duplicate",
            ~pl.col("is_train") | pl.col("repeats").is_null(),
            "the same example as line {repeats}",
        ),
        Rule.warning(
            "repeated-held-out",
            pl.col("repeats_held_out").is_null(),
            "lines that repeat another one of this file: {count}, the first of them line "
            "{repeats_held_out}; the gate counts examples with one prompt as one",
            once=True,
        ),
        Rule.warning(
            "near-duplicate",
            pl.col("resembles").is_null(),
            "like {train_file}:{resembles} but for case, white space, end texts and marks",
        ),
        Rule.warning(
            "same-prompt-other-answer",
            pl.col("is_train") | pl.col("answers_otherwise").is_null(),
            "{train_file}:{answers_otherwise} answers this prompt otherwise",
        ),
        Rule.warning(
            "unknown-key",
            pl.col("unknown_keys").is_null(),
            "ignored: {unknown_keys} (lines with it: {count})",
            once=True,
            by="unknown_keys",
        ),
        Rule.warning(
            "byte-order-mark",
            ~pl.col("has_mark"),
            "the file begins with a byte-order mark, at which mlx-lm stops",
            once=True,
        ),
        Rule.warning(
            "crlf",
            ~pl.col("has_crlf"),
            "lines that end in CRLF: {count}, from this one on",
            once=True,
        ),
        Rule.warning("control-character", ~pl.col("has_control"), "a text holds one"),
        Rule.warning(
            "replacement-character",
            ~pl.col("has_replacement"),
            "U+FFFD in a text: something was decoded wrongly before it came here",
        ),
        Rule.warning(
            "error-cell",
            ~pl.col("has_error_cell"),
            "a text is nothing but an error of a spreadsheet, such as #N/A or #REF!, or NaN: mend "
            "the sheet, or leave the row out",
        ),
    ),
)


@cache
def make_held_out_rules(severity: Severity) -> FrameRules:
    """Return the rules for a line of test that is in valid too."""
    repeated = Rule(
        "test-in-valid",
        severity,
        pl.col("line_in_valid").is_null(),
        "the same example is in {valid_file}:{line_in_valid}, by which the best checkpoint is "
        "chosen; a loss on it says nothing about new data",
    )
    return FrameRules(
        columns={"line_in_valid": pl.Int32, "valid_file": pl.Categorical}, rules=(repeated,)
    )
