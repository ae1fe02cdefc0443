"""What a person reads who is asked to approve a version: it and the champion, side by side."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client

from nested_core.errors import NestedTuneError
from nested_core.registry.promotion_policy import (
    compare_losses,
    read_candidate,
    read_newest_verdict,
)
from nested_core.text.digest_format import shorten_digest
from nested_core.text.loss_format import format_difference, format_loss
from tasks.artifact_client import ArtifactClient, artifact_key
from tasks.markdown_page import MarkdownPage
from tasks.verdict_text import describe_champion_loss, describe_losses, describe_suite

HOW_TO_ANSWER = (
    "To answer, press Resume on this flow run's page and fill in the form: approve on makes the "
    "candidate champion, approve off leaves the champion as it is and is remembered: nobody is "
    "asked about another version of the same data and settings. Your name and reason stand in the "
    "history. Cancel, or no answer for 7 days, leaves the champion as it is too."
)
PAUSE_KEY_PREFIX = (
    "approval-"  # of a pause; the champion that the version was shown against follows
)


def approval_pause_key(champion: str | None) -> str:
    """The key of the pause in which a person decides against this champion."""
    return f"{PAUSE_KEY_PREFIX}{champion or 'none'}"


@dataclass(frozen=True)
class Question:
    """What a person is asked: as a page of markdown for the form, and in one line."""

    page: str
    summary: str


def publish_approval(
    registry: Path, name: str, version: str, champion: str | None, flow_run: UUID
) -> Question:
    """Put the page beside the flow run; return it, and the line that stands in state and alert."""
    facts = list_approval_facts(registry, name, version, champion)
    page = describe_approval(name, version, champion, facts, _read_champions_asked_about(flow_run))
    with ArtifactClient() as artifacts:
        artifacts.publish_page(
            artifact_key(name, "approval"),
            page,
            f"Waits for a person: is {shorten_digest(version)} to be the champion of {name}?",
        )
    return Question(str(page), " ".join(f"{what}: {fact.rstrip('.')}." for what, fact in facts))


def list_approval_facts(
    registry: Path, name: str, version: str, champion: str | None
) -> list[tuple[str, str]]:
    """Candidate and champion, each with its losses and answers, and the two compared."""
    verdict = read_newest_verdict(registry, name, version, champion)
    facts = [("Candidate", f"{shorten_digest(version)}: {_describe_losses_and_answers(verdict)}")]
    if champion is None:
        return [*facts, ("Champion", "none yet")]
    figures = _describe_losses_and_answers(read_newest_verdict(registry, name, champion))
    return [
        *facts,
        ("Champion", f"{shorten_digest(champion)}: {figures}"),
        ("Compared", _compare_losses(registry, name, version, champion, verdict)),
    ]


def describe_approval(
    name: str,
    version: str,
    champion: str | None,
    facts: list[tuple[str, str]],
    champions_asked_about: list[str],
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


def _describe_losses_and_answers(verdict: Mapping[str, Any]) -> str:
    """Losses and answers of one version, when it was judged."""
    losses = f"loss {describe_losses(verdict)}" if verdict.get("validation") else "no loss measured"
    suites = [describe_suite(task) for task in verdict.get("tasks") or []]
    return "; ".join([losses, *suites])


def _compare_losses(
    registry: Path, name: str, version: str, champion: str, verdict: Mapping[str, Any]
) -> str:
    """Both losses on the same examples, or that there are none."""
    measured = verdict.get("champion")
    if measured is not None and measured["version"] == champion:
        return describe_champion_loss(measured)
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


def _read_champions_asked_about(flow_run: UUID) -> list[str]:
    """The champions that this flow run has asked about, oldest first, from its states."""
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(flow_run)
    states.sort(key=lambda state: state.timestamp)
    keys = [state.state_details.pause_key or "" for state in states if state.is_paused()]
    return [key.removeprefix(PAUSE_KEY_PREFIX) for key in keys if key.startswith(PAUSE_KEY_PREFIX)]
