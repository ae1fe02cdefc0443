"""What a tool noticed of a failure, by the bench's rule.

Noticed is what ends with an error or a refusal, or is told by a line whose words name the failure
and which the healthy twin's output does not have. Reports of a loss are no warnings, nor is what
the model answers. Of a table, rows count that give a verdict or end with a number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from benchmarks.silent_failures.cases import Run
from benchmarks.silent_failures.failures import Failure, When

REPORTS = re.compile(
    r"^\s*(test )?(loss|perplexity)\b|^\s*(iter|step|epoch)\b.*\bloss\b"
    r"|^\s*\{'(loss|eval_loss)'|\bit/s\b"
    r"|^\s*[│┃|](?!.*\b(MINOR|MAJOR|DIVERGED|FAIL)\b|.*[│┃|]\s*\d+\s*[│┃|]?$)",
    re.IGNORECASE,
)
NUMBERS = re.compile(
    r"^\s*([\d.,]+[kms%]*|val|nan|inf|[▲▼])(\s+([\d.,]+[kms%]*|val|nan|inf|[▲▼]))*\s*$"
)
# As mlx_lm's `generate` frames it, and as the programs of tools/ do that ask a model.
ANSWER = re.compile(r"^={10}$.*?^={10}$|^answer:.*?$", re.MULTILINE | re.DOTALL)
WARNING = re.compile(r"warn|error|refus|reject|damag|fail", re.IGNORECASE)
LAST_LINES = 3  # of a command that failed without a word that names the failure

How = Literal["refused", "warned", "does it right", ""]


@dataclass(frozen=True)
class Verdict:
    """When and how a tool noticed; `named` says whether its words name the failure."""

    noticed: When
    how: How
    named: bool
    false_alarm: bool
    said: str


def decide(failure: Failure, planted: Sequence[Run], twin: Sequence[Run]) -> Verdict:
    """Judge the commands of the planted folder beside those of the healthy one."""
    known = {
        normal(line) for run in twin for _, text in run.parts() for line in naming(failure, text)
    }
    alarms = [
        line
        for run in twin
        for _, text in run.parts()
        for line in naming(failure, text)
        if WARNING.search(line)
    ]
    told = {
        normal(line) for run in planted for _, text in run.parts() for line in naming(failure, text)
    }
    failed = [run for run in twin if run.code != 0]
    false_alarm = bool(failed) or any(normal(line) in told for line in alarms)
    for number, run in enumerate(planted):
        for when, text in run.parts():
            lines = [line for line in naming(failure, text) if normal(line) not in known]
            if lines:
                how: How = "warned" if run.code == 0 else "refused"
                return Verdict(when, how, True, false_alarm, "\n".join(lines[:LAST_LINES]))
        twin_failed = number < len(twin) and twin[number].code != 0
        if run.code != 0 and not twin_failed:
            last = [
                line for line in (run.before + run.after).splitlines() if re.search(r"\w", line)
            ]
            return Verdict(run.when, "refused", False, false_alarm, "\n".join(last[-LAST_LINES:]))
    said = "\n".join(alarms[:LAST_LINES]) if false_alarm else ""
    return Verdict("never", "", False, false_alarm, said)


def naming(failure: Failure, text: str) -> list[str]:
    """The lines of the tool that hold one of the failure's words, and do not report a loss."""
    return [
        line.strip()
        for line in ANSWER.sub("", text).splitlines()
        if failure.words.search(line) and not (REPORTS.search(line) or NUMBERS.search(line))
    ]


def normal(line: str) -> str:
    """A line without its numbers; a 0 stays, for `0 duplicates` says another thing than `36`."""
    return re.sub(r"[\d.,]*[1-9][\d.,]*", "#", line)
