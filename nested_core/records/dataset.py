"""dataset.json: the report on a data set, its reader, and which of its splits judges an adapter.

The report has findings by file and line, counts, and the message that rejects a data set. The
checks that make findings are in data/rules. Findings are shown in groups of one check and cause, so
that a fault of every line is read once. A cause is a message without its numbers: two lines may be
bad JSON at different columns.
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
    """A failed check of a data set: in which file, at which line, and why.

    line: counted from 1; None if the finding is about the whole file.
    count: set on the one finding that stands for all findings of a check beyond those listed: how
        many they are.
    """

    file: str
    line: int | None
    severity: Severity
    check: str
    message: str
    count: int | None = None

    def __str__(self) -> str:
        """Format the finding as `FILE:LINE: CHECK: MESSAGE`."""
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.check}: {self.message}"

    def to_json(self) -> dict[str, Any]:
        """Return the fields as JSON values; `count` is left out if it is None."""
        values = asdict(self)
        if self.count is None:
            del values["count"]
        return values


@dataclass(frozen=True)
class FilePart:
    """One file of a split that has several files.

    lines_before: how many lines the files before this one have together.
    """

    name: str
    lines_before: int


def find_place(parts: Sequence[FilePart], file: str, line: int) -> tuple[str, int]:
    """Translate a line number counted through all files of a split into a file and its own line.

    file: what is returned with `line` unchanged if the split has no parts.
    """
    for part in reversed(parts):
        if line > part.lines_before:
            return part.name, line - part.lines_before
    return file, line


@dataclass(frozen=True)
class Findings:
    """The findings collected while a data set is checked.

    error_lines: for each file, the numbers of all lines with an error, even those not listed.
    parts: the files of each split that has several, by the split's file name. `error_lines` counts
        lines through all of them; a Finding names the single file and the line in it.
    """

    listed: list[Finding] = field(default_factory=list)
    error_lines: dict[str, set[int]] = field(default_factory=dict)  # by file
    parts: Mapping[str, Sequence[FilePart]] = field(default_factory=dict)

    def lines_with_errors(self, file: str) -> frozenset[int]:
        """Return the numbers of the lines of a file that have an error."""
        return frozenset(self.error_lines.get(file, ()))

    def find_place(self, file: str, line: int) -> tuple[str, int]:
        """Translate a line number of a split into one of its files and the line in it.

        file: the split's name, as in `parts`.
        """
        return find_place(self.parts.get(file, ()), file, line)

    def name_lines(self, file: str, lines: Iterable[int], most: int) -> str:
        """Name the first `most` of some lines: numbers, or FILE:LINE in a split of many files."""
        places = (self.find_place(file, line) for line in lines)
        return join_first_values(
            [f"{name}:{line}" if file in self.parts else line for name, line in places], most
        )


def guide_sentence(findings: Iterable[Finding]) -> str:
    """Return a sentence that links the data guide's sections on the first failed checks."""
    places = [f"{DATA_GUIDE}#{check}" for check in dict.fromkeys(f.check for f in findings)]
    return f"Explained in the project's {join_first_values(places, _MAX_SHOWN_CHECKS)}"


MAX_SHOWN_LINES = 3
MAX_SHOWN_CAUSES = 5  # of one check in one file
_NUMBER_PATTERN = re.compile(r"\d[\d,.]*")


@dataclass(frozen=True)
class FindingGroup:
    """Findings of one check with one cause in one file.

    message: that of the first finding.
    lines: the first few line numbers; empty if the findings are about the whole file.
    count: how many findings the group stands for.
    """

    severity: Severity
    file: str
    check: str
    message: str
    lines: tuple[int, ...]  # the first of them; none where the findings are about the whole file
    count: int

    @property
    def shown_lines(self) -> str | None:
        """The first line numbers, separated by commas; None for a finding about the whole file."""
        if not self.lines:
            return None
        return join_first_values(self.lines, MAX_SHOWN_LINES)

    def __str__(self) -> str:
        """Describe the first finding, and on how many more lines the same cause was found."""
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
    """Group findings by severity, file, check and cause, in the order of their first findings.

    Each check has at most MAX_SHOWN_CAUSES causes per file; all further causes form one more group.
    A finding that only counts unlisted ones (`Finding.count`) is added to the check's single cause,
    or to the group of further causes.
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
    """Return the group with one more finding counted; a new group if `group` is None.

    is_rest: whether the group is the one of all causes beyond MAX_SHOWN_CAUSES.
    """
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
    """Token counts of a split after truncation.

    total, p50, p95, max: tokens of all examples, and the median, 95th percentile and maximum
        length.
    supervised: how many tokens the loss is computed on.
    truncated_rows, lost_tokens: how many examples were cut, and how many tokens were cut off.
    padding_share: the share of batch positions that are padding.
    widths: how many different batch widths occur.
    context: the model's context length in tokens, from its config.json; None if not given there.
    beyond_context: how many examples are longer than `context`.
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
    """Counts of one split of a data set; lines = blank + rejected + dropped + rows.

    format: the format that most lines have; None if no line has a known one.
    rows: how many examples are trained on.
    in_format: how many lines have `format`, rejected and dropped ones included.
    digest: SHA-256 of the content of the rows.
    dropped: the numbers of dropped lines by reason.
    delimiters: the column separators of tables, such as commas.
    parts: the files of a split that has several; `file` then names them all.
    tags: the entity tag of each file that was fetched from object storage, by its name.
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
    tags: dict[str, str] = field(default_factory=dict)

    @property
    def data_format(self) -> str:
        """The format of most rows, as a value of the key `data_format`."""
        return {"completion": "completions", None: "no format"}.get(self.format, str(self.format))

    @property
    def has_several_answers(self) -> bool:
        """Whether some row has answers before its last one."""
        return self.roles.get("assistant", 0) > self.rows + self.rejected

    def describe_format(self) -> str:
        """Describe the format: `train.csv: alpaca, 207 of 208 rows, separated by semicolons`."""
        of_all = f"{self.in_format:,} of {format_count(self.lines - self.blank, 'row')}"
        tables = f", separated by {' and '.join(self.delimiters)}" if self.delimiters else ""
        return f"{self.file}: {self.data_format}, {of_all}{tables}"


@dataclass(frozen=True)
class PromptFormat:
    """How training rows begin, and so how a question's `prompt` is asked of what they trained.

    is_chat: whether the chat template formats the rows; else a prompt is asked as it stands.
    system: the system text of all rows; None if they have none, or different ones.
    tools: the tools of all rows, likewise.
    """

    is_chat: bool = True
    system: str | None = None
    tools: list[dict[str, Any]] | None = None

    def ask(self, prompt: str) -> list[dict[str, str]]:
        """Return the chat that asks a prompt: begun with the system text, if all rows share one."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": prompt}]

    @classmethod
    def read(cls, dataset_or_provenance: Path) -> PromptFormat | None:
        """Read it from dataset.json or provenance.json; None if there is no file or it has none."""
        if not dataset_or_provenance.is_file():
            return None
        recorded = read_json(dataset_or_provenance, None).get("prompt_format")
        with naming_damaged_file(dataset_or_provenance):
            return _PROMPT_FORMAT_VALIDATOR.validate_python(recorded)


_PROMPT_FORMAT_VALIDATOR = TypeAdapter[PromptFormat | None](PromptFormat | None)


@dataclass(frozen=True)
class DatasetReport:
    """The report on a data set: findings by severity, file and line, and counts of each split.

    digest: SHA-256 of the content of all splits.
    prompt_format: how the rows of train begin; None without rows.
    chat_template: SHA-256 of the template that formatted chat messages; None if no template was
        used.
    vocabulary: SHA-256 of the tokenizer's files that split text into tokens (`vocabulary_digest`).
    tokenizer: SHA-256 of all tokenizer files with the chat template and the end tokens
        (`fingerprint_tokenizer`); None if nothing was tokenized.
    """

    folder: str
    digest: str
    splits: dict[str, SplitStats]
    findings: tuple[Finding, ...]
    prompt_format: PromptFormat | None = None
    chat_template: str | None = None
    vocabulary: str | None = None
    tokenizer: str | None = None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings of severity error, which reject the data set."""
        return self._findings_of_severity("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings of severity warning."""
        return self._findings_of_severity("warning")

    def _findings_of_severity(self, severity: Severity) -> tuple[Finding, ...]:
        """Return the findings of one severity."""
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def to_json(self) -> dict[str, Any]:
        """Return the report as JSON values, for dataset.json and `validate --json`."""
        values: dict[str, Any] = to_jsonable_python(self)
        findings = [finding.to_json() for finding in self.findings]
        return values | {"findings": findings, "counts": self.counts}

    @property
    def counts(self) -> dict[Severity, int]:
        """The number of findings of each severity, unlisted ones included."""
        return {
            severity: _count_findings(self._findings_of_severity(severity))
            for severity in _SEVERITY_ORDER
        }

    @classmethod
    def from_json(cls, values: dict[str, object]) -> DatasetReport:
        """Build the report from the JSON values that `to_json` returned."""
        return _REPORT_VALIDATOR.validate_python(values)

    def raise_if_rejected(self) -> None:
        """Raise DatasetError if the report has errors.

        The message names the first errors and counts the rest, in at most 14 lines, and says which
        command lists them all. Equal errors of several lines are shown as one group.
        """
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
        command = f"`nested-tune validate --data {self.folder} --no-tokenize`, with your -c if any"
        lines.append(f"Correct these; {command} for --data, lists them. {guide_sentence(errors)}")
        raise DatasetError("\n".join(lines))

    def describe_warnings(self) -> str:
        """Return one line with the number of warnings of each check; "" without warnings.

        A warning that examples exceed the model's context is quoted in full, as it can spoil a
        whole run.
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
    """Sort findings by severity, then file in the order of `files`, then line.

    A finding that only counts unlisted ones comes last of its file and severity.
    """
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
    """Count findings, with the unlisted ones that a finding's `count` stands for."""
    return sum(1 if finding.count is None else finding.count for finding in findings)


def read_dataset_record(path: Path) -> DatasetReport:
    """Read dataset.json; raise DamagedError if it is not a DatasetReport."""
    values = read_json(path, None)  # as large as the number of findings made it
    with naming_damaged_file(path, "It is written anew where the run goes on.", go_on_with()):
        return _REPORT_VALIDATOR.validate_python(values)


def held_out_split(choice: str, splits: Mapping[str, SplitStats]) -> str | None:
    """Return the split that held-out losses are measured on, for the value of `gate.held_out`.

    It is the first split with examples that the choice allows. None if no such split has examples,
    or if the choice is a file outside of the data set.
    """
    allowed = SPLITS_BY_HELD_OUT_CHOICE.get(choice, ())
    return next((name for name in allowed if name in splits and splits[name].rows), None)


def held_out_file(choice: str, dataset: DatasetReport) -> str | None:
    """Return the file that held-out losses are measured on, such as test.jsonl.

    choice: the value of `gate.held_out`. None is returned if it is `auto` and the data set has
        neither a test nor a validation split.
    """
    if choice not in SPLITS_BY_HELD_OUT_CHOICE:
        return choice
    split = held_out_split(choice, dataset.splits)
    return None if split is None else f"{split}.jsonl"


def require_held_out(choice: str, max_kl: float | None, dataset: DatasetReport, data: str) -> None:
    """Raise ConfigError if `gate.held_out` or `gate.max_kl` needs held-out examples and has none.

    choice: the value of `gate.held_out`.
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
    """Raise DatasetError if the data set has no test examples, which the key `test: true` needs."""
    if "test" not in dataset.splits or not dataset.splits["test"].rows:
        raise DatasetError(
            f"test: {data} has no test.jsonl, or it is empty. Add one, or leave out test: true."
        )
