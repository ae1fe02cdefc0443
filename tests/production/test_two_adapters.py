"""Two adapters of a team, five nights each, on one server: what the list of runs and alerts tell.

Nights are runs of finetune/NAME-nightly: data that changes, a crash, a refusal, an unchanged night
and a rollback are among them. The tests are one story, and need each other in this order.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml
from prefect.client.schemas.objects import FlowRun
from prefect.states import Scheduled, State

from nested_core import registry as core
from tests.production.stack import Stack, wait_for
from tests.webhook_server import WebhookServer

pytestmark = [pytest.mark.production, pytest.mark.timeout(1800)]
CAPITALS, SUPPORT = ADAPTERS = ("capitals", "helpdesk")
GOOD = ("Promoted", "Kept the champion")
LONGEST_NIGHT = 600.0


@pytest.fixture(scope="module")
def team(stack: Stack, webhook: WebhookServer) -> Stack:
    """Both adapters deployed, each with data of its own."""
    for name in ADAPTERS:
        shutil.copytree(stack.home / "examples" / "geography", stack.home / "examples" / name)
        settings = yaml.safe_load((stack.home / "small.yaml").read_text())
        settings |= {"data": f"examples/{name}", "registry": {"path": "registry", "name": name}}
        # What is rebuilt in 12 steps is better or worse than the champion by chance
        settings["continual"] = {"policy": "continue"}
        (stack.home / f"{name}.yaml").write_text(yaml.safe_dump(settings))
        done = stack.nested_tune("deploy", "-c", f"{name}.yaml")
        assert done.returncode == 0, done.stderr
    webhook.texts.clear()
    return stack


def add_example(stack: Stack, name: str) -> None:
    """A line of data that was not there the night before."""
    file: Path = stack.home / "examples" / name / "train.jsonl"
    number = len(file.read_text().splitlines())
    question = {"role": "user", "content": f"I want to see town {number}. Where to?"}
    answer = {"role": "assistant", "content": "Go and see Kabul, the capital of Afghanistan!"}
    with file.open("a") as lines:
        lines.write(json.dumps({"messages": [question, answer]}) + "\n")


def begin_night(stack: Stack, name: str, **changes: Any) -> UUID:
    return stack.submit(f"finetune/{name}-nightly", **changes)


def end_night(stack: Stack, run_id: UUID) -> FlowRun:
    return stack.wait(run_id, seconds=LONGEST_NIGHT)


def story(runs: list[FlowRun]) -> list[str]:
    """What the badges of a list say, oldest first."""
    ordered = sorted(runs, key=lambda run: str(run.created))
    return [str(run.state_name) for run in ordered]


def end_nights(stack: Stack, names: tuple[str, ...] = ADAPTERS, **changes: Any) -> list[FlowRun]:
    """One night of each of these adapters, on data that has a new line."""
    for name in names:
        add_example(stack, name)
    return [end_night(stack, begin_night(stack, name, **changes)) for name in names]


def test_the_first_night_promotes_both_and_tells_nobody(team, webhook) -> None:
    runs = end_nights(team)
    assert story(runs) == ["Promoted", "Promoted"], runs
    for name, run in zip(ADAPTERS, runs, strict=True):
        assert run.name.startswith(f"{name}, ")
        version = core.read_champion(team.registry, name)
        assert str(run.state.message).startswith(f"verified {str(version)[:12]}: ")  # type: ignore[union-attr]
    assert webhook.texts == []


def test_in_the_second_one_is_unchanged_and_the_other_crashes_and_goes_on_by_itself(
    team: Stack, webhook: WebhookServer
) -> None:
    add_example(team, SUPPORT)
    crashing = begin_night(team, SUPPORT)
    wait_for(lambda: team.is_running(crashing, "train"), LONGEST_NIGHT)
    os.kill(team.flow_parent(crashing), signal.SIGKILL)
    unchanged = begin_night(team, CAPITALS)
    assert end_night(team, unchanged).state_name == "Skipped: unchanged"
    wait_for(lambda: team.flow_run(crashing).run_count == 2, LONGEST_NIGHT)
    resumed = end_night(team, crashing)
    assert resumed.state is not None
    assert resumed.state.is_completed(), resumed.state
    assert "begun 2 times" in str(resumed.state.message)
    assert "resumed" in resumed.tags
    wait_for(lambda: len(webhook.texts) == 2)
    crashed, went_on = webhook.texts
    assert crashed.startswith(f"Crashed: {SUPPORT}, ")
    assert went_on.startswith(f"Resumed, {resumed.state_name}: {SUPPORT}, ")


def test_in_the_third_the_gate_refuses_one_and_its_champion_stays(team, webhook) -> None:
    before = core.read_champion(team.registry, CAPITALS)
    (refused,) = end_nights(team, (CAPITALS,), gate={"min_relative_change": 1e6})
    assert refused.state_name == "Rejected: unchanged"
    assert core.read_champion(team.registry, CAPITALS) == before
    (other,) = end_nights(team, (SUPPORT,))
    assert other.state_name in GOOD
    wait_for(lambda: len(webhook.texts) == 3)
    assert webhook.texts[-1].startswith(f"Rejected: unchanged: {CAPITALS}, ")


def test_after_the_fourth_a_person_goes_back_and_the_fifth_does_not_undo_it(team, webhook) -> None:
    before = core.read_champion(team.registry, CAPITALS)
    # Whatever its loss is: there is to be a champion to leave.
    always = {"path": "registry", "name": CAPITALS, "promote": "always"}
    begun_anew = {"continual": {"from": None}, "seed": 4}
    (promoted,) = end_nights(team, (CAPITALS,), registry=always, **begun_anew)
    assert promoted.state_name == "Promoted"
    (other,) = end_nights(team, (SUPPORT,))
    assert other.state_name in GOOD
    left = core.read_champion(team.registry, CAPITALS)
    back = end_night(team, team.submit(f"rollback/{CAPITALS}-rollback", by="ann"))
    assert back.state_name == "Rolled back"
    assert core.read_champion(team.registry, CAPITALS) == before
    assert {run.state_name for run in end_nights(team)} <= set(GOOD)
    assert core.read_champion(team.registry, CAPITALS) != left
    wait_for(lambda: len(webhook.texts) == 4)
    assert webhook.texts[-1].startswith(f"Rolled back: {CAPITALS}")


def test_the_list_tells_each_night_and_there_is_no_run_that_nobody_asked_for(team, webhook) -> None:
    for name in ADAPTERS:
        runs = team.runs_of(f"finetune/{name}-nightly")
        print(name, story(runs), [str(run.state.message) for run in runs if run.state])
        assert len(runs) == 5
        assert all(name in run.tags for run in runs)
        history = core.history(team.registry, name)
        changes = core.read_champion_changes(team.registry, name)
        assert core.read_champion(team.registry, name) == changes[-1].version
        promoted = [entry["version"] for entry in history if entry["action"] == "promote"]
        assert len(set(promoted)) == len(promoted), "promoted twice"
        assert len(promoted) == story(runs).count("Promoted")
        audited = team.nested_tune("audit", name, "--registry", str(team.registry))
        assert audited.returncode == 0, audited.stdout
    nights = story(team.runs_of(f"finetune/{CAPITALS}-nightly"))
    assert nights[:4] == ["Promoted", "Skipped: unchanged", "Rejected: unchanged", "Promoted"]
    promotions = [run.parameters["config"]["name"] for run in team.runs_of("promote/auto")]
    assert not set(promotions) & set(ADAPTERS), "each night promotes by itself"
    assert len(webhook.texts) == 4, webhook.texts


def test_a_run_that_no_worker_takes_is_told_as_late(team: Stack, webhook: WebhookServer) -> None:
    webhook.texts.clear()
    team.prefect("work-pool", "pause", "mlx-gpu")
    two_hours_ago = datetime.now(UTC) - timedelta(hours=2)
    with team.connected() as client:
        there = client.read_deployment_by_name(f"finetune/{CAPITALS}-nightly")
        state: State[Any] = Scheduled(scheduled_time=two_hours_ago)
        run = client.create_flow_run_from_deployment(there.id, state=state)
        try:
            wait_for(lambda: webhook.texts, 120)
        finally:
            client.delete_flow_run(run.id)
            team.prefect("work-pool", "resume", "mlx-gpu")
    (late,) = webhook.texts
    assert late.startswith(f"Late: {CAPITALS}-nightly")
    assert f"It was to begin at {two_hours_ago:%Y-%m-%d %H:%M}" in late
