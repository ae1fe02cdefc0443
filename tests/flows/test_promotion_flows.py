"""promote (by policy, or suspended until a person answers), rollback and reconcile, on a server."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
)
from prefect.client.schemas.objects import FlowRun, State
from prefect.client.schemas.sorting import ArtifactSort
from prefect.exceptions import ObjectNotFound, Pause
from prefect.flow_engine import run_flow
from prefect.flow_runs import resume_flow_run
from prefect.states import Cancelled, Completed, Crashed, Failed

from flows.flow_runs.approvals import request_approval
from flows.promote import PromoteParameters, promote
from flows.reconcile import ReconcileParameters, reconcile
from flows.rollback import RollbackParameters, rollback
from nested_core import registry as core
from nested_core.registry.history_views import NameFolder
from tasks import promote as promotion_tasks
from tasks.artifact_client import artifact_key
from tests.core.registry.conftest import write_run
from tests.flows.conftest import task_runs

pytestmark = pytest.mark.usefixtures("prefect_server")
NAME = "capitals"
Add = Callable[..., str]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(tmp_path))  # for the runs of deployments
    return tmp_path / "registry"


@pytest.fixture
def add(tmp_path: Path, registry: Path) -> Add:
    """Register the version of a seed under a policy, judged against the champion of now."""

    def add(seed: int, policy: str = "always") -> str:
        run = write_run(tmp_path / f"run-{seed}", seed)
        is_first = NAME not in core.list_names(registry)
        champion = None if is_first else core.read_champion(registry, NAME)
        section = {"path": "x", "name": "y", "promote": policy}
        provenance = {"champion_at_gate": champion, "config": {"registry": section}}
        return core.register(run, registry, NAME, provenance)

    return add


def parameters(registry: Path, version: str, **changes: Any) -> PromoteParameters:
    given = {"registry": str(registry), "name": NAME, "version": version}
    return PromoteParameters(**given | changes)


def test_promote_promotes_by_the_recorded_policy_and_again_changes_nothing(
    add: Add, registry: Path
) -> None:
    given = parameters(registry, add(1))
    for expected in ("promoted", "already_champion"):
        state = promote(given, return_state=True)
        assert (state.is_completed(), state.message) == (True, expected)
    assert len(core.history(registry, NAME)) == 1


def test_the_page_of_a_champion_says_when_it_became_champion_and_not_that_it_still_is(
    add: Add, registry: Path
) -> None:
    version = add(1)
    promote(parameters(registry, version))
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[artifact_key(NAME, "champion")]))
    newest = ArtifactSort.UPDATED_DESC
    with get_client(sync_client=True) as client:
        (page,) = client.read_artifacts(artifact_filter=wanted, sort=newest, limit=1)
    since = core.history(registry, NAME)[-1]["time"][:16].replace("T", " ")
    assert str(page.description).startswith(f"{version[:12]}: ")
    assert str(page.description).endswith(f". Became champion at {since} UTC")


def test_a_late_event_completes_as_superseded(add: Add, registry: Path) -> None:
    first, second = add(1), add(2)
    core.promote(registry, NAME, second, by="ann")
    state = promote(parameters(registry, first), return_state=True)
    assert (state.is_completed(), state.message) == (True, "superseded")


def deployed_run(given: PromoteParameters) -> UUID:
    """A flow run of a deployment of `promote`: only those can be suspended."""
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow(promote)
        deployment_id = client.create_deployment(flow_id=flow_id, name=str(uuid4()))
        values = {"config": given.model_dump(mode="json")}
        return client.create_flow_run_from_deployment(deployment_id, parameters=values).id


def execute(run_id: UUID) -> State[Any]:
    """What a worker's process does with a flow run: run the flow from its top."""
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(run_id)
        values = flow_run.parameters
        with suppress(Pause):  # ends the process, until the run is resumed
            run_flow(promote, flow_run=flow_run, parameters=values, return_type="state")
        state = client.read_flow_run(run_id).state
    assert state is not None
    return state


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
    core.promote(registry, NAME, champion, by="ann")
    version = add(2, "approve")
    run_id = deployed_run(parameters(registry, version))
    state = execute(run_id)
    assert (state.type.value, state.name) == ("PAUSED", "Waits for approval")
    assert core.read_champion(registry, NAME) == champion
    return run_id, version, champion


def test_a_person_is_asked_with_both_losses_and_short_versions(
    waiting: tuple[UUID, str, str],
) -> None:
    run_id, version, champion = waiting
    page = approval_page(run_id).replace("\\", "")
    assert f"# Make {version[:12]} the champion of {NAME}?" in page
    assert f"**Candidate**: {version[:12]}: validation loss 4.1 -> 1.2 (" in page
    assert f"**Champion**: {champion[:12]}: validation loss 4.1 -> 1.2 (" in page
    assert "ASKED AGAIN" not in page


def test_approved_by_a_person_a_version_is_promoted_in_that_persons_name(
    waiting: tuple[UUID, str, str], registry: Path
) -> None:
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


def test_the_state_of_a_question_has_the_figures(waiting: tuple[UUID, str, str]) -> None:
    run_id, version, champion = waiting
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(run_id).state
    message = "" if state is None else str(state.message)
    assert message.startswith(f"Candidate: {version[:12]}: validation loss 4.1 -> 1.2 (")
    assert f"Champion: {champion[:12]}: validation loss 4.1 -> 1.2 (" in message
    assert "Compared: not possible: the two were not measured on the same examples." in message


def make_night() -> UUID:
    """A fine-tune's flow run that has ended with a question."""
    asked: State[Any] = Completed(name="Waits for approval", message="verified 4e044e")
    with get_client(sync_client=True) as client:
        night = client.create_flow_run(promote, name="capitals, 20 Nov")
        client.set_flow_run_state(night.id, asked, force=True)
    return night.id


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
def test_a_newer_question_closes_the_older_one(
    waiting: tuple[UUID, str, str], add: Add, registry: Path
) -> None:
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
    core.promote(registry, NAME, other, by="bob")
    assert execute(run_id).name == "Waits for approval"
    why = f"ASKED AGAIN: the champion changed from {champion[:12]} to {other[:12]}"
    assert why in approval_page(run_id)
    answer(run_id, approve=True, by="ann")
    assert execute(run_id).message == "promoted, approved by ann"
    assert core.history(registry, NAME)[-1]["previous"] == other
    assert core.read_champion(registry, NAME) == version


@pytest.mark.slow("several flow runs, each with an approval")
def test_approval_can_be_required_whatever_the_policy(add: Add, registry: Path) -> None:
    run_id = deployed_run(parameters(registry, add(1), requires_approval=True))
    assert execute(run_id).name == "Waits for approval"
    answer(run_id, approve=True, by="ann")
    assert execute(run_id).message == "promoted, approved by ann"


def test_rollback_goes_back_and_automation_leaves_it_there(add: Add, registry: Path) -> None:
    first = add(1)
    core.promote(registry, NAME, first, by="ann")
    second = add(2)
    promote(parameters(registry, second))
    given = RollbackParameters(registry=str(registry), name=NAME, by="ann", reason="it was rude")
    state = rollback(given, return_state=True)
    told = f"rolled_back from {second[:12]} to {first[:12]} by ann: it was rude"
    assert state.message == told
    assert promote(parameters(registry, second), return_state=True).message == "superseded"
    reconcile(ReconcileParameters(registry=str(registry)))
    assert core.read_champion(registry, NAME) == first


@pytest.mark.slow("five flow runs")
def test_the_hour_after_a_rollback_at_the_command_line_is_called_by_it(
    add: Add, registry: Path
) -> None:
    first = add(1)
    promote(parameters(registry, first))
    promote(parameters(registry, add(2)))
    given = ReconcileParameters(registry=str(registry))
    reconcile(given)
    core.rollback(registry, NAME, by="ann", reason="it was rude")
    state = reconcile(given, return_state=True)
    assert state.name == "Saw a rollback"
    assert f"{NAME}: rolled back to {first[:12]} by ann: it was rude" in str(state.message)
    again = reconcile(given, return_state=True)
    assert (again.name, again.message) == ("Completed", "promoted: nothing")


def test_reconcile_promotes_what_an_event_got_lost_for_once(add: Add, registry: Path) -> None:
    version = add(1)
    given = ReconcileParameters(registry=str(registry))
    state = reconcile(given, return_state=True)
    assert state.message == f"promoted: {NAME}"
    assert core.read_champion(registry, NAME) == version
    assert reconcile(given, return_state=True).message == "promoted: nothing"
    assert tuple(task_runs(state, "reconcile")) == ("reconcile", "check-champion")


def test_reconcile_is_no_failure_before_the_first_version_of_an_adapter(
    add: Add, registry: Path
) -> None:
    add(1)
    given = ReconcileParameters(registry=str(registry), names=(NAME, "helpdesk"))
    state = reconcile(given, return_state=True)
    assert state.is_completed()
    assert state.message == f"promoted: {NAME}; nothing is registered yet as helpdesk"


def test_a_champion_that_is_damaged_is_red_within_the_hour(add: Add, registry: Path) -> None:
    version = add(1)
    given = ReconcileParameters(registry=str(registry), names=(NAME,))
    assert reconcile(given, return_state=True).message == f"promoted: {NAME}"
    weights = registry / NAME / "versions" / version / "adapters.safetensors"
    weights.chmod(0o644)
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    state = reconcile(given, return_state=True)
    assert (state.is_failed(), state.name) == (True, "Damaged")
    assert "adapters.safetensors: has changed since it was written" in str(state.message)
    assert "nested-tune forget" in str(state.message)


def test_an_adapter_whose_folder_is_gone_is_red(add: Add, registry: Path) -> None:
    add(1)
    given = ReconcileParameters(registry=str(registry), names=(NAME,))
    reconcile(given)
    registry.rename(registry.with_name("not mounted"))
    state = reconcile(given, return_state=True)
    assert (state.is_failed(), state.name) == (True, "Damaged")
    assert f"{registry / NAME} is gone, and it had a champion" in str(state.message)


def test_a_rollback_by_parameters_goes_to_former_champions_alone(add: Add, registry: Path) -> None:
    first, second, never = add(1), add(2), add(3)
    for version in (first, second):
        core.promote(registry, NAME, version, by="ann")
    given = RollbackParameters(registry=str(registry), name=NAME, by="eve", to=never)
    state = rollback(given, return_state=True)
    assert state.is_failed()
    assert "was never champion of capitals" in str(state.message)
    assert core.read_champion(registry, NAME) == second


def test_a_line_of_the_history_has_the_flow_run(add: Add, registry: Path) -> None:
    version = add(1)
    state = promote(parameters(registry, version), return_state=True)
    line = core.history(registry, NAME)[-1]
    assert line["flow_run"] == str(state.state_details.flow_run_id)


@pytest.mark.slow("a flow run that tries twice")
def test_a_try_after_a_late_error_says_what_the_first_one_did(
    add: Add, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The link has moved, and forcing that onto the disk fails: the second try tells it once."""
    first, second = add(1), add(2)
    core.promote(registry, NAME, first, by="ann")
    core.promote(registry, NAME, second, by="ann")
    move_link = NameFolder._move_link
    failures = [OSError(errno.EIO, "I/O error")]

    def fail_late(*arguments: Any, **options: Any) -> None:
        move_link(*arguments, **options)
        if failures:
            raise failures.pop()

    monkeypatch.setattr(NameFolder, "_move_link", fail_late)
    told: list[str] = []
    monkeypatch.setattr(
        promotion_tasks,
        "announce_changes",
        lambda path, name: told.append(core.history(path, name)[-1]["action"]),
    )
    given = RollbackParameters(registry=str(registry), name=NAME, by="ann")
    state = rollback(given, return_state=True)
    assert state.name == "Rolled back"
    assert core.read_champion(registry, NAME) == first
    assert told == ["rollback"]


def test_reconcile_goes_through_all_and_fails_naming_what_is_damaged(
    add: Add, registry: Path, tmp_path: Path
) -> None:
    version, damaged = add(1), add(2)
    (registry / NAME / "versions" / damaged / "gate.json").unlink()
    other = core.register(tmp_path / "run-1", registry, "aaa", {})
    core.promote(registry, "aaa", other, by="ann")
    (registry / "aaa" / "history.jsonl").write_text("no history\n")
    state = reconcile(ReconcileParameters(registry=str(registry)), return_state=True)
    assert state.is_failed()
    assert "aaa: " in str(state.message)
    assert f"{NAME} {damaged[:12]}: damaged: " in str(state.message)
    assert core.read_champion(registry, NAME) == version


def test_a_deployments_run_does_not_touch_a_registry_outside_of_the_allowed_folders(
    add: Add, registry: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = add(1)
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(tmp_path / "elsewhere"))
    linked = tmp_path / "elsewhere" / "registry"
    linked.parent.mkdir()
    linked.symlink_to(registry)
    for path in (registry, linked):
        state = execute(deployed_run(parameters(path, version)))
        assert state.is_failed()
        assert "outside of the folders that this worker may use" in str(state.message)
    assert core.read_champion(registry, NAME) is None


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


def test_a_server_without_promote_auto_is_said_and_fails_nothing(
    add: Add, registry: Path, caplog: pytest.LogCaptureFixture
) -> None:
    add(1, "approve")
    with get_client(sync_client=True) as client:
        delete_promote_auto(client)
    state = reconcile(ReconcileParameters(registry=str(registry)), return_state=True)
    assert state.is_completed()
    assert "this server has no deployment promote/auto" in caplog.text
