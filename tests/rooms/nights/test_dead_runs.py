"""Runs without a process are ended; those that are heard of, waiting or ended are left alone."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import State, StateType
from prefect.events.actions import DoNothing
from prefect.events.schemas.automations import AutomationCore, EventTrigger, Posture
from prefect.states import Cancelling, Completed, Crashed, Paused, Pending, Running, Scheduled

from flows.finetune import finetune
from flows.process.environment import packaged_folder
from flows.rooms.nights import run_list
from flows.rooms.nights.run_list import end_dead_runs, resume_forgotten_runs

pytestmark = pytest.mark.usefixtures("prefect_server")
SILENCE = 20.0  # seconds, in place of 300
SECONDS_UNTIL_AN_EVENT_IS_KEPT = 10.0  # the server writes them every 5


def heartbeat(client: SyncPrefectClient, run: UUID, ago: timedelta) -> None:
    event = {
        "id": str(uuid4()),
        "event": "prefect.flow-run.heartbeat",
        "occurred": (datetime.now(UTC) - ago).isoformat(),
        "resource": {"prefect.resource.id": f"prefect.flow-run.{run}"},
    }
    client.request("POST", "/events", json=[event]).raise_for_status()


def run_in(
    client: SyncPrefectClient, state: State[Any], *, tag: str = "nested-tune", run_name: str
) -> UUID:
    """A run that is in this state by what the server says, and has sent a heartbeat before."""
    run = client.create_flow_run(finetune, name=run_name, tags=[tag])
    heartbeat(client, run.id, timedelta(hours=1))
    client.set_flow_run_state(run.id, state, force=True)
    return run.id


def clock_with(sleep: Callable[[float], None]) -> SimpleNamespace:
    """In place of `time` in the module alone: other threads sleep as before."""
    return SimpleNamespace(monotonic=time.monotonic, sleep=sleep)


def end_them() -> list[str]:
    @flow(name="looks for dead runs")
    def look() -> list[str]:
        return end_dead_runs(SILENCE)

    return look()


@pytest.mark.slow("it waits for a heartbeat to be kept, and then for silence: 40 seconds")
def test_what_is_silent_is_ended_by_its_state_and_all_else_is_left_alone(monkeypatch) -> None:
    states: dict[str, State[Any]] = {
        "at work": Running(),
        "pending": Pending(),
        "cancelled": Cancelling(),
        "asks a person": Paused(),
        "waits": Scheduled(scheduled_time=datetime.now(UTC) + timedelta(days=1)),
        "ended": Completed(),
    }
    with get_client(sync_client=True) as client:
        ids = {name: run_in(client, state, run_name=name) for name, state in states.items()}
        ids["of others"] = run_in(client, Running(), tag="others", run_name="of others")
        ids["heard"] = run_in(client, Running(), run_name="heard")
        ids["heard again"] = run_in(client, Running(), run_name="heard again")
        time.sleep(SILENCE - SECONDS_UNTIL_AN_EVENT_IS_KEPT)
        heartbeat(client, ids["heard"], timedelta(0))
        time.sleep(SECONDS_UNTIL_AN_EVENT_IS_KEPT)

        def meanwhile(seconds: float) -> None:
            again: State[Any] = Running()
            for name in ("heard", "heard again"):
                client.set_flow_run_state(ids[name], again, force=True)
            time.sleep(seconds)

        monkeypatch.setattr(run_list, "time", clock_with(meanwhile))
        ended = sorted(end_them())
        monkeypatch.undo()
        runs = {name: client.read_flow_run(run) for name, run in ids.items()}
        for run in ids.values():
            client.set_flow_run_state(run, Completed(), force=True)
    assert ended == ["at work", "cancelled", "pending"]
    assert {name: run.state_name for name, run in runs.items()} == {
        "at work": "Crashed",
        "pending": "Crashed",
        "cancelled": "Cancelled",
        "asks a person": "Paused",
        "waits": "Scheduled",
        "ended": "Completed",
        "of others": "Running",
        "heard": "Running",
        "heard again": "Running",
    }
    assert "its process is gone" in str(runs["at work"].state)


def test_where_all_were_heard_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(seconds: float) -> None:
        raise AssertionError(seconds)

    with get_client(sync_client=True) as client:  # what other tests have left at work
        for run in client.read_flow_runs():
            if run.state is not None and not run.state.is_final():
                client.set_flow_run_state(run.id, Completed(), force=True)
    monkeypatch.setattr(run_list, "time", clock_with(refuse))
    assert end_them() == []


def test_the_automation_that_it_waits_for_is_the_one_that_deploy_puts_on_the_server() -> None:
    text = (packaged_folder("deployments") / "automations.yaml").read_text()
    assert f'- name: "{run_list.RESUME_AUTOMATION}"' in text


def resume_them(after: float = 0.0) -> list[str]:
    @flow(name="looks for forgotten runs")
    def look() -> list[str]:
        return resume_forgotten_runs(after)

    return look()


@pytest.mark.slow("several flow runs, and waits for the server")
def test_a_first_crash_that_the_server_forgot_is_resumed_once_unless_the_automation_is_paused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own_name = str(uuid4())  # other tests leave the deployed one on the server
    monkeypatch.setattr(run_list, "RESUME_AUTOMATION", own_name)
    with get_client(sync_client=True) as client:
        deployment = client.create_deployment(
            client.create_flow(finetune),
            name=str(uuid4()),
            tags=["nested-tune"],
            enforce_parameter_schema=False,
        )
        runs = {
            name: client.create_flow_run_from_deployment(deployment, name=name).id
            for name in ("crashed", "never began", "ended")
        }
        runs["by hand"] = client.create_flow_run(finetune, name="by hand", tags=["nested-tune"]).id
        begun: list[State[Any]] = [Pending(), Running()]
        for name, run in runs.items():
            end: State[Any] = Completed() if name == "ended" else Crashed()
            for state in [*(begun if name != "never began" else []), end]:
                client.set_flow_run_state(run, state)
        trigger = EventTrigger(
            expect={"nothing.of.this.name"}, posture=Posture.Reactive, threshold=1
        )
        made = client.create_automation(
            AutomationCore(name=own_name, trigger=trigger, actions=[DoNothing()])
        )
        try:
            client.pause_automation(made)
            assert resume_them() == []
            client.resume_automation(made)
            assert resume_them(after=3600.0) == [], "the automation has its time first"
            assert resume_them() == ["crashed"]
            resumed = client.read_flow_run(runs["crashed"])
            assert (resumed.state_name, resumed.state_type) == ("Scheduled", StateType.SCHEDULED)
            for then in [*begun, Crashed()]:
                client.set_flow_run_state(runs["crashed"], then)
            assert resume_them() == [], "the second time"
        finally:
            client.delete_automation(made)
            for run in runs.values():
                client.set_flow_run_state(run, Completed(), force=True)
