"""The report on a data set: findings by file and line, counts, and the paragraph that rejects it.

Holds numbers and sentences only; it reads no file and judges nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from pydantic import TypeAdapter

from nested_core.data.rules.finding_groups import group_findings
from nested_core.data.rules.findings import Finding, Severity, guide_sentence
from nested_core.errors import DatasetError, shorten

_SEVERITY_ORDER: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
_MAX_SHOWN_GROUPS = 10
_MAX_SHOWN_CHARACTERS = 400


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
                for severity in _SEVERITY_ORDER
            },
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
        where = f" in {_format_count(rejected, 'line')}" if rejected else ""
        lines = [
            f"The data set {self.folder} is rejected: {_format_count(number, 'error')}{where}."
        ]
        groups = group_findings(errors)
        shown = groups[:_MAX_SHOWN_GROUPS]
        lines += [f"  {shorten(group, _MAX_SHOWN_CHARACTERS)}" for group in shown]
        if len(groups) > len(shown):
            rest = number - sum(group.count for group in shown)
            lines.append(f"  and {_format_count(rest, 'more error')}.")
        listing = "`nested-tune validate` with the same -c and flags lists them"
        lines.append(f"Correct these; {listing}. {guide_sentence(errors)}")
        raise DatasetError("\n".join(lines))

    def describe_warnings(self) -> str:
        """The number of warnings and the first of them, on one line; empty if there are none."""
        if not self.warnings:
            return ""
        first = shorten(self.warnings[0], _MAX_SHOWN_CHARACTERS)
        return (
            f"data: {_format_count(_count_findings(self.warnings), 'warning')}, the first: {first}"
        )


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


def _format_count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
