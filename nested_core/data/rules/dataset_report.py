"""The report on a data set: findings by file and line, counts, and the paragraph that rejects it.

Holds numbers and sentences only; it reads no file and judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from pydantic import TypeAdapter

from nested_core.errors import DatasetError, shorten

Severity = Literal["error", "warning", "info"]
_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
_SHOWN_FINDINGS = 10
_SHOWN_CHARACTERS = 200


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
class Findings:
    """The findings while a data set is judged, and every line that has an error, listed or not."""

    listed: list[Finding] = field(default_factory=list)
    error_lines: dict[str, set[int]] = field(default_factory=dict)  # by file

    def lines_with_errors(self, file: str) -> frozenset[int]:
        """The numbers of the lines of a file that have an error."""
        return frozenset(self.error_lines.get(file, ()))


@dataclass(frozen=True)
class TokenStats:
    """Lengths in tokens after truncation, how many tokens are supervised, and what batches pad."""

    total: int
    p50: int
    p95: int
    max: int
    supervised: int
    truncated_rows: int
    lost_tokens: int
    padding_share: float
    widths: int


@dataclass(frozen=True)
class SplitStats:
    """One file counted: lines = blank + rejected + dropped + rows, and rows are what trains."""

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


@dataclass(frozen=True)
class DatasetReport:
    """All findings, errors first, then by file and line; and a count of each split that exists."""

    folder: str
    digest: str
    splits: dict[str, SplitStats]
    findings: tuple[Finding, ...]

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
            "splits": {split: asdict(stats) for split, stats in self.splits.items()},
            "findings": [finding.to_json() for finding in self.findings],
            "counts": {
                severity: _count_findings(self._findings_of_severity(severity))
                for severity in _ORDER
            },
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DatasetReport:
        """The report that `to_json` gave these values of."""
        return _REPORT.validate_python(values)

    def raise_if_rejected(self) -> None:
        """Raise DatasetError, at most 14 lines, that names the first errors and counts the rest."""
        errors = self.errors
        if not errors:
            return
        number = _count_findings(errors)
        rejected = sum(stats.rejected for stats in self.splits.values())
        where = f" in {_format_count(rejected, 'line')}" if rejected else ""
        lines = [
            f"The data set {self.folder} is rejected: {_format_count(number, 'error')}{where}."
        ]
        lines += [
            f"  {shorten(finding, _SHOWN_CHARACTERS)}" for finding in errors[:_SHOWN_FINDINGS]
        ]
        if number > _SHOWN_FINDINGS:
            lines.append(f"  and {_format_count(number - _SHOWN_FINDINGS, 'more error')}.")
        lines.append("Correct these; `nested-tune validate --json` lists them.")
        raise DatasetError("\n".join(lines))

    def describe_warnings(self) -> str:
        """The number of warnings and the first of them, on one line; empty if there are none."""
        if not self.warnings:
            return ""
        first = shorten(self.warnings[0], _SHOWN_CHARACTERS)
        return (
            f"data: {_format_count(_count_findings(self.warnings), 'warning')}, the first: {first}"
        )


_REPORT = TypeAdapter(DatasetReport)


def sort_findings(findings: list[Finding], files: list[str]) -> tuple[Finding, ...]:
    """Errors, warnings, infos; in each by file in this order, then by line, unlisted ones last."""
    ranks = {file: rank for rank, file in enumerate(files)}
    return tuple(
        sorted(
            findings,
            key=lambda finding: (
                _ORDER[finding.severity],
                ranks.get(finding.file, len(ranks)),
                finding.count is not None,
                finding.line or 0,
            ),
        )
    )


def _count_findings(findings: Iterable[Finding]) -> int:
    """The number of findings, with those that are not listed."""
    return sum(1 if finding.count is None else finding.count for finding in findings)


def _format_count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
