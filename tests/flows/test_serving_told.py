"""What Prefect shows of servers: serving since, one that does not follow, a server's rollback."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterKey
from prefect.client.schemas.sorting import ArtifactSort

from flows.promote import PromoteParameters, promote
from flows.reconcile import ReconcileParameters, reconcile
from nested_core import registry as core
from tasks import serving
from tasks.artifact_client import artifact_key
from tests.core.registry.conftest import write_run
from tests.core.registry.test_serving_status import SINCE, write_record
from tests.flows.test_events import events_of
from tests.waiting import wait_until

pytestmark = pytest.mark.usefixtures("prefect_server")
NAME = "capitals"  # the one of the records
Add = Callable[..., str]


@pytest.fixture
def registry(tmp_path: Path) -> Path:
    return tmp_path / "registry"


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
