"""The question to a person on a server: asked once, suspended until the answer, which is obeyed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.exceptions import ObjectNotFound
from prefect.flow_runs import resume_flow_run
from prefect.states import AwaitingRetry, Cancelled, Completed, Crashed, Failed

from flows.promote import promote
from flows.reconcile import ReconcileParameters, reconcile
from flows.rooms.approval.questions import request_approval
from nested_core import registry as core
from tests.builders import registering
from tests.flows.promotions import NAME, deployed_run, execute, parameters, register_judged
from tests.gate_files import judged_files, read_gate, write_gate

pytestmark = [
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.slow("asks a person by Prefect's server"),
]
Add = Callable[..., str]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(tmp_path))  # for the runs of deployments
    return tmp_path / "registry"


@pytest.fixture
def add(tmp_path: Path, registry: Path) -> Add:
    return partial(register_judged, tmp_path, registry)


def answer(run_id: UUID, **values: Any) -> None:
    resume_flow_run(run_id, run_input=values)


def approval_page(run_id: UUID) -> str:
    """What a person reads who is asked, as of now; the flow run keeps one page of it."""
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
    with get_client(sync_client=True) as client:
        (page,) = client.read_artifacts(artifact_filter=wanted)
    assert page.key == f"{NAME}-approval"
    return str(page.data)


@pytest.fixture
def waiting(add: Add, registry: Path) -> tuple[UUID, str, str]:
    """A flow run that waits for approval of a version, that version, and the champion."""
    champion = add(1)
    registering.promote(registry, NAME, champion, by="ann")
    version = add(2, "approve")
    run_id = deployed_run(parameters(registry, version))
    state = execute(run_id)
    assert (state.type.value, state.name) == ("PAUSED", "Waits for approval")
    assert core.read_champion(registry, NAME) == champion
    return run_id, version, champion


def test_page_and_state_of_a_question_have_both_losses_and_short_versions(waiting) -> None:
    run_id, version, champion = waiting
    page = approval_page(run_id).replace("\\", "")
    assert f"# Make {version[:12]} the champion of {NAME}?" in page
    assert f"**Candidate**: {version[:12]}: validation loss 4.1 -> 1.2 (" in page
    assert f"**Champion**: {champion[:12]}: validation loss 4.1 -> 1.2 (" in page
    assert "ASKED AGAIN" not in page
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id).state
    message = "" if state is None else str(state.message)
    assert message.startswith(f"Candidate: {version[:12]}: validation loss 4.1 -> 1.2 (")
    assert f"Champion: {champion[:12]}: validation loss 4.1 -> 1.2 (" in message
    assert (
        "Compared: not possible: the two were not measured alike on the same examples." in message
    )


def test_approved_by_a_person_a_version_is_promoted_in_that_persons_name(waiting, registry) -> None:
    run_id, version, champion = waiting
    answer(run_id, approve=True, by="ann")
    state = execute(run_id)
    assert (state.is_completed(), state.name) == (True, "Approved")
    assert state.message == "promoted, approved by ann"
    last = core.history(registry, NAME)[-1]
    assert (last["version"], last["previous"], last["by"]) == (version, champion, "ann")
    assert last["automatic"] is False


def test_not_approved_nothing_is_promoted(waiting: tuple[UUID, str, str], registry: Path) -> None:
    run_id, _, champion = waiting
    answer(run_id, approve=False, by="bob", reason="too curt")
    state = execute(run_id)
    assert (state.is_completed(), state.message) == (True, "not approved by bob: too curt")
    assert state.name == "Declined"
    line = core.history(registry, NAME)[-1]
    assert (line["action"], line["version"], line["by"]) == ("declined", waiting[1], "bob")
    assert line["reason"] == "too curt"
    assert core.read_champion(registry, NAME) == champion


def make_night() -> UUID:
    """A fine-tune's flow run that has ended with a question."""
    asked: State[Any] = Completed(name="Waits for approval", message="verified 4e044e")
    with get_client(sync_client=True) as client:
        night = client.create_flow_run(promote, name="capitals, 20 Nov")
        client.set_flow_run_state(night.id, asked, force=True)
    return night.id


@pytest.mark.slow("two runs of a deployment")
def test_the_night_that_asked_is_told_the_answer(add: Add, registry: Path) -> None:
    night = make_night()
    run_id = deployed_run(parameters(registry, add(1), requires_approval=True, night=night))
    execute(run_id)
    answer(run_id, approve=False, by="bob", reason="too curt")
    execute(run_id)
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(night).state
    assert state is not None
    assert state.is_completed()
    assert (state.name, state.message) == (
        "Declined",
        "verified 4e044e; not approved by bob: too curt",
    )


@pytest.mark.slow("three runs of a deployment")
@pytest.mark.slow("a run of a deployment, and its retry")
def test_an_approval_that_is_retried_tells_the_night(add: Add, registry: Path) -> None:
    night = make_night()
    run_id = deployed_run(parameters(registry, add(1), requires_approval=True, night=night))
    execute(run_id)
    answer(run_id, approve=True, by="ann")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flows.rooms.approval.questions.tell_night", lambda *_: 1 / 0)
        assert execute(run_id).is_failed()
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, AwaitingRetry(), force=True)
    lines = core.history(registry, NAME)
    assert execute(run_id).name == "Approved"
    assert core.history(registry, NAME) == lines
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(night).state
    assert state is not None
    assert state.message == "verified 4e044e; promoted, approved by ann"


def test_a_newer_question_closes_the_older_one(waiting, add, registry) -> None:
    older = waiting[0]
    newer = deployed_run(parameters(registry, add(3), requires_approval=True))
    other = deployed_run(parameters(registry, add(4), requires_approval=True, name="other"))
    assert execute(newer).name == "Waits for approval"
    with get_client(sync_client=True) as client:
        closed = client.read_flow_run(older).state
        assert closed is not None
        assert closed.type.value == "CANCELLED"
        assert (closed.name, "a newer version asks" in str(closed.message)) == ("Superseded", True)
        assert client.read_flow_run(other).state_name == "Scheduled"


@pytest.mark.slow("several flow runs, each with an approval")
def test_an_approval_that_was_given_against_another_champion_is_asked_for_again(
    waiting: tuple[UUID, str, str], add: Add, registry: Path
) -> None:
    run_id, version, champion = waiting
    answer(run_id, approve=True, by="ann")
    other = add(3)
    registering.promote(registry, NAME, other, by="bob")
    assert execute(run_id).name == "Waits for approval"
    why = f"ASKED AGAIN: the champion changed from {champion[:12]} to {other[:12]}"
    assert why in approval_page(run_id)
    answer(run_id, approve=True, by="ann")
    assert execute(run_id).message == "promoted, approved by ann"
    assert core.history(registry, NAME)[-1]["previous"] == other
    assert core.read_champion(registry, NAME) == version


@pytest.mark.slow("several flow runs, each with an approval")
def test_an_approval_that_was_given_before_the_version_was_judged_again_is_asked_for_again(
    waiting: tuple[UUID, str, str], tmp_path: Path, registry: Path
) -> None:
    run_id, version, champion = waiting
    answer(run_id, approve=True, by="ann")
    judged = tmp_path / "run-2"
    gate = read_gate(judged / "gate.json")
    gate["champion"] = {"version": champion, "loss": 1.0, "difference": 0.5, "examples": 10}
    write_gate(judged, gate, judged_files(judged))
    facts = {"champion_at_gate": champion, "config": {"registry": {"promote": "approve"}}}
    assert registering.register(judged, registry, NAME, facts) == version
    assert execute(run_id).name == "Waits for approval"
    page = approval_page(run_id)
    assert "ASKED AGAIN: the version was judged again after the last question" in page
    assert "difference +0.5" in page.replace("\\", "")
    assert core.read_champion(registry, NAME) == champion
    answer(run_id, approve=True, by="ann")
    assert execute(run_id).message == "promoted, approved by ann"


@pytest.mark.slow("several flow runs, each with an approval")
def test_approval_can_be_required_whatever_the_policy(add: Add, registry: Path) -> None:
    run_id = deployed_run(parameters(registry, add(1), requires_approval=True))
    assert execute(run_id).name == "Waits for approval"
    answer(run_id, approve=True, by="ann")
    assert execute(run_id).message == "promoted, approved by ann"


def delete_promote_auto(client: SyncPrefectClient) -> None:
    """Of another test on this server, with the questions that it left."""
    with suppress(ObjectNotFound):
        client.delete_deployment(client.read_deployment_by_name("promote/auto").id)


@pytest.fixture
def promotion_deployment() -> Iterator[UUID]:
    """promote/auto, as `deploy` makes it, without a worker."""
    with get_client(sync_client=True) as client:
        delete_promote_auto(client)
        made = client.create_deployment(client.create_flow(promote), name="auto")
        yield made
        client.delete_deployment(made)


def questions(deployment: UUID) -> list[FlowRun]:
    wanted = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
    with get_client(sync_client=True) as client:
        return list(client.read_flow_runs(flow_run_filter=wanted))


@pytest.mark.slow("several flow runs, each with an approval")
def test_a_version_that_waits_is_asked_about_once_whoever_asks_how_often(
    add: Add, registry: Path, promotion_deployment: UUID
) -> None:
    version = add(1, "approve")
    given = ReconcileParameters(registry=str(registry))
    for _ in range(2):
        state = reconcile(given, return_state=True)
        assert state.message == "promoted: nothing"
    request_approval_again = flow(request_approval)
    request_approval_again(registry, NAME, version)
    (run,) = questions(promotion_deployment)
    config = {"registry": str(registry), "name": NAME, "version": version, "night": None}
    assert run.parameters == {"config": config | {"requires_approval": True}}
    assert NAME in run.tags
    other = add(2, "approve")
    reconcile(given)
    asked = {each.parameters["config"]["version"] for each in questions(promotion_deployment)}
    assert asked == {version, other}


@pytest.mark.slow("several flow runs, each with an approval")
def test_a_question_that_crashed_or_failed_before_it_was_put_is_put_again(
    add: Add, registry: Path, promotion_deployment: UUID
) -> None:
    add(1, "approve")
    given = ReconcileParameters(registry=str(registry))
    reconcile(given)
    (run,) = questions(promotion_deployment)
    ends: list[State[Any]] = [Crashed(), Failed()]
    for end in ends:
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(run.id, end, force=True)
        reconcile(given)
        (again,) = questions(promotion_deployment)
        assert (again.id, again.state_name) == (run.id, "Scheduled")
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run.id, Cancelled(), force=True)
    reconcile(given)
    assert questions(promotion_deployment)[0].state_name == "Cancelled", "a person's word"


@pytest.mark.slow("a flow run of its own")
def test_a_server_without_promote_auto_is_said_and_fails_nothing(add, registry, caplog) -> None:
    add(1, "approve")
    with get_client(sync_client=True) as client:
        delete_promote_auto(client)
    state = reconcile(ReconcileParameters(registry=str(registry)), return_state=True)
    assert state.is_completed()
    assert "this server has no deployment promote/auto" in caplog.text
