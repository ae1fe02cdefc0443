"""Rules as tables of pandera checks; rows that fail become findings with file and line.

pandera runs every check whatever the environment or the host program has configured, and a frame
that does not fit the declared columns is an error, never a pass.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from string import Formatter
from typing import Any

import polars as pl

from nested_core.errors import join_first_values
from nested_core.records.dataset import Finding, Findings, Severity

_VALIDATION_DEPTH_VARIABLE = "PANDERA_VALIDATION_DEPTH"
_VALIDATION_DEPTHS = {"SCHEMA_ONLY", "DATA_ONLY", "SCHEMA_AND_DATA"}


@contextmanager
def _hiding_unknown_validation_depth() -> Iterator[None]:
    """Hide an environment variable value that would make the import of pandera fail."""
    depth = os.environ.get(_VALIDATION_DEPTH_VARIABLE)
    if depth is None or depth in _VALIDATION_DEPTHS:
        yield
        return
    del os.environ[_VALIDATION_DEPTH_VARIABLE]
    try:
        yield
    finally:
        os.environ[_VALIDATION_DEPTH_VARIABLE] = depth


with _hiding_unknown_validation_depth():
    import pandera.polars as pa
    from pandera.backends.polars.checks import PolarsCheckBackend
    from pandera.backends.polars.container import DataFrameSchemaBackend
    from pandera.config import ValidationDepth, config_context
    from pandera.errors import SchemaErrors

_PARSE_FORMAT_STRING = Formatter().parse
MAX_LISTED_FINDINGS = 1_000  # of one check in one file; the rest are counted
_ROWS_JUDGED_AT_ONCE = 250_000  # so that memory does not grow by all that rules compute of a row
_MAX_SHOWN_LINES = 5
_MAX_SHOWN_TURNS = 12
# Those that hold a line: of the file in train_file or valid_file, or else of the row's own.
_LINE_COLUMNS = {
    *("repeats", "resembles", "answers_otherwise", "near", "repeats_held_out", "line_in_valid")
}
_ROLE_NAME_BY_LETTER = {
    "s": "system",
    "u": "user",
    "a": "assistant",
    "t": "tool",
    "c": "assistant (calls a tool)",
    "o": "tool (no call has its id)",
}


@dataclass(frozen=True, eq=False)
class Rule:
    """One check of a row.

    name: the check's name in findings; it may contain a {column} of the failing row.
    expression: true or null for a good row.
    message: a sentence, with {columns} of the failing row and {turns}, its roles in words.
    once: report one finding for all failing rows of a file; {count} is their number, {places} their
        first lines. It is reported at the first of them, or at the `worst`.
    worst: a column; the finding is reported at the row with its largest value.
    by: a column; rows with different values are listed, counted and limited separately.
    """

    name: str
    severity: Severity
    expression: pl.Expr
    message: str
    once: bool = False
    worst: str | None = None
    by: str | None = None

    @classmethod
    def error(cls, name: str, expression: pl.Expr, message: str, **options: Any) -> Rule:
        """Return a rule that a row must pass; `options` are the further fields."""
        return cls(name, "error", expression, message, **options)

    @classmethod
    def warning(cls, name: str, expression: pl.Expr, message: str, **options: Any) -> Rule:
        """Return a rule that a row should pass; `options` are the further fields."""
        return cls(name, "warning", expression, message, **options)

    @cached_property
    def columns(self) -> frozenset[str]:
        """All columns that the rule reads, those of its message included."""
        fields = {
            name
            for text in (self.name, self.message)
            for _, name, _, _ in _PARSE_FORMAT_STRING(text)
        }
        if "turns" in fields:
            fields.add("roles")
        others = {None, "turns", "count", "places"}
        columns = {*self.expression.meta.root_names(), self.worst, self.by, *fields} - others
        return frozenset(name for name in columns if name is not None)


# These compute with polars itself, whatever backend the host program or its environment chose for
# pandera's own classes.
class _PolarsSchema(pa.DataFrameSchema):
    """A pandera schema that always uses the polars backend."""

    @classmethod
    def get_backend(cls, *_: object, **__: object) -> DataFrameSchemaBackend:
        """Return the polars backend, whatever backend the host program has chosen."""
        return DataFrameSchemaBackend()


class _PolarsCheck(pa.Check):
    """A pandera check that always uses the polars backend."""

    @classmethod
    def get_backend(cls, *_: object, **__: object) -> type[PolarsCheckBackend]:
        """Return the polars backend, whatever backend the host program has chosen."""
        return PolarsCheckBackend


@dataclass(frozen=True)
class FrameRules:
    """Rules over one frame, and the types of its columns, by name.

    A Boolean column must not have null; the others may.
    """

    columns: Mapping[str, type[pl.DataType]]
    rules: tuple[Rule, ...]

    @cached_property
    def make_schema(self) -> pa.DataFrameSchema:
        """The pandera schema: one check that every rule holds at every row.

        The rules form one check because pandera collects a frame some six times a check, which took
        four fifths of the time of a small data set. `_require_fit` compares the columns: in the
        schema they took a third of what was left.
        """
        every_rule = pl.all_horizontal(_holds(rule) for rule in self.rules)
        return _PolarsSchema(
            checks=_PolarsCheck(lambda data: data.lazyframe.select(every_rule), n_failure_cases=1)
        )

    def add_findings(self, frame: pl.DataFrame, findings: Findings) -> None:
        """Add a finding for each row of `frame` at which a rule fails.

        The frame needs `file` and `line` (null: the whole file) beside the declared columns. For
        one rule and file at most MAX_LISTED_FINDINGS rows become findings; one more has the number
        of the others. Raises TypeError for a frame that does not fit the declared columns.
        """
        if frame.is_empty():
            return
        self._require_fit(frame)
        for rule, indices in self._failing_rows(frame).items():
            rows = frame.select({"file", "line", *rule.columns})[indices]
            groups = ["file"] if rule.by is None else ["file", rule.by]
            for group in rows.partition_by(groups, maintain_order=True):
                findings.listed.extend(_make_findings(rule, group, findings))
                if rule.severity == "error":
                    lines = group["line"].drop_nulls().to_list()
                    findings.error_lines.setdefault(group["file"][0], set()).update(lines)

    def _require_fit(self, frame: pl.DataFrame) -> None:
        """Raise TypeError if a declared column is missing, of another type, or Boolean and null."""
        found = frame.schema
        used = {name: self.columns[name] for rule in self.rules for name in rule.columns}
        misfits = [
            f"{name} is {found.get(name)}"
            for name, dtype in used.items()
            if found.get(name) != dtype or (dtype is pl.Boolean and frame[name].has_nulls())
        ]
        if misfits:
            raise TypeError(f"The rules do not fit their frame: {join_first_values(misfits, 3)}")

    def _failing_rows(self, frame: pl.DataFrame) -> dict[Rule, pl.Series]:
        """Return the indices of the rows at which each rule fails, for rules that fail anywhere."""
        failing: dict[Rule, list[pl.Series]] = {}
        for first in range(0, frame.height, _ROWS_JUDGED_AT_ONCE):
            part = frame.slice(first, _ROWS_JUDGED_AT_ONCE)
            if self._holds_everywhere(part):
                continue
            holds = part.select(_holds(rule).alias(str(n)) for n, rule in enumerate(self.rules))
            for rule, column in zip(self.rules, holds, strict=True):
                rows = pl.arg_where(~column, eager=True)
                if len(rows):
                    failing.setdefault(rule, []).append(rows + first)
        return {rule: pl.concat(failing[rule]) for rule in self.rules if rule in failing}

    def _holds_everywhere(self, frame: pl.DataFrame) -> bool:
        """Return whether every rule holds at every row; False where one cannot be computed."""
        with config_context(
            validation_enabled=True, validation_depth=ValidationDepth.SCHEMA_AND_DATA
        ):
            try:
                self.make_schema.validate(frame, lazy=True)
            except SchemaErrors:  # `_failing_rows` finds out which, or raises what a rule raised
                return False
        return True


def _holds(rule: Rule) -> pl.Expr:
    """Return an expression that is true where the rule's expression is true or null."""
    return rule.expression.fill_null(value=True)


def _make_findings(rule: Rule, rows: pl.DataFrame, findings: Findings) -> Iterator[Finding]:
    """Yield the findings of one rule for the failing rows of one file."""
    if rule.once:
        index = 0 if rule.worst is None else rows[rule.worst].arg_max() or 0
        lines = findings.name_lines(rows["file"][0], rows["line"].to_list(), _MAX_SHOWN_LINES)
        facts = {"count": rows.height, "places": lines}
        yield _make_finding(rule, rows.row(index, named=True) | facts, findings)
        return
    for row in rows.head(MAX_LISTED_FINDINGS).iter_rows(named=True):
        yield _make_finding(rule, row, findings)
    rest = rows.height - MAX_LISTED_FINDINGS
    if rest > 0:
        row = rows.row(0, named=True)
        message = f"{rest:,} more of these: the first {MAX_LISTED_FINDINGS:,} are listed"
        name = rule.name.format_map(row)
        yield Finding(row["file"], None, rule.severity, name, message, count=rest)


def _make_finding(rule: Rule, row: dict[str, Any], findings: Findings) -> Finding:
    """Build the finding of a rule for one failing row."""
    turns = [_ROLE_NAME_BY_LETTER[letter] for letter in row.get("roles") or ""]
    shown = row | {"turns": join_first_values(turns, _MAX_SHOWN_TURNS) or "none"}
    if findings.parts:
        shown |= _places_in_parts(row, findings)
    message = rule.message.format_map(shown)
    return Finding(shown["file"], shown["line"], rule.severity, rule.name.format_map(row), message)


def _places_in_parts(row: dict[str, Any], findings: Findings) -> dict[str, object]:
    """Return the row's own and related lines as places in the files of a split with many files."""
    shown: dict[str, object] = {"file": row["file"], "line": row["line"]}
    if row["line"] is not None:
        shown["file"], shown["line"] = findings.find_place(row["file"], row["line"])
    for column in row.keys() & _LINE_COLUMNS:
        if row[column] is None:
            continue
        file_column = "valid_file" if column == "line_in_valid" else "train_file"
        name, line = findings.find_place(row.get(file_column, row["file"]), row[column])
        if file_column in row:
            shown[file_column], shown[column] = name, line
        else:
            shown[column] = line if name == shown["file"] else f"{line} of {name}"
    return shown
