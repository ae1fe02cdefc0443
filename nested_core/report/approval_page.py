"""What a person reads who is asked to approve a version: it and the champion, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from nested_core.errors import NestedTuneError
from nested_core.records.verdict import Verdict
from nested_core.registry.promotion_policy import compare_losses, read_candidate
from nested_core.report.verdict_page import describe_champion_loss, describe_losses
from nested_core.text.digest_format import shorten_digest
from nested_core.text.loss_format import format_difference, format_loss
from nested_core.text.markdown_page import MarkdownPage

HOW_TO_ANSWER = (
    "To answer, press Resume on this flow run's page and fill in the form: approve on makes the "
    "candidate champion, approve off leaves the champion as it is and is remembered: nobody is "
    "asked about another version of the same data and settings. Your name and reason stand in the "
    "history. Cancel, or no answer for 7 days, leaves the champion as it is too."
)


def list_approval_facts(
    registry: Path, name: str, version: str, champion: str | None
) -> list[tuple[str, str]]:
    """Candidate and champion, each with its losses and answers, and the two compared."""
    verdict = read_candidate(registry, name, version, champion).verdict
    facts = [("Candidate", _describe_version(version, verdict))]
    if champion is None:
        return [*facts, ("Champion", "none yet")]
    rival = read_candidate(registry, name, champion).verdict
    return [
        *facts,
        ("Champion", _describe_version(champion, rival)),
        ("Compared", _compare_losses(registry, name, version, champion, verdict)),
    ]


def describe_approval(
    name: str,
    version: str,
    champion: str | None,
    facts: Sequence[tuple[str, str]],
    champions_asked_about: Sequence[str],
) -> MarkdownPage:
    """Candidate and champion with loss and answers; why it asks again, where it has asked before.

    `champions_asked_about` holds the champions, or "none", that it asked about so far.
    """
    page = MarkdownPage(f"Make {shorten_digest(version)} the champion of {name}?")
    earlier = [one for one in champions_asked_about if one != (champion or "none")]
    if earlier:
        page.add_paragraph(
            f"ASKED AGAIN: the champion changed from {shorten_digest(earlier[-1])} to "
            f"{shorten_digest(champion or 'none')} after the last question; an answer given to "
            "that one promoted nothing."
        )
    page.add_facts([*facts, ("Version in full", version)])
    page.add_paragraph(HOW_TO_ANSWER)
    return page


def _describe_version(version: str, verdict: Verdict) -> str:
    """Losses and answers of one version, when it was judged."""
    suites = [task.describe() for task in verdict.tasks]
    return "; ".join([f"{shorten_digest(version)}: {describe_losses(verdict)}", *suites])


def _compare_losses(
    registry: Path, name: str, version: str, champion: str, verdict: Verdict
) -> str:
    """Both losses on the same examples, or that there are none."""
    if verdict.rival == champion and verdict.champion is not None:
        return describe_champion_loss(verdict.champion)
    try:
        losses = compare_losses(
            registry, name, read_candidate(registry, name, version, champion), champion
        )
    except NestedTuneError as error:
        return f"not possible: {error}"
    if losses is None:
        return "not possible: the two were not judged on the same examples"
    change = losses.loss - losses.champion_loss
    return (
        f"on the same examples {format_loss(losses.loss)}, the champion "
        f"{format_loss(losses.champion_loss)} "
        f"({format_difference(change)}: {'worse' if change > 0 else 'not worse'})"
    )
