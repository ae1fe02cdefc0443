"""What Prefect shows of servers: serving since, one that does not follow, a server's rollback."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import ArtifactSort
from prefect.exceptions import ObjectAlreadyExists
from prefect.settings import get_current_settings

from flows.commands import serving_news
from flows.commands.serving_news import NewsSender
from flows.deployment.deploy import put_automations, put_deployment
from flows.deployment.planned_deployments import make_plan
from flows.promote import PromoteParameters, promote
from flows.reconcile import ReconcileParameters, reconcile
from nested_core import registry as core
from nested_core.registry.serving_status import ServerStatus, ServingNews
from tasks import serving
from tasks.artifact_client import artifact_key
from tasks.events import send_missing_events
from tests.core.registry.conftest import write_run
from tests.core.registry.test_serving_status import SINCE, write_record
from tests.flows.conftest import naming
from tests.flows.test_events import events_of
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_server")
NAME = "capitals"  # the one of the records
Add = Callable[..., str]


@pytest.fixture
def registry(prefect_server: None, tmp_path: Path) -> Iterator[Path]:
    """The path of a registry, which a deployment of the server names."""
    with naming(tmp_path / "registry", NAME):
        yield tmp_path / "registry"


@pytest.fixture
def add(tmp_path: Path, registry: Path) -> Add:
    """Register the version of a seed, whose promotion waits for servers for a second."""

    def add(seed: int) -> str:
        run = write_run(tmp_path / f"run-{seed}", seed)
        champion = core.read_champion(registry, NAME) if core.list_names(registry) else None
        section = {"path": "x", "name": "y", "promote": "always", "await_serving": 1.0}
        provenance: dict[str, Any] = {"champion_at_gate": champion, "config": {"registry": section}}
        return core.register(run, registry, NAME, provenance)

    return add


def read_page() -> str:
    """The newest page of the champion, without the marks that keep text from being markup."""
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[artifact_key(NAME, "champion")]))
    newest = ArtifactSort.UPDATED_DESC
    with get_client(sync_client=True) as client:
        (page, *_) = client.read_artifacts(artifact_filter=wanted, sort=newest, limit=1)
    return str(page.data).replace("\\", "")


def told_of(happening: str) -> list[dict[str, Any]]:
    """What the events of one kind say."""
    return [said for event, said in events_of(NAME, 1) if event == f"adapter.{happening}"]


def run_promote(registry: Path, version: str) -> str:
    given = PromoteParameters(registry=str(registry), name=NAME, version=version)
    return str(promote(given, return_state=True).message)


def test_a_promotion_says_since_when_it_is_served_and_tells_of_who_does_not_follow(
    add: Add, registry: Path
) -> None:
    version = add(1)
    write_record(registry, version)
    assert run_promote(registry, version) == "promoted"
    assert f"serving since {SINCE}" in read_page()
    second = add(2)
    write_record(registry, version, refused={"version": second, "reason": "canary: it differs"})
    assert run_promote(registry, second) == "promoted"
    assert "canary: it differs" in read_page()
    wait_until(lambda: told_of("not_followed") != [], "the server lists it")
    told = told_of("not_followed")
    assert [each["version"] for each in told] == [second]
    assert "not served at http://127.0.0.1:1" in told[0]["message"]


@pytest.mark.slow("three flow runs")
def test_what_a_server_did_is_announced_once(
    add: Add, registry: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = add(1), add(2)
    for version in (first, second):
        core.promote(registry, NAME, version, by="ann")
    parameters = ReconcileParameters(registry=str(registry), stale_after_nights=None)
    reconcile(parameters)
    by, reason = "nested-tune serve host-1", "canary: the logits differ"
    core.rollback(registry, NAME, by=by, expected_champion=second, reason=reason)
    state = reconcile(parameters, return_state=True)
    assert f"rolled back to {first[:12]} by {by}: {reason}" in str(state.message)
    again = reconcile(parameters, return_state=True)
    assert "rolled back" not in str(again.message)
    wait_until(lambda: told_of("rolled_back") != [], "the server lists it")
    said = {"version": first, "previous": second, "reason": reason, "by": by}
    assert [each for each in told_of("rolled_back") if each["by"] == by] == [said]
    write_record(registry, second)
    monkeypatch.setattr(serving, "TIME_TO_FOLLOW", -serving.TIME_TO_FOLLOW)
    late = reconcile(parameters, return_state=True)
    assert f"not served at http://127.0.0.1:1: {second[:12]} there" in str(late.message)
    write_record(registry, second, age=120)  # such as a server that was suspended
    late = reconcile(parameters, return_state=True)
    assert f"{second[:12]} there; nothing was heard of it since 20" in str(late.message)
    write_record(registry, second, age=4000)
    gone = reconcile(parameters, return_state=True)
    assert "not served" not in str(gone.message)


@pytest.mark.slow("starts processes that import Prefect")
def test_what_a_server_does_is_told_at_once_and_again_until_prefect_has_it(
    add: Add, registry: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = add(1), add(2)
    url = str(get_current_settings().api.url)
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")  # where nothing listens
    monkeypatch.setattr(serving_news, "SECONDS_BETWEEN_TRIES", 0.1)
    with NewsSender(registry) as sender:
        core.promote(registry, NAME, first, by="ann")
        sender.send(ServingNews(NAME, first, ServerStatus("http://here:1", first, SINCE)))
        wait_until(lambda: "Prefect's server got no event" in caplog.text, "it is logged")
        monkeypatch.setenv("PREFECT_API_URL", url)
        wait_until(lambda: told_by("http://here:1", "served") != [], "the server lists it")
        (served,) = told_by("http://here:1", "served")
        message = f"champion {first[:12]}: serving since {SINCE}, at http://here:1"
        assert served == {"version": first, "message": message}
        core.promote(registry, NAME, second, by="ann")
        by, reason = "nested-tune serve here-1", "canary: the logits differ"
        core.rollback(registry, NAME, by=by, expected_champion=second, reason=reason)
        status = ServerStatus("http://here:1", first, SINCE, reason)
        sender.send(ServingNews(NAME, second, status))
        wait_until(lambda: told_by("http://here:1", "not_followed") != [], "the server lists it")
        (refused,) = told_by("http://here:1", "not_followed")
        assert refused["version"] == second
        assert refused["message"] == (
            f"champion {second[:12]}: not served at http://here:1: {first[:12]} there; {reason}"
        )
        (back,) = [each for each in told_of("rolled_back") if each["by"] == by]
        assert (back["version"], back["previous"]) == (first, second)
        assert caplog.text.count("Prefect's server got no event") == 1


def told_by(address: str, happening: str) -> list[dict[str, Any]]:
    """What events about one server say."""
    return [each for each in told_of(happening) if address in each["message"]]


@pytest.mark.slow("waits for an automation")
def test_a_minute_after_a_change_that_servers_are_to_follow_reconcile_looks(
    add: Add, registry: Path
) -> None:
    first, second = add(1), add(2)
    plan = make_plan()
    (hourly,) = [each for each in plan.deployments if each.name.endswith("-hourly")]
    parameters = {"config": {"registry": str(registry), "names": [NAME]}}
    hourly = hourly.model_copy(update={"name": f"{NAME}-hourly", "parameters": parameters})
    looks = [each for each in plan.automations if each["name"].endswith("after a minute")]
    with get_client(sync_client=True) as client:
        with suppress(ObjectAlreadyExists):
            client.create_work_pool(WorkPoolCreate(name=hourly.work_pool.name))
        put_deployment(client, hourly, plan.pull)
        deployment = client.read_deployment_by_name(f"reconcile/{NAME}-hourly").id
        list(put_automations(client, looks, None))

        def change_champion() -> list[FlowRun]:
            """Change it once more, for the server hears of a new automation late; runs by it."""
            champion = core.read_champion(registry, NAME)
            core.promote(registry, NAME, second if champion == first else first, by="ann")
            send_missing_events(client, registry, NAME)
            wanted = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[deployment]))
            return client.read_flow_runs(flow_run_filter=wanted)

        try:
            for _ in range(3):
                assert change_champion() == []  # no server is to follow
            write_record(registry, first)
            wait_until(lambda: change_champion() != [], "a run is scheduled")
            run = change_champion()[-1]
        finally:
            for automation in client.read_automations():
                client.delete_automation(automation.id)
            client.delete_deployment(deployment)
    assert run.expected_start_time is not None
    waits = run.expected_start_time.timestamp() - time.time()
    assert 30 < waits <= 60
