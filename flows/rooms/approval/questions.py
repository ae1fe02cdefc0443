"""Asks a person about a version that its policy promotes only then, in a run of promote/auto.

The run that registered the version asks, and so does the hourly reconcile for what nobody was asked
about. A key for each version makes both ask for one and the same run: no event has to arrive. That
run asks, suspends and obeys; tasks that are tried again record the answer in the registry.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, Pause
from prefect.flow_runs import suspend_flow_run
from prefect.input import RunInput
from prefect.states import Cancelled, Completed, Scheduled, State
from pydantic import Field

from flows.flow_runs.watchers import Watcher, list_watchers
from flows.promote import Asking, PromoteParameters
from nested_core.config.resume import read_run_config
from nested_core.records.outcome_names import Outcome
from nested_core.registry import Decision
from nested_core.registry.promotion_policy import describe_promotion
from nested_core.rooms.approval import answers
from nested_core.rooms.approval.answers import find_refusal_of_question
from nested_core.rooms.approval.page import ApprovalPage
from nested_core.storage.run_directory import find_run_of
from nested_core.text.digest_format import shorten_digest
from tasks.artifact_client import publish_page
from tasks.events import announce_changes
from tasks.prefect_server import (
    asking_server,
    flow_runs_in,
    set_run_state,
    tolerating_server_outage,
)
from tasks.promote import announce_promotion, find_own_change, read_origin
from tasks.retrying import REGISTRY_RETRY_DELAYS, retried_task

PROMOTION = "promote/auto"
PAUSE_KEY_PREFIX = "approval-"  # of a pause; what was shown follows: `ApprovalPage.key`
SECONDS_TO_APPROVE = 7 * 24 * 3600


def request_approval(registry: Path, name: str, version: str, night: UUID | None = None) -> None:
    """Ask a person whether to promote a version.

    If the server does not answer, the next run of `reconcile` asks.

    night: the flow run of the fine-tune, which is told the answer; None tells none.
    """
    with tolerating_server_outage(f"nobody is asked about {name} {version:.12} yet"):
        try:
            _request_approval(registry.resolve(), name, version, night)
        except ObjectNotFound:
            get_run_logger().warning(
                "Nobody is asked about %s %.12s: this server has no deployment %s, which "
                "`nested-tune deploy` makes. `nested-tune promote` promotes a run by name.",
                name,
                version,
                PROMOTION,
            )


def _request_approval(registry: Path, name: str, version: str, night: UUID | None) -> None:
    """Start the deployment promote/auto for a version, unless a run was started for it before."""
    config: dict[str, Any] = {"registry": str(registry), "name": name, "version": version}
    config["night"] = None if night is None else str(night)
    run: Any = run_deployment(
        PROMOTION,
        parameters={"config": config | {"requires_approval": True}},
        timeout=0,
        as_subflow=False,
        idempotency_key=f"approve {registry} {name} {version}",
        tags=[name],
    )
    if has_ended_unasked(run):
        with get_client(sync_client=True) as client:
            set_run_state(client, run, Scheduled())


def has_ended_unasked(run: FlowRun) -> bool:
    """Whether a run crashed, or failed before it put its question; it is then to begin again.

    A question that was cancelled, or that nobody answered in time, leaves things as they are.
    """
    if run.state is None:
        return False
    has_asked = bool(run.empirical_policy.pause_keys)
    return run.state.is_crashed() or (run.state.is_failed() and not has_asked)


def close_older_questions(registry: str, name: str, own: UUID) -> None:
    """Cancel the questions about an adapter that are older than that of the flow run `own`.

    So a person sees one question, about the newest version. The older versions stay registered.
    """
    waiting = flow_runs_in([StateType.PAUSED])
    promotions = FlowFilter.model_validate({"name": {"any_": ["promote"]}})
    with get_client(sync_client=True) as client:
        asked_at = client.read_flow_run(own).created
        for run in client.read_flow_runs(flow_filter=promotions, flow_run_filter=waiting):
            config = run.parameters.get("config") or {}
            is_older = run.created is not None and asked_at is not None and run.created < asked_at
            if not is_older or (config.get("registry"), config.get("name")) != (registry, name):
                continue
            message = "a newer version asks: this question is closed, and changed nothing"
            closed: State[None] = Cancelled(name=Outcome.SUPERSEDED, message=message)
            if set_run_state(client, run, closed) and config.get("night") is not None:
                tell_night(UUID(config["night"]), Outcome.SUPERSEDED, message)


@dataclass(frozen=True)
class Question:
    """What a person is asked: as a page of markdown for the form, and in one line.

    pause_key: the key of the pause in which a person decides about what is shown.
    """

    page: str
    summary: str
    pause_key: str


def publish_approval(
    registry: Path, name: str, version: str, champion: str | None, flow_run: UUID
) -> Question:
    """Put the page beside the flow run; return it, and the line that stands in state and alert."""
    approval = ApprovalPage.read(registry, name, version, champion)
    page = approval.describe(_read_keys_asked_about(flow_run))
    waits = f"Waits for a person: is {shorten_digest(version)} to be the champion of {name}?"
    publish_page(name, "approval", page, waits)
    said = " ".join(f"{what}: {fact.rstrip('.')}." for what, fact in approval.facts)
    return Question(str(page), said, PAUSE_KEY_PREFIX + approval.key)


def _read_keys_asked_about(flow_run: UUID) -> list[str]:
    """The keys under which this flow run has asked, oldest first, from its states."""
    with get_client(sync_client=True) as client:
        states = client.read_flow_run_states(flow_run)
    states.sort(key=lambda state: state.timestamp)
    keys = [state.state_details.pause_key or "" for state in states if state.is_paused()]
    return [key.removeprefix(PAUSE_KEY_PREFIX) for key in keys if key.startswith(PAUSE_KEY_PREFIX)]


def tell_night(night: UUID, outcome: Outcome, message: str) -> None:
    """Show the answer to a night's question in the name of its state, and tell the watchers.

    The state stays of the type Completed, and its time stays too. Watchers are told only if the
    run's folder is on this machine.

    night: the flow run of the fine-tune.
    """
    with asking_server("the run does not show the answer to its question") as client:
        state = client.read_flow_run(night).state
        if state is None or state.type != StateType.COMPLETED or state.name == outcome:
            return
        answered: State[None] = Completed(name=outcome, message=f"{state.message}; {message}")
        client.set_flow_run_state(night, answered, force=True)
        run = find_run_of(night)
        if run is not None:
            config = read_run_config(run)
            for watcher in list_watchers():
                watcher.answer(config, run, night, answered)


class ApprovalWatcher(Watcher):
    """Asks a person."""

    ask = staticmethod(request_approval)


WATCHER = ApprovalWatcher()


@retried_task("promote-approved", "promote-approved {name} {version:.12}", REGISTRY_RETRY_DELAYS)
def promote_approved(
    path: Path, name: str, version: str, by: str, expected_champion: str | None
) -> Decision:
    """Promote what a person has approved, while the champion is the one it was shown against."""
    done = answers.approve(
        path, name, version, by=by, expected_champion=expected_champion, origin=read_origin()
    )
    if warning := describe_promotion(path, name, done).warning:
        get_run_logger().warning("%s", warning)
    return announce_promotion(path, name, done)


@retried_task("decline", "decline {name} {version:.12}", REGISTRY_RETRY_DELAYS)
def decline(path: Path, name: str, version: str, by: str, reason: str | None) -> None:
    """Record in the history that a person did not approve a version, and why."""
    answers.decline(path, name, version, by=by, reason=reason, origin=read_origin())
    announce_changes(path, name)


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
