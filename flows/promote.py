"""The flow that makes a version the champion: by its policy, or when a person approves."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import flow, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import Pause
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed, State
from pydantic import Field

from flows.flow_runs.allowed_folders import require_allowed
from flows.flow_runs.approvals import (
    Question,
    approval_pause_key,
    close_older_questions,
    publish_approval,
)
from flows.flow_runs.nights import tell_night
from flows.flow_runs.prefect_logs import prepare_logs
from nested_core.config.names import NAME_PATTERN
from nested_core.config.section_base import Section
from nested_core.records.outcome_names import Outcome
from nested_core.registry import read_champion
from nested_core.registry.promotion_policy import (
    effective_rule,
    find_refusal_of_question,
    read_candidate,
    recorded_section,
)
from tasks.promote import decline, promote_approved, promote_by_recorded_policy

SECONDS_TO_APPROVE = 7 * 24 * 3600


class AdapterParameters(Section):
    """Which adapter, in which registry."""

    registry: str = Field(description="the registry's folder, on the worker's machine")
    name: str = Field(pattern=f"^{NAME_PATTERN.pattern}$", description="the adapter's name in it")


class PromoteParameters(AdapterParameters):
    """Which version of an adapter."""

    version: str = Field(pattern="^[0-9a-f]{64}$", description="the folder's name under versions/")
    requires_approval: bool = Field(
        default=False, description="ask a person, whatever the policy recorded with the version"
    )
    night: UUID | None = Field(
        default=None, description="the fine-tune's flow run, which gets the answer"
    )


class Approval(RunInput):
    """What a person answers in the UI: yes or no, who it was, and why."""

    approve: bool
    by: str = Field(min_length=1, description="name for the history, free text that nobody checks")
    reason: str = Field(
        default="", description="reason, recorded in the history and reported by later runs"
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
    prepare_logs()
    registry = require_allowed(config.registry, "registry")
    champion = read_champion(registry, config.name)
    if config.version == champion:
        return Completed(message="already_champion")
    if not config.requires_approval and not _asks_person(registry, config):
        decision = promote_by_recorded_policy(registry, config.name, config.version)
        name = Outcome.PROMOTED if decision.outcome == "promoted" else None
        return Completed(name=name, message=decision.sentence)
    if refusal := find_refusal_of_question(registry, config.name, config.version):
        return Completed(message=refusal.sentence)
    flow_run = UUID(str(runtime.flow_run.id))
    question = publish_approval(registry, config.name, config.version, champion, flow_run)
    close_older_questions(config.registry, config.name, flow_run)
    answer = _ask(question, approval_pause_key(champion), flow_run)
    if not answer.approve:
        decline(registry, config.name, config.version, answer.by, answer.reason or None)
        why = f": {answer.reason}" if answer.reason else ""
        return _told_state(config, Outcome.DECLINED, f"not approved by {answer.by}{why}")
    decision = promote_approved(registry, config.name, config.version, answer.by, champion)
    if decision.outcome == "promoted":
        return _told_state(config, Outcome.APPROVED, f"promoted, approved by {answer.by}")
    if decision.outcome == "superseded":
        return _told_state(config, Outcome.SUPERSEDED, "the champion changed after the question")
    return Completed(message=decision.sentence)


def _ask(question: Question, key: str, flow_run: UUID) -> Approval:
    """The answer, once there is one; until then this raises, and the process ends.

    Prefect's state of a run that waits is named Suspended and says nothing: it is given a name and
    the question's figures, from which an alert is made.
    """
    try:
        return suspend_flow_run(
            wait_for_input=Approval.with_initial_data(description=question.page),
            timeout=SECONDS_TO_APPROVE,
            key=key,
        )
    except Pause as pause:
        if pause.state is not None:
            waiting: State[Any] = State(
                type=StateType.PAUSED,
                name=Outcome.WAITS_FOR_APPROVAL,
                message=question.summary,
                state_details=pause.state.state_details,
            )
            with get_client(sync_client=True) as client:
                client.set_flow_run_state(flow_run, waiting, force=True)
        raise


def _told_state(config: PromoteParameters, outcome: Outcome, message: str) -> State[Any]:
    """The state in which a question ends; the night that asked it is told the same."""
    if config.night is not None:
        tell_night(config.night, outcome, message)
    return Completed(name=outcome, message=message)


def _asks_person(registry: Path, config: PromoteParameters) -> bool:
    """Whether the version's own policy, or the registry's, leaves it to a person."""
    candidate = read_candidate(registry, config.name, config.version)
    if candidate.facts.policy is None:
        return False
    return effective_rule(recorded_section(registry, config.name, candidate)).asks_person
