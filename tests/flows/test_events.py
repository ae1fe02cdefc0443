"""What whoever listens hears of an adapter: verified, rejected, and each change of its history."""

from __future__ import annotations

import json
import re
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.commands import prefect_notice
from flows.finetune import FinetuneParameters, finetune
from flows.reconcile import ReconcileParameters, reconcile
from flows.rollback import RollbackParameters, rollback
from nested_core import registry as core
from nested_core.process.current_user import current_user
from nested_core.registry import ledger
from nested_core.registry.link_and_views import writing
from nested_core.registry.policy import set_policy
from tasks.events import MAX_EVENTS, send_missing_events
from tasks.prefect_server import read_events
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.example import example_settings
from tests.flows.conftest import Ended, called, naming
from tests.left_out import needs_rooms
from tests.waiting import SECONDS

pytestmark = pytest.mark.usefixtures("deployed")


@pytest.fixture
def deployed(prefect_server: None, tmp_path: Path, new_name: str) -> Iterator[None]:
    """A deployment of the server names the test's registry for the test's adapter."""
    with naming(tmp_path / "registry", new_name):
        yield


def events_of(name: str, count: int) -> list[tuple[str, dict[str, Any]]]:
    """The events on `adapter.NAME`, oldest first; the server takes a while to list them."""
    wanted = {"resource": {"id": [f"adapter.{name}"]}, "event": {"prefix": ["adapter."]}}
    deadline = time.monotonic() + SECONDS
    while True:
        with get_client(sync_client=True) as client:
            answer = client.request("POST", "/events/filter", json={"filter": wanted})
        found = [(e["event"], e["payload"]) for e in answer.json()["events"]][::-1]
        if len(found) >= count or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def run_flow(folder: Path, name: str, promote: str, **changes: Any) -> Any:
    target = {"path": str(folder / "registry"), "name": name, "promote": promote}
    settings = {"iters": 4, "val_batches": 1, "registry": target, "run_dir": str(folder / "run")}
    values = example_settings(**settings | changes)
    return finetune(FinetuneParameters.model_validate(values), return_state=True)


@pytest.mark.slow("a flow run, and waits for its events")
def test_a_verified_and_promoted_adapter_is_announced_with_what_promote_needs(
    tmp_path: Path, new_name: str
) -> None:
    state = run_flow(tmp_path, new_name, "always")
    version = core.read_champion(tmp_path / "registry", new_name)
    assert version is not None
    said = rf"verified {version[:12]}: validation loss [0-9.]+ -> [0-9.]+ .+; promoted"
    assert re.fullmatch(said, str(state.message))
    assert events_of(new_name, 2) == [
        (
            "adapter.verified",
            {
                "version": version,
                "registry": str(tmp_path / "registry"),
                "run_dir": str(tmp_path / "run"),
            },
        ),
        ("adapter.promoted", {"version": version, "previous": None, "by": "policy"}),
    ]


@needs_rooms("approval")
@pytest.mark.slow("a flow that trains and judges a run of its own")
def test_a_version_that_waits_for_approval_is_verified_and_not_promoted(tmp_path, new_name) -> None:
    state = run_flow(tmp_path, new_name, "approve")
    (version,) = core.list_versions(tmp_path / "registry", new_name)
    assert state.is_completed()
    assert str(state.message).endswith(
        f"; waiting for approval of {version[:12]}: registry.promote is approve"
    )
    assert [event for event, _ in events_of(new_name, 1)] == ["adapter.verified"]
    assert core.read_champion(tmp_path / "registry", new_name) is None


@pytest.mark.slow("a flow run of its own")
def test_a_rejected_adapter_is_announced_with_the_reason(tmp_path: Path, new_name: str) -> None:
    gate = {"min_relative_change": 1e6}  # more than any training does
    state = run_flow(tmp_path, new_name, "always", gate=gate)
    assert state.is_failed()
    ((event, payload),) = events_of(new_name, 1)
    assert event == "adapter.rejected"
    assert payload["run_dir"] == str(tmp_path / "run")
    verdict = json.loads((tmp_path / "run" / "gate.json").read_bytes())
    assert verdict["reasons"][0]["code"] in payload["reason"]


def test_a_rollback_is_announced(tmp_path: Path, new_name: str) -> None:
    registry = tmp_path / "registry"
    versions = [
        register(write_run(tmp_path / str(seed), seed), registry, new_name, {}) for seed in (1, 2)
    ]
    for version in versions:
        promote(registry, new_name, version, by="ann")
    given = {"registry": str(registry), "name": new_name, "by": "bob", "reason": "it was rude"}
    rollback(RollbackParameters.model_validate(given))
    promoted = [
        ("adapter.promoted", {"version": version, "previous": previous, "by": "ann"})
        for version, previous in zip(versions, [None, *versions], strict=False)
    ]
    back = {"version": versions[0], "previous": versions[1], "by": "bob", "reason": "it was rude"}
    assert events_of(new_name, 3) == [*promoted, ("adapter.rolled_back", back)]


@pytest.fixture
def changed(tmp_path: Path, new_name: str) -> Path:
    """A registry with a champion and a version before it, changed where no server was told."""
    registry = tmp_path / "registry"
    for seed in (1, 2):
        run = write_run(tmp_path / str(seed), seed)
        version = register(run, registry, new_name, {})
        promote(registry, new_name, version, by="ann")
    return registry


def call_with_server(monkeypatch: pytest.MonkeyPatch, url: str, *arguments: object) -> Ended:
    """A command in an environment that names a server."""
    monkeypatch.setenv("PREFECT_API_URL", url)
    with temporary_settings({PREFECT_API_URL: url}):
        return called(*arguments, cwd=Path.cwd())


@needs_rooms("housekeeping", "policy")
@pytest.mark.slow("five commands with Prefect's server")
def test_commands_tell_the_server_what_they_changed_and_who_did_it(
    changed: Path, new_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(PREFECT_API_URL.value())
    place = ("--registry", changed)
    done = call_with_server(monkeypatch, url, "rollback", new_name, *place)
    assert (done.code, done.stderr) == (0, "")
    done = call_with_server(monkeypatch, url, "policy", new_name, *place, "--promote", "better")
    assert (done.code, done.stderr) == (0, "")
    lost = core.list_versions(changed, new_name)
    lost.remove(str(core.read_champion(changed, new_name)))
    (changed / new_name / "versions" / lost[0] / "gate.json").unlink()
    words = ("forget", new_name, lost[0], *place, "--by", "ann", "--reason", "a bad disk")
    assert call_with_server(monkeypatch, url, *words).code == 0
    found = events_of(new_name, 5)
    assert [event for event, _ in found[2:]] == [
        "adapter.rolled_back",
        "adapter.policy_changed",
        "adapter.forgotten",
    ]
    assert found[2][1]["by"] == current_user()
    assert found[4][1] == {"version": lost[0], "reason": "a bad disk", "by": "ann"} | {
        "previous": core.read_champion(changed, new_name)
    }


@pytest.mark.slow("three flow runs")
def test_reconcile_tells_once_what_no_server_was_told(changed, new_name, monkeypatch) -> None:
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(changed.parent))
    for _ in range(2):
        reconcile(ReconcileParameters(registry=str(changed)))
    core.rollback(changed, new_name, by="bob")
    reconcile(ReconcileParameters(registry=str(changed)))
    told = ["adapter.promoted", "adapter.promoted", "adapter.rolled_back"]
    assert [event for event, _ in events_of(new_name, 3)] == told


@needs_rooms("policy")
@needs_rooms("deploy")
@pytest.mark.slow("five changes, each waited for on the server")
def test_a_copy_of_a_registry_is_silent_until_a_deployment_names_it(
    changed: Path, new_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = str(PREFECT_API_URL.value())
    words = ("policy", new_name, "--registry", changed, "--promote", "better")
    assert call_with_server(monkeypatch, url, *words).stderr == ""
    told = ["adapter.promoted", "adapter.promoted", "adapter.policy_changed"]
    assert [event for event, _ in events_of(new_name, 3)] == told
    copy = Path(shutil.copytree(changed, changed.with_name("bak"), symlinks=True))
    back = ("rollback", new_name, "--registry", copy)
    done = call_with_server(monkeypatch, url, *back)
    assert (done.code, done.stdout.partition(":")[0]) == (0, "rolled_back")
    silence = f"got no event of {new_name}: none of its deployments names {copy} as its registry"
    assert silence in " ".join(done.stderr.split())
    set_policy(changed, new_name, by="ann", changes={"promote": "never"})
    reconcile(ReconcileParameters(registry=str(changed)))
    told.append("adapter.policy_changed")
    assert [event for event, _ in events_of(new_name, 4)] == told, "and no old line anew"
    with naming(copy, new_name):
        reconcile(ReconcileParameters(registry=str(copy)))
        told.insert(3, "adapter.rolled_back")  # by the time at which it was done
        assert [event for event, _ in events_of(new_name, 5)] == told, "what is new in it alone"


@pytest.mark.slow("hundreds of events")
def test_a_line_is_told_though_a_gc_has_written_many_after_it(
    changed: Path, new_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with writing(changed, new_name) as held:
        for number in range(MAX_EVENTS + 1):
            held.record("collected", f"{number:064x}", "gc")
    with get_client(sync_client=True) as client:
        assert send_missing_events(client, changed, new_name) is None
    assert [event for event, _ in events_of(new_name, 2)] == ["adapter.promoted"] * 2


@pytest.mark.slow("waits for events on the server")
@pytest.mark.parametrize(("hours", "label"), [(1.9, {"nested-tune.news": "yes"}), (2.1, {})])
def test_a_change_of_hours_ago_is_told_and_is_no_news(
    tmp_path, new_name, monkeypatch, hours, label
) -> None:
    class Clock(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(UTC) - timedelta(hours=hours)

    registry = tmp_path / "registry"
    version = register(write_run(tmp_path / "1", 1), registry, new_name, {})
    with monkeypatch.context() as patch:
        patch.setattr(ledger, "datetime", Clock)
        promote(registry, new_name, version, by="ann")
    with get_client(sync_client=True) as client:
        send_missing_events(client, registry, new_name)
        assert len(events_of(new_name, 1)) == 1
        wanted = {"resource": {"id": [f"adapter.{new_name}"]}}
        (event,) = read_events(client, 2, **wanted)
    name = {"prefect.resource.id": f"adapter.{new_name}", "prefect.resource.name": new_name}
    assert event["resource"] == name | label


def test_a_server_that_is_away_fails_no_command(changed, new_name, monkeypatch) -> None:
    was_imported: list[bool] = []
    start = threading.Thread.start

    def start_noted(thread: threading.Thread) -> None:
        if thread.name == "tell-server":
            was_imported.append("tasks.events" in sys.modules)
        start(thread)

    with socket.socket() as silent:  # takes connections, and answers nothing
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setattr(prefect_notice, "SECONDS_TO_TELL", 0.3)
        monkeypatch.setattr(threading.Thread, "start", start_noted)
        monkeypatch.delitem(sys.modules, "tasks.events")
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/api"
        done = call_with_server(monkeypatch, url, "rollback", new_name, "--registry", changed)
    assert done.code == 0
    assert was_imported == [True]  # before: a process that ends within an import is aborted
    assert done.stdout.startswith("rolled_back: ")
    assert "note: Prefect's server got no event (no answer within 0.3 seconds)" in done.stderr
