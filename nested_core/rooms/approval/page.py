"""What a person reads who is asked to approve a version: it and the champion, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from nested_core.errors import NestedTuneError
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_table import check_table
from nested_core.registry.judgements import Judgement
from nested_core.registry.promotion_policy import compare_losses, read_candidate
from nested_core.text.digest_format import shorten_digest
from nested_core.text.document import Document, Facts, Table, Text
from nested_core.text.loss_format import format_difference, format_loss

HOW_TO_ANSWER = (
    "To answer, press Resume on this flow run's page and fill in the form: approve on makes the "
    "candidate champion, approve off leaves the champion as it is and is remembered: nobody is "
    "asked about another version of the same data and settings. Your name and reason go into the "
    "history. Cancel, or no answer for 7 days, leaves the champion as it is too."
)


@dataclass(frozen=True)
class Approval:
    """What a person is asked: candidate and champion, what is said of both, and every check.

    key: what it rests on: the champion, or "none", and the hash of a verdict after the first.
    """

    name: str
    version: str
    champion: str | None
    facts: Sequence[tuple[str, str]]
    checks: Table
    key: str

    @classmethod
    def read(cls, registry: Path, name: str, version: str, champion: str | None) -> Self:
        """Each with its losses and answers, and the two compared."""
        candidate = read_candidate(registry, name, version, champion)
        verdict = candidate.verdict
        facts = [("Candidate", _describe_version(version, verdict)), ("Champion", "none yet")]
        if champion is not None:
            rival = read_candidate(registry, name, champion).verdict
            compared = _compare_losses(registry, name, candidate, champion)
            facts[1:] = [("Champion", _describe_version(champion, rival)), ("Compared", compared)]
        key = "-".join(filter(None, (champion or "none", shorten_digest(candidate.sha256 or ""))))
        return cls(name, version, champion, facts, check_table(verdict), key)

    def describe(self, keys_asked_about: Sequence[str]) -> Document:
        """The page; it says why it asks again, where it has asked under other keys before."""
        now, again = self.champion or "none", list[Text]()
        for last in [key for key in keys_asked_about if key != self.key][-1:]:
            before, change = last.partition("-")[0], "the version was judged again"
            if before != now:
                change = f"the champion changed from {before:.12} to {now:.12}"
            said = f"ASKED AGAIN: {change} after the last question; an answer given to that one"
            again = [Text(f"{said} promoted nothing.")]
        facts = Facts([*self.facts, ("Version in full", self.version)])
        return Document(
            f"Make {shorten_digest(self.version)} the champion of {self.name}?",
            [*again, facts, self.checks, Text(HOW_TO_ANSWER)],
        )


def _describe_version(version: str, verdict: Verdict) -> str:
    """Losses and answers of one version, when it was judged."""
    suites = [task.describe() for task in verdict.tasks]
    return "; ".join([f"{shorten_digest(version)}: {verdict.describe_losses()}", *suites])


def _compare_losses(registry: Path, name: str, candidate: Judgement, champion: str) -> str:
    """Both losses on the same examples, or that no losses were compared."""
    verdict = candidate.verdict
    if verdict.rival == champion and verdict.champion is not None:
        return verdict.champion.describe()
    try:
        losses = compare_losses(registry, name, candidate, champion)
    except NestedTuneError as error:
        return f"not possible: {error}"
    if losses is None:
        return "not possible: the two were not measured alike on the same examples"
    loss, champion_loss = losses
    change = loss - champion_loss
    return (
        f"on the same examples {format_loss(loss)}, the champion {format_loss(champion_loss)} "
        f"({format_difference(change)}: {'worse' if change > 0 else 'not worse'})"
    )
