"""Alerts as the shipped automations send them: by a real server, to a webhook on this machine."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import pytest
from prefect import flow, tags
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import StateType
from prefect.events.worker import EventsWorker
from prefect.states import Completed, Running, Scheduled, State

from flows.reconcile import ReconcileParameters, reconcile
from flows.rollback import RollbackParameters, rollback
from flows.rooms.deploy.alerts import (
    alert_block,
    find_or_make_block,
    put_automations,
    send_test_alert,
)
from flows.rooms.deploy.planned_deployments import make_plan
from flows.rooms.deploy.server_checks import check_alerts
from flows.rooms.nights import warning_events
from flows.rooms.nights.warning_events import describe_full_disk, measure_newest_checkpoint
from nested_core import registry as core
from nested_core.config.sections import RegistrySection
from nested_core.errors import ConfigError, NestedTuneError
from tests.builders.file_damage import flip_a_bit
from tests.builders.registering import promote, register, register_and_promote
from tests.core.registry.conftest import write_run
from tests.flows.conftest import naming
from tests.runs import judged_night
from tests.waiting import wait_until
from tests.webhook_server import SECRET_PATH, WebhookServer, serving_webhook

pytestmark = pytest.mark.slow("a server, and runs that end in each way")

NAME = "support-bot"
ALERTS = [planned for planned in make_plan().automations if "notify" in planned]
NAMES = [planned["name"] for planned in ALERTS]
RESUME = "nested-tune: resume what crashed"
SECONDS_BETWEEN_PROBES = 0.5


@pytest.fixture(scope="module")
def client(prefect_server: None) -> Iterator[SyncPrefectClient]:
    """A client of the tests' server, whose alerts are removed at the end."""
    with get_client(sync_client=True) as made:
        yield made
        for automation in made.read_automations():
            made.delete_automation(automation.id)


@pytest.fixture(scope="module")
def webhook() -> Iterator[WebhookServer]:
    with serving_webhook() as server:
        yield server


@pytest.fixture(scope="module")
def alerting(client: SyncPrefectClient, webhook: WebhookServer) -> WebhookServer:
    """The webhook, to which all alerts go."""
    send_alerts_to(client, webhook)
    return webhook


@pytest.fixture
def told(alerting: WebhookServer) -> list[str]:
    """The texts that come."""
    alerting.status = 200
    alerting.texts.clear()
    return alerting.texts


def send_alerts_to(client: SyncPrefectClient, webhook: WebhookServer) -> None:
    """Put the automations, and wait until the last of them is told.

    The server's triggers hear of changes in their order. What is sent before they have heard is
    lost, so it is sent again and again.
    """
    list(put_automations(client, ALERTS, find_or_make_block(client, webhook.url)))

    def is_told() -> bool:
        report_failed_automation(client, RESUME, webhook.probe)
        return webhook.was_probed.wait(SECONDS_BETWEEN_PROBES)

    webhook.was_probed.clear()
    wait_until(is_told, "an alert")


def report_failed_automation(client: SyncPrefectClient, name: str, reason: str) -> None:
    """Send the event by which the server says that an automation's action failed."""
    resource = {"prefect.resource.id": "prefect.automation.1", "prefect.resource.name": name}
    event = {"event": "prefect.automation.action.failed", "resource": resource}
    event |= {"occurred": datetime.now(UTC).isoformat(), "id": str(uuid4())}
    event |= {"payload": {"reason": reason}}
    client.request("POST", "/events", json=[event]).raise_for_status()


@flow(name="night")
def night() -> None:
    """A flow to have runs of; it is never run."""


def end_run(client: SyncPrefectClient, name: str, state: State[Any], *tags: str) -> None:
    """Have a run of this name end in a state, as the process of a flow would."""
    run = client.create_flow_run(night, name=name, tags=["nested-tune", *tags])
    client.set_flow_run_state(run.id, state, force=True)


def wait_for_text(texts: list[str], words: str) -> str:
    """The one text with these words, once it has come; a busy server may send the same again."""
    wait_until(lambda: any(words in text for text in texts), lambda: f"{words!r} in one of {texts}")
    (text,) = {text for text in texts if words in text}
    return text


def test_runs_that_failed_crashed_or_are_late_are_told_by_type_whatever_their_state_is_called(
    client: SyncPrefectClient, told: list[str]
) -> None:
    rejected = State(type=StateType.FAILED, name="Rejected: worse", message="loss 0.02 -> 0.03")
    crashed = State(type=StateType.CRASHED, name="Crashed", message='exited with code -9 "q"')
    end_run(client, "one, 21 Nov", rejected)
    end_run(client, "two, 21 Nov", crashed)
    end_run(client, "three, 21 Nov", State(type=StateType.SCHEDULED, name="Late"))
    assert "Rejected: worse: one, 21 Nov\nloss 0.02 -> 0.03" in wait_for_text(told, "one,")
    crash = wait_for_text(told, "two,")
    assert (
        'Crashed: two, 21 Nov\nexited with code -9 "q" This run does not resume by itself' in crash
    )
    assert "Late: three, 21 Nov\nIt was to begin at 20" in wait_for_text(told, "three,")


@pytest.mark.slow("flow runs, and an alert of their end")
def test_who_was_told_of_a_crash_is_told_once_that_the_run_went_on_and_ended(client, told) -> None:
    once, run = (
        client.create_flow_run(night.with_options(name="finetune"), name=f"{name}, 21 Nov")
        for name in ("uninterrupted", "resumed")
    )
    client.set_flow_run_state(once.id, Running(), force=True)
    client.set_flow_run_state(once.id, Completed(name="Promoted"), force=True)
    waits: State[Any] = Completed(
        name="Waits for approval", message="begun 2 times, last from step-0000150"
    )
    for state in (Running(), Scheduled(), Running(), waits, Completed(name="Approved")):
        client.set_flow_run_state(run.id, state, force=True)
    end_run(client, "after both", State(type=StateType.FAILED, name="Failed"))
    wait_for_text(told, "after both")
    assert wait_for_text(told, "resumed, 21 Nov").startswith(
        "Resumed, Waits for approval: resumed, 21 Nov\nbegun 2 times, last from step-0000150"
    )
    assert not any("uninterrupted" in text for text in told)


def test_a_crash_that_is_reported_twice_is_told_once(client, told) -> None:
    run = client.create_flow_run(night, name="once, 21 Nov", tags=["nested-tune"])
    client.set_flow_run_state(run.id, Running(), force=True)
    for message in ("by the worker", "by the server"):
        crashed = State(type=StateType.CRASHED, name="Crashed", message=message)
        client.set_flow_run_state(run.id, crashed, force=True)
    end_run(client, "after it", State(type=StateType.FAILED, name="Failed"))
    wait_for_text(told, "after it")
    text = wait_for_text(told, "once, 21 Nov")
    does_not = "This run does not resume by itself"  # for it is of no deployment
    assert text.startswith(f"Crashed: once, 21 Nov\nby the worker {does_not}")
    assert not any("by the server" in text for text in told)


def test_a_fine_tune_of_a_deployment_is_told_to_resume_by_itself_once(client, told) -> None:
    flow_id = client.create_flow_from_name("finetune")
    deployment = client.create_deployment(flow_id=flow_id, name="bot-nightly", tags=["nested-tune"])
    run = client.create_flow_run_from_deployment(deployment, name="bot, 21 Nov")
    for number in (1, 2):
        client.set_flow_run_state(run.id, Running(), force=True)
        crashed = State(type=StateType.CRASHED, name="Crashed", message=f"crash {number}.")
        client.set_flow_run_state(run.id, crashed, force=True)
    assert "crash 1. This run resumes by itself within a minute." in wait_for_text(told, "crash 1")
    second = wait_for_text(told, "crash 2")
    assert "crash 2. This run does not resume by itself: press Retry." in second


def test_where_all_is_well_there_is_silence(client, told, tmp_path) -> None:
    names = ("Promoted", "Verified", "Kept the champion", "Skipped: hopeless", "Waits for approval")
    for name in names:
        end_run(client, name, Completed(name=name, message="val loss 0.02"))
    cancelled = State(type=StateType.CANCELLED, name="Cancelled", message="by a person")
    end_run(client, "cancelled", cancelled)
    registry = tmp_path / "registry"
    register(write_run(tmp_path / "run", 1), registry, NAME, {"config": {}})
    (version,) = core.list_versions(registry, NAME)
    promote(registry, NAME, version, by="test", expected_champion=None)
    warning_events.warn_of_old_champions(registry, [NAME], nights=3)
    EventsWorker.drain_all()
    end_run(client, "the last", State(type=StateType.FAILED, name="Failed"))
    wait_for_text(told, "the last")
    told_of = [text for text in told if any(name in text for name in (*names, "cancelled", NAME))]
    assert told_of == []


@pytest.mark.slow("flow runs of its own")
def test_a_rollback_an_old_champion_and_a_full_disk_are_told(
    client: SyncPrefectClient, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # on one disk with the registry
    registry, champion = tmp_path / "registry", None
    for seed in (1, 2):
        run = write_run(tmp_path / f"run-{seed}", seed)
        version = register(run, registry, NAME, {"config": {}})
        promote(registry, NAME, version, by="test", expected_champion=champion)
        before, champion = champion, version
    with naming(registry, NAME):
        rollback(RollbackParameters(registry=str(registry), name=NAME, by="bob", reason="rude"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: (100 * 10**9, 97 * 10**9, 3 * 10**9))
    reconcile(ReconcileParameters(registry=str(registry), stale_after_nights=1e-9))
    EventsWorker.drain_all()
    back = wait_for_text(told, "Rolled back")
    assert back.startswith(
        f"Rolled back: {NAME}\nThe champion is {str(before)[:12]} again, by bob;"
    )
    assert f'it was {str(champion)[:12]}. Reason: "rude". `nested-tune history` has' in back
    assert f"{NAME} has had no new champion since" in wait_for_text(told, "Old champion")
    full = wait_for_text(told, "Disk nearly full")
    assert "3.0 GB of 100.0 GB are free (3%)" in full


@pytest.mark.slow("flow runs of its own")
def test_a_night_unlike_the_last_ones_is_told_and_an_ordinary_one_is_not(
    client: SyncPrefectClient, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    runs = Path("runs")
    for name, tonight in (("ordinary", 0.05), ("planted", 0.2)):
        section = RegistrySection(path=str(tmp_path / "registry"), name=name)
        for day in range(1, 10):
            judged_night(runs, day, tmp_path / "registry", name, 0.01 * (day % 3 - 1))
        judged_night(runs, 20, tmp_path / "registry", name, 9.9)  # a later one
        judged_night(runs, 9, tmp_path / "registry", f"another than {name}".replace(" ", "-"), 9.9)
        run = judged_night(runs, 10, tmp_path / "registry", name, tonight)
        warning_events.warn_of_unusual_night(section, run)
    EventsWorker.drain_all()
    end_run(client, "after both nights", State(type=StateType.FAILED, name="Failed"))
    wait_for_text(told, "after both nights")
    (text,) = [text for text in told if "Unusual night" in text]
    assert text.startswith(
        "Unusual night: planted\nTonight's loss less the champion's is +0.2 nats/token. The median "
        "of the last 9 nights is +0, and more than 0.0741 from it is unusual. Compare"
    )


@pytest.mark.parametrize(
    ("difference", "last", "is_unusual"),
    [
        (0.009, [0.0] * 7, False),
        (0.011, [0.0] * 7, True),
        (-0.011, [0.0] * 7, True),
        (9.9, [0.0] * 6, False),
        (0.07, [-0.01, 0.0, 0.01] * 4, False),
        (0.08, [-0.01, 0.0, 0.01] * 4, True),
    ],
)
def test_a_night_is_unusual_beyond_five_deviations_and_a_hundredth_of_a_nat(
    difference: float, last: list[float], is_unusual: bool
) -> None:
    said = warning_events.describe_unusual_night(difference, last, "nats/token")
    assert (said is not None) is is_unusual


@pytest.mark.slow("two flow runs, and an alert of their end")
def test_a_damaged_champion_is_told_with_what_to_do(client, told, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(tmp_path))
    registry = tmp_path / "registry"
    register_and_promote(write_run(tmp_path / "run", 1), registry, NAME, {}, by="test")
    weights = registry / NAME / "champion" / "adapters.safetensors"
    flip_a_bit(weights)
    with tags("nested-tune"):
        for _ in range(2):
            state = reconcile(ReconcileParameters(registry=str(registry)), return_state=True)
    assert state.name == "Damaged"
    end_run(client, "after both hours", State(type=StateType.FAILED, name="Failed"))
    wait_for_text(told, "after both hours")
    (text,) = [text for text in told if "Damaged: " in text]
    assert "adapters.safetensors: has changed since it was written" in text
    assert "nested-tune forget" in text


def test_a_person_is_told_that_a_version_waits_with_the_figures_and_a_link(client, told) -> None:
    figures = "Candidate: 4e044e: loss 4.1 before training, 1.2 after."
    waits = State(type=StateType.PAUSED, name="Waits for approval", message=figures)
    end_run(client, "promote support-bot 4e044e", waits)
    text = wait_for_text(told, "Waits for approval: ")
    assert text.startswith(
        f"Waits for approval: promote support-bot 4e044e\n{figures} To answer yes"
    )
    (alert,) = [each for each in ALERTS if each["name"].endswith("a version waits for approval")]
    assert "flow_run|ui_url" in alert["notify"]["body"]  # this server has no pages to link to


@pytest.mark.slow("two flow runs, and alerts in the order of events")
def test_a_run_that_takes_far_longer_than_the_last_ones_is_told_once(
    client: SyncPrefectClient, told: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(tmp_path))
    monkeypatch.setattr(warning_events, "SHORTEST_LONG_RUN", timedelta(0))
    monkeypatch.setenv("NESTED_TUNE_LONG_RUN", "0")  # times the last ones: any run is long
    deployment = client.create_deployment(client.create_flow(night), name=str(uuid4()))
    for name, end in (("the last one", Completed()), ("the long one", None)):
        run = client.create_flow_run_from_deployment(deployment, name=name, tags=["nested-tune"])
        client.set_flow_run_state(run.id, Running(), force=True)
        if end is not None:
            client.set_flow_run_state(run.id, end, force=True)
    (tmp_path / "registry").mkdir()
    given = ReconcileParameters(registry=str(tmp_path / "registry"))
    states = [reconcile(given, return_state=True) for _ in range(2)]
    assert [state.name for state in states] == ["Saw a long run"] * 2
    assert "take far longer than the runs before them: the long one" in str(states[0].message)
    EventsWorker.drain_all()
    end_run(client, "after the long one", State(type=StateType.FAILED, name="Failed"))
    wait_for_text(told, "after the long one")
    (text,) = [text for text in told if "Runs long" in text]
    assert text.startswith("Runs long: the long one\nthe long one has been running for ")
    client.set_flow_run_state(run.id, Completed(), force=True)  # other tests look for long runs too


@pytest.mark.parametrize(
    ("seconds", "last", "is_long"),
    [(250, [60, 120], True), (230, [60, 120], False), (50, [10], False), (9999, [], False)],
)
def test_a_run_is_long_beyond_twice_the_longest_of_the_last_and_a_minute(
    seconds: int, last: list[int], is_long: bool
) -> None:
    times = [timedelta(seconds=each) for each in last]
    said = warning_events.describe_long_run("x", timedelta(seconds=seconds), times, 2.0)
    assert (said is not None) is is_long


def test_a_failed_automation_is_told_and_a_failed_alert_is_not_told_for_ever(
    client: SyncPrefectClient, told: list[str], webhook: WebhookServer
) -> None:
    for name in (RESUME, ALERTS[0]["name"]):
        report_failed_automation(client, name, "InvalidJinja")
    end_run(client, "after both", State(type=StateType.FAILED, name="Failed"))
    wait_for_text(told, "after both")
    assert "resume what crashed\nInvalidJinja" in wait_for_text(told, "An automation failed")


def test_one_test_alert_is_sent_on_demand_and_a_webhook_that_refuses_it_is_an_error(
    client: SyncPrefectClient, told: list[str], webhook: WebhookServer
) -> None:
    assert send_test_alert(client, NAMES) == "test alert: sent"
    assert "asked for it. All is well." in told[0]
    webhook.status = 404
    with pytest.raises(NestedTuneError, match="the webhook answered 404") as refused:
        send_test_alert(client, NAMES)
    assert SECRET_PATH not in str(refused.value)


def test_the_url_of_a_webhook_is_in_a_block_alone(client, told) -> None:
    automations = client.request("POST", "/automations/filter", json={}).text
    blocks = client.request("POST", "/block_documents/filter", json={}).text
    assert "nested-tune" in blocks
    assert SECRET_PATH not in automations + blocks


@pytest.mark.slow("puts alerts on a server twice")
def test_an_alert_that_a_person_removed_goes_where_the_others_go_when_it_is_deployed_again(
    client: SyncPrefectClient, alerting: WebhookServer
) -> None:
    (removed,) = client.read_automations_by_name(NAMES[0])
    client.delete_automation(removed.id)
    list(put_automations(client, ALERTS, None))
    (again,) = client.read_automations_by_name(NAMES[0])
    assert alert_block(again) == alert_block(removed) is not None


@pytest.mark.slow("puts all automations three times")
def test_without_a_block_deploy_and_doctor_say_that_nobody_is_told(client, told, webhook) -> None:
    again = list(put_automations(client, ALERTS, None))
    assert not any("NOBODY IS NOTIFIED" in line for line in again), "the block of before stays"
    assert check_alerts(client, ALERTS).ok
    for automation in client.read_automations():
        client.delete_automation(automation.id)
    assert "NOBODY IS NOTIFIED" in list(put_automations(client, ALERTS, None))[-1]
    assert not check_alerts(client, ALERTS).ok
    with pytest.raises(ConfigError, match="nobody is notified yet"):
        send_test_alert(client, NAMES)
    send_alerts_to(client, webhook)  # as the other tests of this module have it


@pytest.mark.parametrize(
    "notify", ["slack-webhook/nobody", "ftp://example.org/x", "https://", "https://[hooks/x"]
)
def test_a_block_or_url_that_cannot_be_used_is_refused(client, notify) -> None:
    with pytest.raises(ConfigError, match="--notify"):
        find_or_make_block(client, notify)


def test_a_url_that_lacks_its_scheme_is_not_repeated(client: SyncPrefectClient) -> None:
    with pytest.raises(ConfigError, match="begins with https://") as refused:
        find_or_make_block(client, "hooks.example.org/services/a-secret")
    assert "a-secret" not in str(refused.value)


@pytest.mark.parametrize(
    ("free", "checkpoint", "is_full"),
    [(10, None, False), (9, None, True), (30, 10, False), (29, 10, True)],
)
def test_a_disk_is_nearly_full_under_a_tenth_or_without_room_for_three_checkpoints(
    free: int, checkpoint: int | None, is_full: bool
) -> None:
    assert (describe_full_disk(100, free, checkpoint) is not None) is is_full


def test_the_newest_checkpoint_of_all_runs_is_measured(tmp_path: Path) -> None:
    assert measure_newest_checkpoint(tmp_path) is None
    for number, run in enumerate(("b", "sweep-1/arms/000", "a")):
        folder = tmp_path / run / "checkpoints" / "step-0000010"
        folder.mkdir(parents=True)
        (folder / "adapters.safetensors").write_bytes(bytes(number + 1))
        (folder / "optimizer.safetensors").write_bytes(bytes(10))
    assert measure_newest_checkpoint(tmp_path) == 13


def test_a_checkpoint_that_is_pruned_while_it_is_measured_fails_nothing(tmp_path: Path) -> None:
    kept = tmp_path / "run/checkpoints/step-0000001"
    kept.mkdir(parents=True)
    (kept / "state.json").write_bytes(b"four")
    pruned = (2.0, kept.with_name("step-0000002"))
    with patch.object(warning_events, "_iterate_checkpoints", return_value=[(1.0, kept), pruned]):
        assert measure_newest_checkpoint(tmp_path) == 4
