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
class ApprovalPage:
    """The question whether a version becomes champion, with all that a person needs to answer it.

    facts: sentences on candidate and champion, and on the comparison of their losses, by name.
    checks: the checks of the candidate's verdict.
    key: the champion ("none" without one) and, if the candidate was judged again, the hash of that
        verdict. Under another key the same question is asked again.
    """

    name: str
    version: str
    champion: str | None
    facts: Sequence[tuple[str, str]]
    checks: Table
    key: str

    @classmethod
    def read(cls, registry: Path, name: str, version: str, champion: str | None) -> Self:
        """Read candidate and champion with their losses and answers, and compare them."""
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
        """Return the page. If the question was asked before, it says why it is asked again.

        keys_asked_about: the keys of the questions about this version so far, the latest last.
        """
        champion, again = self.champion or "none", list[Text]()
        if earlier := [key for key in keys_asked_about if key != self.key]:
            last_champion, change = earlier[-1].partition("-")[0], "the version was judged again"
            if last_champion != champion:
                change = f"the champion changed from {last_champion:.12} to {champion:.12}"
            sentence = f"ASKED AGAIN: {change} after the last question; an answer given to that one"
            again = [Text(f"{sentence} promoted nothing.")]
        facts = Facts([*self.facts, ("Version in full", self.version)])
        return Document(
            f"Make {shorten_digest(self.version)} the champion of {self.name}?",
            [*again, facts, self.checks, Text(HOW_TO_ANSWER)],
        )


def _describe_version(version: str, verdict: Verdict) -> str:
    """Return one line: a version with the losses and answers of its verdict."""
    suites = [task.describe() for task in verdict.tasks]
    return "; ".join([f"{shorten_digest(version)}: {verdict.describe_losses()}", *suites])


def _compare_losses(registry: Path, name: str, candidate: Judgement, champion: str) -> str:
    """Return a sentence with the losses of both versions on the same examples, or why not."""
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
