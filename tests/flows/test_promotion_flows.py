"""promote by policy, rollback and reconcile, on a server."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort
from prefect.flow_engine import run_flow
from prefect.states import Scheduled

from flows.promote import promote
from flows.reconcile import ReconcileParameters, reconcile
from flows.rollback import RollbackParameters, rollback
from nested_core import registry as core
from nested_core.registry.link_and_views import NameFolder
from tasks import promote as promotion_tasks
from tasks.artifact_client import artifact_key
from tests.builders import registering
from tests.flows.conftest import task_runs
from tests.flows.promotions import NAME, deployed_run, execute, parameters, register_judged
from tests.left_out import needs_rooms

pytestmark = [
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.slow("runs flows on Prefect's server"),
]
Add = Callable[..., str]


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(tmp_path))  # for the runs of deployments
    return tmp_path / "registry"


@pytest.fixture
def add(tmp_path: Path, registry: Path) -> Add:
    return partial(register_judged, tmp_path, registry)


def test_promote_promotes_by_the_recorded_policy_and_again_changes_nothing(add, registry) -> None:
    given = parameters(registry, add(1))
    for expected in ("promoted", "already_champion"):
        state = promote(given, return_state=True)
        assert (state.is_completed(), state.message) == (True, expected)
    assert len(core.history(registry, NAME)) == 1


@pytest.mark.slow("another flow run")
@needs_rooms("nights")
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
    registering.promote(registry, NAME, second, by="ann")
    state = promote(parameters(registry, first), return_state=True)
    assert (state.is_completed(), state.message) == (True, "superseded")


def test_rollback_goes_back_and_automation_leaves_it_there(add: Add, registry: Path) -> None:
    first = add(1)
    registering.promote(registry, NAME, first, by="ann")
    second = add(2)
    promote(parameters(registry, second))
    given = RollbackParameters(registry=str(registry), name=NAME, by="ann", reason="it was rude")
    state = rollback(given, return_state=True)
    told = f"rolled_back from {second[:12]} to {first[:12]} by ann: it was rude"
    assert state.message == told
    assert promote(parameters(registry, second), return_state=True).message == "superseded"
    reconcile(ReconcileParameters(registry=str(registry)))
    assert core.read_champion(registry, NAME) == first


@needs_rooms("nights")
@pytest.mark.slow("five flow runs")
def test_the_hour_after_a_rollback_at_the_command_line_is_called_by_it(add, registry) -> None:
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


@pytest.mark.slow("another flow run")
def test_reconcile_is_no_failure_before_the_first_version_of_an_adapter(add, registry) -> None:
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


@pytest.mark.slow("another flow run")
@needs_rooms("nights")
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
        registering.promote(registry, NAME, version, by="ann")
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


@pytest.mark.slow("two flow runs")
@pytest.mark.parametrize(
    ("flow", "expected"), [(rollback, ("Rolled back", 1)), (promote, ("Promoted", 0))]
)
def test_a_flow_run_that_died_after_its_change_and_is_retried_has_done_it(
    add: Add, registry: Path, monkeypatch: pytest.MonkeyPatch, flow: Any, expected: tuple[str, int]
) -> None:
    versions = [add(seed) for seed in range(3 if flow is rollback else 1)]
    config = {"registry": str(registry), "name": NAME}
    config |= {"by": "ann"} if flow is rollback else {"version": versions[0]}
    for version in versions if flow is rollback else ():
        registering.promote(registry, NAME, version, by="ann")
    with get_client(sync_client=True) as client:
        run = client.create_flow_run(flow, parameters={"config": config})
        with monkeypatch.context() as patched:
            patched.setattr(promotion_tasks, "announce_changes", lambda *_: sys.exit(1))
            with pytest.raises(SystemExit):
                run_flow(flow, flow_run=run, parameters={"config": config}, return_type="state")
        client.set_flow_run_state(run.id, Scheduled(name="AwaitingRetry"), force=True)
        run = client.read_flow_run(run.id)
    state: Any = run_flow(flow, flow_run=run, parameters={"config": config}, return_type="state")
    assert (state.name, versions.index(str(core.read_champion(registry, NAME)))) == expected


@pytest.mark.slow("a flow run that tries twice")
def test_a_try_after_a_late_error_says_what_the_first_one_did(add, registry, monkeypatch) -> None:
    """The link has moved, and forcing that onto the disk fails: the second try tells it once."""
    first, second = add(1), add(2)
    registering.promote(registry, NAME, first, by="ann")
    registering.promote(registry, NAME, second, by="ann")
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
    other = registering.register(tmp_path / "run-1", registry, "aaa", {})
    registering.promote(registry, "aaa", other, by="ann")
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
