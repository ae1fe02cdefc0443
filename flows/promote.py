"""The flow that makes a version the champion: by its policy, or when a person approves."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, runtime
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed, State
from pydantic import Field

from flows.allowed_folders import require_allowed
from flows.prefect_logs import hide_tracebacks_of_expected_errors
from nested_core.config.adapter_names import NAME_PATTERN
from nested_core.config.section import Section
from nested_core.registry import read_champion
from nested_core.registry.promotion_policy import (
    effective_rule,
    find_refusal_of_question,
    read_candidate,
    recorded_section,
)
from tasks.approval_page import approval_pause_key, publish_approval
from tasks.outcomes import Outcome
from tasks.promote import decline, promote_approved, promote_by_recorded_policy

SECONDS_TO_APPROVE = 7 * 24 * 3600


class PromoteParameters(Section):
    """Which version, in which registry."""

    registry: str = Field(description="the registry's folder, on the worker's machine")
    name: str = Field(pattern=f"^{NAME_PATTERN.pattern}$", description="the adapter's name in it")
    version: str = Field(pattern="^[0-9a-f]{64}$", description="the folder's name under versions/")
    requires_approval: bool = Field(
        default=False, description="ask a person, whatever the policy recorded with the version"
    )


class Approval(RunInput):
    """What a person answers in the UI: yes or no, and who it was."""

    approve: bool
    by: str = Field(
        min_length=1,
        description="who decides, a free word that nobody checks; it stands in the history",
    )


@flow(
    name="promote",
    retries=0,
    flow_run_name="promote {config.name} {config.version:.12}",
    persist_result=True,
)
def promote(config: PromoteParameters) -> State[Any]:
    """Promote by the recorded policy; under `approve` suspend until a person has answered.

    Completed in every case but damage: the message says what became of it. Resumed, the flow starts
    again from its top, and the answer is there.
    """
    hide_tracebacks_of_expected_errors()
    registry = require_allowed(config.registry, "registry")
    champion = read_champion(registry, config.name)
    if config.version == champion:
        return Completed(message="already_champion")
    if not config.requires_approval and not _asks_person(registry, config):
        return _completed_state(promote_by_recorded_policy(registry, config.name, config.version))
    if reason := find_refusal_of_question(registry, config.name, config.version):
        return Completed(message=reason)
    flow_run = UUID(str(runtime.flow_run.id))
    question = publish_approval(registry, config.name, config.version, champion, flow_run)
    # Resumed, the flow gets the answer here; until then this line raises, and the process ends.
    answer = suspend_flow_run(
        wait_for_input=Approval.with_initial_data(description=question),
        timeout=SECONDS_TO_APPROVE,
        key=approval_pause_key(champion),
    )
    if not answer.approve:
        decline(registry, config.name, config.version, answer.by)
        message = f"not approved by {answer.by}"
        return Completed(name=Outcome.DECLINED, message=message)
    return _completed_state(
        promote_approved(registry, config.name, config.version, answer.by, champion)
    )


def _asks_person(registry: Path, config: PromoteParameters) -> bool:
    """Whether the version's own policy, or the registry's, leaves it to a person."""
    candidate = read_candidate(registry, config.name, config.version)
    if candidate.policy is None:
        return False
    return effective_rule(recorded_section(registry, config.name, candidate)).asks_person


def _completed_state(outcome: str) -> State[Any]:
    """The state of a promotion that was decided on; its name says so where the champion moved."""
    name = Outcome.PROMOTED if outcome == "promoted" else None
    return Completed(name=name, message=outcome)
