"""What was found in a data set, line by line, and the one paragraph that rejects it.

Holds numbers and sentences only; it reads no file and judges nothing.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nested_core.errors import DatasetError, shorten

Severity = Literal["error", "warning", "info"]
_ORDER: dict[str, int] = {"error": 0, "warning": 1, "info": 2}
_SHOWN_FINDINGS = 10
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing found: in which file, at which line (from 1; None is the whole file), and what."""

    file: str
    line: int | None
    severity: Severity
    check: str
    message: str

    def __str__(self) -> str:
        place = self.file if self.line is None else f"{self.file}:{self.line}"
        return f"{place}: {self.check}: {self.message}"


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
        return self._of("error")

    @property
    def warnings(self) -> tuple[Finding, ...]:
        """The findings that a person should look at."""
        return self._of("warning")

    def _of(self, severity: Severity) -> tuple[Finding, ...]:
        return tuple(finding for finding in self.findings if finding.severity == severity)

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values, for dataset.json and `validate --json`."""
        counts = {severity: len(self._of(severity)) for severity in ("error", "warning", "info")}
        return asdict(self) | {
            "findings": [asdict(finding) for finding in self.findings],
            "counts": counts,
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> DatasetReport:
        """The report that `to_json` gave these values of."""
        splits = {
            split: SplitStats(
                **stats
                | {
                    "dropped": {reason: tuple(ns) for reason, ns in stats["dropped"].items()},
                    "tokens": None if stats["tokens"] is None else TokenStats(**stats["tokens"]),
                }
            )
            for split, stats in values["splits"].items()
        }
        findings = tuple(Finding(**finding) for finding in values["findings"])
        return cls(values["folder"], values["digest"], splits, findings)

    def raise_if_rejected(self) -> None:
        """Raise DatasetError, at most 14 lines, that names the first errors and counts the rest."""
        errors = self.errors
        if not errors:
            return
        places = {(finding.file, finding.line) for finding in errors if finding.line is not None}
        where = f" in {_count(len(places), 'line')}" if places else ""
        lines = [f"The data set {self.folder} is rejected: {_count(len(errors), 'error')}{where}."]
        lines += [
            f"  {shorten(finding, _SHOWN_CHARACTERS)}" for finding in errors[:_SHOWN_FINDINGS]
        ]
        if len(errors) > _SHOWN_FINDINGS:
            lines.append(f"  and {_count(len(errors) - _SHOWN_FINDINGS, 'more error')}.")
        lines.append("Correct these; `nested-tune validate --json` lists every finding.")
        raise DatasetError("\n".join(lines))

    def describe_warnings(self) -> str:
        """How many there are, and the first, on one line; nothing where there is none."""
        if not self.warnings:
            return ""
        first = shorten(self.warnings[0], _SHOWN_CHARACTERS)
        return f"data: {_count(len(self.warnings), 'warning')}, the first: {first}"


def in_order(findings: list[Finding], files: list[str]) -> tuple[Finding, ...]:
    """Errors, warnings, infos; in each by file in this order, then by line."""
    ranks = {file: rank for rank, file in enumerate(files)}
    return tuple(
        sorted(
            findings,
            key=lambda finding: (
                _ORDER[finding.severity],
                ranks.get(finding.file, len(ranks)),
                finding.line or 0,
            ),
        )
    )


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
