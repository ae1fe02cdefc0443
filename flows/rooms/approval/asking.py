"""What a run of the flow `promote` does until a person has answered: asks, suspends, obeys."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import StateType
from prefect.exceptions import Pause
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Completed, State
from pydantic import Field

from flows.promote import Asking, PromoteParameters
from flows.rooms.approval.answer_tasks import decline, promote_approved
from flows.rooms.approval.questions import (
    Question,
    close_older_questions,
    publish_approval,
    tell_night,
)
from nested_core.records.outcome_names import Outcome
from nested_core.rooms.approval.answers import find_refusal_of_question
from tasks.promote import find_own_change

SECONDS_TO_APPROVE = 7 * 24 * 3600


class Approval(RunInput):
    """What a person answers in the UI: yes or no, who it was, and why."""

    approve: bool
    by: str = Field(min_length=1, description="name for the history, free text that nobody checks")
    reason: str = Field(
        default="", description="reason, recorded in the history and reported by later runs"
    )


def ask_person(config: PromoteParameters, registry: Path, champion: str | None) -> State[Any]:
    """Ask a person, and return the state in which the flow `promote` ends.

    Without an answer this raises Pause, and the process ends. When a person answers, the flow is
    resumed: it begins again at its top, and finds the answer.

    champion: the version that would be replaced; None without one.
    """
    change = find_own_change(registry, config.name)
    if change is not None and config.version == champion:  # an earlier try of this run promoted it
        promote_approved(registry, config.name, config.version, change.by, champion)
        return _told_state(config, Outcome.APPROVED, f"promoted, approved by {change.by}")
    if refusal := find_refusal_of_question(registry, config.name, config.version):
        return Completed(message=refusal.sentence)
    flow_run = UUID(str(runtime.flow_run.id))
    question = publish_approval(registry, config.name, config.version, champion, flow_run)
    close_older_questions(config.registry, config.name, flow_run)
    answer = _ask(question, flow_run)
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


def _ask(question: Question, flow_run: UUID) -> Approval:
    """Return the answer, or suspend the flow run: this raises Pause, and the process ends.

    Prefect names the state of such a run Suspended. It is given the outcome's name and the
    question's figures, from which an alert is made.
    """
    try:
        return suspend_flow_run(
            wait_for_input=Approval.with_initial_data(description=question.page),
            timeout=SECONDS_TO_APPROVE,
            key=question.pause_key,
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


ASKING = Asking(ask_person)
