"""dataset.json: the report on a data set, its reader, and which of its splits judges an adapter.

Findings by file and line, counts, and the paragraph that rejects it; nothing is judged here.
Findings are shown in groups by check and cause, so that a fault of every line is read once. A cause
is a message without its numbers: two lines may be bad JSON at different columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter
from pydantic_core import to_jsonable_python

from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE
from nested_core.errors import (
    ConfigError,
    DatasetError,
    go_on_with,
    join_first_values,
    naming_damaged_file,
    shorten,
)
from nested_core.storage.untrusted_files import read_json
from nested_core.text.value_format import format_count

Severity = Literal["error", "warning", "info"]
DATA_GUIDE = "docs/data.md"
_MAX_SHOWN_CHECKS = 3


@dataclass(frozen=True, slots=True)
class Finding:
    """A check that failed: in which file, at which line (from 1; None is the whole file), and why.

    count: for the one finding that stands for those of a check that are not listed, their number.
    """

    file: str
    line: int | None
    severity: Severity
    check: str
    message: str
    count: int | None = None

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.check}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        """The fields as plain JSON values; `count` only if there is one."""
        values = asdict(self)
        if self.count is None:
            del values["count"]
        return values


@dataclass(frozen=True)
class FilePart:
    """One of the files of a split: its name, and how many lines those before it are counted as."""

    name: str
    lines_before: int


def find_place(parts: Sequence[FilePart], file: str, line: int) -> tuple[str, int]:
    """The file and the line there of a line of a split, which is counted through its parts."""
    for part in reversed(parts):
        if line > part.lines_before:
            return part.name, line - part.lines_before
    return file, line


@dataclass(frozen=True)
class Findings:
    """The findings while a data set is judged, and every line that has an error, listed or not.

    parts: of the splits that have several files, by the split's name. Their lines are counted
        through in `error_lines`, as in tables; a finding has the file itself and its line there.
    """

    listed: list[Finding] = field(default_factory=list)
    error_lines: dict[str, set[int]] = field(default_factory=dict)  # by file
    parts: Mapping[str, Sequence[FilePart]] = field(default_factory=dict)

    def lines_with_errors(self, file: str) -> frozenset[int]:
        """The numbers of the lines of a file that have an error."""
        return frozenset(self.error_lines.get(file, ()))

    def find_place(self, file: str, line: int) -> tuple[str, int]:
        """The file and the line in it that a person finds a line of a table by."""
        return find_place(self.parts.get(file, ()), file, line)

    def name_lines(self, file: str, lines: Iterable[int], most: int) -> str:
        """The first of some lines of a table: numbers, or where there are parts places."""
        places = (self.find_place(file, line) for line in lines)
        return join_first_values(
            [f"{name}:{line}" if file in self.parts else line for name, line in places], most
        )


def guide_sentence(findings: Iterable[Finding]) -> str:
    """A sentence that names the places in the guide of the first checks that found something."""
    places = [f"{DATA_GUIDE}#{check}" for check in dict.fromkeys(f.check for f in findings)]
    return f"Explained in the project's {join_first_values(places, _MAX_SHOWN_CHECKS)}"


MAX_SHOWN_LINES = 3
MAX_SHOWN_CAUSES = 5  # of one check in one file
_NUMBER_PATTERN = re.compile(r"\d[\d,.]*")


@dataclass(frozen=True)
class FindingGroup:
    """Findings of one check and cause in one file; `message` is that of the first of them."""

    severity: Severity
    file: str
    check: str
    message: str
    lines: tuple[int, ...]  # the first of them; none where the findings are about the whole file
    count: int

    @property
    def shown_lines(self) -> str | None:
        """The first lines, separated by commas; None for a finding about the whole file."""
        if not self.lines:
            return None
        return join_first_values(self.lines, MAX_SHOWN_LINES)

    def __str__(self) -> str:
        """The first finding, and in how many more lines it is."""
        place = f"{self.file}:{self.lines[0]}" if self.lines else self.file
        text = f"{place}: {self.check}: {self.message}"
        if self.count == 1:
            return text
        others = (
            join_first_values(self.lines[1:], MAX_SHOWN_LINES - 1) if len(self.lines) > 1 else "..."
        )
        noun = "line" if self.count == 2 else "lines"
        return f"{text} (and {self.count - 1:,} more: {noun} {others})"


def group_findings(findings: Iterable[Finding]) -> list[FindingGroup]:
    """The groups in the order of their first findings, at most MAX_SHOWN_CAUSES a check and file.

    What a check does not list (Finding.count) counts where the check has one cause. Of more causes
    than are shown, the rest is one group.
    """
    checks: dict[tuple[Severity, str, str], dict[str, FindingGroup]] = {}
    for finding in findings:
        causes = checks.setdefault((finding.severity, finding.file, finding.check), {})
        cause = _NUMBER_PATTERN.sub("#", finding.message)
        if finding.count is not None and len(causes) == 1:
            (cause,) = causes
        elif cause not in causes and len(causes) >= MAX_SHOWN_CAUSES:
            cause = ""
        causes[cause] = _add_finding_to_group(causes.get(cause), finding, is_rest=not cause)
    return [group for causes in checks.values() for group in causes.values()]


def _add_finding_to_group(
    group: FindingGroup | None, finding: Finding, *, is_rest: bool
) -> FindingGroup:
    lines = () if finding.line is None else (finding.line,)
    count = 1 if finding.count is None else finding.count
    if group is None:
        message = f"of other causes; the first: {finding.message}" if is_rest else finding.message
        return FindingGroup(finding.severity, finding.file, finding.check, message, lines, count)
    shown = group.lines if len(group.lines) > MAX_SHOWN_LINES else group.lines + lines
    return replace(group, lines=shown, count=group.count + count)


_SEVERITY_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
_MAX_SHOWN_GROUPS = 10
_MAX_SHOWN_CHARACTERS = 400


@dataclass(frozen=True)
class TokenStats:
    """Lengths in tokens after truncation, how many tokens are supervised, and what batches pad.

    context, beyond_context: how many tokens the model can see, where its config.json says so, and
        how many examples are longer.
    """

    total: int
    p50: int
    p95: int
    max: int
    supervised: int
    truncated_rows: int
    lost_tokens: int
    padding_share: float
    widths: int
    context: int | None = None
    beyond_context: int = 0


@dataclass(frozen=True)
class SplitStats:
    """One split counted: lines = blank + rejected + dropped + rows, and rows are what trains.

    in_format: how many lines, rejected and dropped ones too, have the format of most.
    delimiters: of tables: commas, semicolons ...
    parts: where there are several files; then `file` names them all.
    """

    file: str
    format: str | None
    lines: int
    blank: int
    rejected: int
    rows: int
    roles: dict[str, int]
    digest: str
    dropped: dict[str, tuple[int, ...]] = field(default_factory=dict)  # lines by reason
    tokens: TokenStats | None = None
    in_format: int = 0
    delimiters: tuple[str, ...] = ()
    parts: tuple[FilePart, ...] = ()

    @property
    def data_format(self) -> str:
        """The format of most rows, as the key data_format has it."""
        return {"completion": "completions", None: "no format"}.get(self.format, str(self.format))

    def describe_format(self) -> str:
        """Such as `train.csv: alpaca, 207 of 208 rows, separated by semicolons`."""
        rows = self.lines - self.blank
        of_all = f"{self.in_format:,} of {format_count(rows, 'row')}"
        tables = f", separated by {' and '.join(self.delimiters)}" if self.delimiters else ""
        return f"{self.file}: {self.data_format}, {of_all}{tables}"


@dataclass(frozen=True)
class DatasetReport:
    """All findings, errors first, then by file and line; and a count of each split that exists.

    chat_template: SHA-256 of the template that messages were tokenised with; None without one.
    vocabulary: SHA-256 of the files that cut text into tokens (`vocabulary_digest`).
    tokenizer: SHA-256 of the files of the tokenizer that was used, the template and the tokens that
        end an answer among them (`fingerprint_tokenizer`); None if nothing was tokenised.
    """

    folder: str
    digest: str
    splits: dict[str, SplitStats]
    findings: tuple[Finding, ...]
    chat_template: str | None = None
    vocabulary: str | None = None
    tokenizer: str | None = None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that reject the data set."""
        return self._findings_of_severity("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that a person should look at."""
        return self._findings_of_severity("warning")

    def _findings_of_severity(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values, for dataset.json and `validate --json`."""
        return {
            "folder": self.folder,
            "digest": self.digest,
            "chat_template": self.chat_template,
            "vocabulary": self.vocabulary,
            "tokenizer": self.tokenizer,
            "splits": to_jsonable_python(self.splits),
            "findings": [finding.to_json() for finding in self.findings],
            "counts": self.counts,
        }

    @property
    def counts(self) -> dict[Severity, int]:
        """The number of findings of each severity, with those that are not listed."""
        return {
            severity: _count_findings(self._findings_of_severity(severity))
            for severity in _SEVERITY_ORDER
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DatasetReport:
        """The report that `to_json` gave these values of."""
        return _REPORT_VALIDATOR.validate_python(values)

    def raise_if_rejected(self) -> None:
        """Raise DatasetError, at most 14 lines, that names the first errors and counts the rest."""
        errors = self.errors
        if not errors:
            return
        number = _count_findings(errors)
        rejected = sum(stats.rejected for stats in self.splits.values())
        where = f" in {format_count(rejected, 'line')}" if rejected else ""
        lines = [f"The data set {self.folder} is rejected: {format_count(number, 'error')}{where}."]
        groups = group_findings(errors)
        shown = groups[:_MAX_SHOWN_GROUPS]
        lines += [f"  {shorten(group, _MAX_SHOWN_CHARACTERS)}" for group in shown]
        if len(groups) > len(shown):
            rest = number - sum(group.count for group in shown)
            lines.append(f"  and {format_count(rest, 'more error')}.")
        command = f"`nested-tune validate --data {self.folder} --no-tokenize`, or with your -c,"
        lines.append(f"Correct these; {command} lists them. {guide_sentence(errors)}")
        raise DatasetError("\n".join(lines))

    def describe_warnings(self) -> str:
        """How many warnings there are of each check, on one line; empty without warnings.

        In full, what the model cannot see of the data: no other warning may spoil a whole run.
        """
        if not self.warnings:
            return ""
        checks = dict.fromkeys(finding.check for finding in self.warnings)
        kinds = ", ".join(
            f"{check} {_count_findings(f for f in self.warnings if f.check == check):,}"
            for check in checks
        )
        number = format_count(_count_findings(self.warnings), "warning")
        unseen = next((f". {f}" for f in self.warnings if f.check == "beyond-context"), "")
        return f"data: {number} ({kinds}), explained by `nested-tune validate`{unseen}"


_REPORT_VALIDATOR = TypeAdapter(DatasetReport)


def sort_findings(findings: list[Finding], files: list[str]) -> tuple[Finding, ...]:
    """Errors, warnings, infos; in each by file in this order, then by line, unlisted ones last."""
    ranks = {file: rank for rank, file in enumerate(files)}
    return tuple(
        sorted(
            findings,
            key=lambda finding: (
                _SEVERITY_ORDER[finding.severity],
                ranks.get(finding.file, len(ranks)),
                finding.count is not None,
                finding.line or 0,
            ),
        )
    )


def _count_findings(findings: Iterable[Finding]) -> int:
    """The number of findings, with those that are not listed."""
    return sum(1 if finding.count is None else finding.count for finding in findings)


def read_dataset_record(path: Path) -> DatasetReport:
    """Read dataset.json; DamagedError if it is not the report on a data set."""
    values = read_json(path, None)  # as large as the number of findings made it
    with naming_damaged_file(path, "It is written anew where the run goes on.", go_on_with()):
        return _REPORT_VALIDATOR.validate_python(values)


def held_out_split(choice: str, splits: Mapping[str, SplitStats]) -> str | None:
    """The split that losses are measured on: the first one with examples that the choice allows.

    None without such a split, and if the choice is a file outside of the data set.
    """
    allowed = SPLITS_BY_HELD_OUT_CHOICE.get(choice, ())
    return next((name for name in allowed if name in splits and splits[name].rows), None)


def held_out_file(choice: str, dataset: DatasetReport) -> str | None:
    """The file that losses are measured on: `test.jsonl`, `valid.jsonl` or the file given.

    None if `auto` finds neither a test set nor a validation set.
    """
    if choice not in SPLITS_BY_HELD_OUT_CHOICE:
        return choice
    split = held_out_split(choice, dataset.splits)
    return None if split is None else f"{split}.jsonl"


def require_held_out(choice: str, max_kl: float | None, dataset: DatasetReport, data: str) -> None:
    """Raise ConfigError if the chosen split is not there, or a bound has nothing to hold against.

    data: where the data set comes from, for the message.
    """
    if held_out_file(choice, dataset) is not None:
        return
    if choice != "auto":
        raise ConfigError(
            f"gate.held_out: {data} has no {choice}.jsonl, or it is empty. Give the name of a "
            f"split that it has, a JSON Lines file, or auto."
        )
    if max_kl is not None:
        raise ConfigError(
            f"gate.max_kl: {data} has neither test.jsonl nor valid.jsonl, on which to measure how "
            f"far predictions move. Add one, or name a file by gate.held_out."
        )


def require_test_set(dataset: DatasetReport, data: str) -> None:
    """Raise DatasetError if there is no test set, which `test` asks to be measured on."""
    if "test" not in dataset.splits or not dataset.splits["test"].rows:
        raise DatasetError(
            f"test: {data} has no test.jsonl, or it is empty. Add one, or leave out test: true."
        )
