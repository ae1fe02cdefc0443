"""Publishes what a person reads who is asked to approve a version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import get_client

from nested_core.report.approval_page import describe_approval, list_approval_facts
from nested_core.text.digest_format import shorten_digest
from tasks.artifact_client import publish_page

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
    waits = f"Waits for a person: is {shorten_digest(version)} to be the champion of {name}?"
    publish_page(name, "approval", page, waits)
    return Question(str(page), " ".join(f"{what}: {fact.rstrip('.')}." for what, fact in facts))


def _read_champions_asked_about(flow_run: UUID) -> list[str]:
    """The champions that this flow run has asked about, oldest first, from its states."""
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(flow_run)
    states.sort(key=lambda state: state.timestamp)
    keys = [state.state_details.pause_key or "" for state in states if state.is_paused()]
    return [key.removeprefix(PAUSE_KEY_PREFIX) for key in keys if key.startswith(PAUSE_KEY_PREFIX)]
