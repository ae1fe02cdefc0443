"""Findings put together by check and cause, so that a fault of every line is read once.

A cause is a message without its numbers: two lines may be bad JSON at different columns.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from nested_core.data.rules.findings import Finding, Severity
from nested_core.errors import join_first_values

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
