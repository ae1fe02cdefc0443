"""What a check of a data set found: the file, the line, how serious it is, and a sentence."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from nested_core.errors import join_first_values

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
class Findings:
    """The findings while a data set is judged, and every line that has an error, listed or not."""

    listed: list[Finding] = field(default_factory=list)
    error_lines: dict[str, set[int]] = field(default_factory=dict)  # by file

    def lines_with_errors(self, file: str) -> frozenset[int]:
        """The numbers of the lines of a file that have an error."""
        return frozenset(self.error_lines.get(file, ()))


def guide_sentence(findings: Iterable[Finding]) -> str:
    """A sentence that names the places in the guide of the first checks that found something."""
    places = [f"{DATA_GUIDE}#{check}" for check in dict.fromkeys(f.check for f in findings)]
    return f"Explained in {join_first_values(places, _MAX_SHOWN_CHECKS)}"
