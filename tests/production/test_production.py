"""A production of one machine, from an empty folder: by schedule, by event, by a person's word."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prefect.client.schemas.schedules import IntervalSchedule
from prefect.flow_runs import resume_flow_run

from flows.rooms.deploy.planned_deployments import make_plan
from nested_core import registry as core
from tests.builders.registering import register
from tests.core.registry.conftest import write_run
from tests.production.stack import NAME, Stack, wait_for

pytestmark = [pytest.mark.production, pytest.mark.timeout(600)]


def champion(stack: Stack, name: str = NAME) -> str | None:
    there = stack.registry.is_dir() and name in core.list_names(stack.registry)
    return core.read_champion(stack.registry, name) if there else None


def add(stack: Stack, seed: int, policy: str = "always", name: str = NAME) -> str:
    """Register a version as a run that was judged now would, and decide nothing."""
    run = write_run(stack.folder / f"run-{name}-{seed}", seed)
    section = {"path": "x", "name": "y", "promote": policy}
    provenance = {"champion_at_gate": champion(stack, name), "config": {"registry": section}}
    return register(run, stack.registry, name, provenance)


def test_deploying_again_changes_nothing_that_a_person_has_set(stack: Stack) -> None:
    with stack.connected() as client:
        before = {d.id: d.name for d in client.read_deployments()}
        (schedule,) = client.read_deployment_by_name(f"finetune/{NAME}-nightly").schedules
        assert schedule.active is False
    again = stack.nested_tune("deploy", "-c", "small.yaml", "--json")
    assert again.returncode == 0, again.stderr
    assert (
        "deployment finetune/geography-nightly: in pool mlx-gpu, schedule nightly off"
        in (json.loads(again.stdout)["done"])
    )
    with stack.connected() as client:
        assert {d.id: d.name for d in client.read_deployments()} == before
        names = [automation.name for automation in client.read_automations()]
    own = {deployment.name for deployment in make_plan().deployments}
    assert {f"{NAME}-nightly", f"{NAME}-manual"} <= own <= set(before.values())
    assert sorted(names) == sorted(automation["name"] for automation in make_plan().automations)


def test_the_nightly_run_comes_by_its_schedule_and_its_adapter_is_champion(stack: Stack) -> None:
    with stack.connected() as client:
        there = client.read_deployment_by_name(f"finetune/{NAME}-nightly")
        (schedule,) = there.schedules
        # One night: of two that are due the earlier would be skipped.
        soon = datetime.now(UTC) + timedelta(seconds=60)
        daily = IntervalSchedule(interval=timedelta(days=1), anchor_date=soon)
        client.update_deployment_schedule(there.id, schedule.id, active=True, schedule=daily)
    try:
        first = wait_for(
            lambda: [
                r for r in stack.runs_of(f"finetune/{NAME}-nightly") if r.start_time is not None
            ],
            300,
        )[0]
    finally:
        with stack.connected() as client:
            client.update_deployment_schedule(there.id, schedule.id, active=False)
    ended = stack.wait(first.id)
    assert ended.state is not None
    assert ended.auto_scheduled
    version = champion(stack)
    assert version is not None
    assert str(ended.state.message).startswith(f"verified {version[:12]}: validation loss ")
    start = f"{NAME} had no champion when the run began: starting from a fresh adapter"
    assert str(ended.state.message).endswith(f"; promoted; {start}")


def test_a_night_without_new_data_is_skipped(stack: Stack) -> None:
    ended = stack.wait(stack.submit(f"finetune/{NAME}-nightly"))
    assert ended.state is not None
    assert ended.state.message == f"data unchanged since {str(champion(stack))[:12]}"
    assert len(core.history(stack.registry, NAME)) == 1


def test_a_version_that_needs_approval_is_promoted_in_the_name_of_who_approves(stack) -> None:
    before, version = champion(stack), add(stack, 2, "approve")
    run_id = stack.submit(f"promote/{NAME}-approved", version=version)
    stack.wait(run_id, "Waits for approval")
    assert champion(stack) == before
    with stack.connected():
        resume_flow_run(run_id, run_input={"approve": True, "by": "ann"})
    ended = stack.wait(run_id)
    assert ended.state is not None
    assert (ended.state.name, ended.state.message) == ("Approved", "promoted, approved by ann")
    last = core.history(stack.registry, NAME)[-1]
    assert (last["version"], last["by"]) == (version, "ann")


def test_a_rejected_adapter_fails_its_run_with_the_reason_and_promotes_nothing(stack) -> None:
    before, versions = champion(stack), core.list_versions(stack.registry, NAME)
    gate = {"min_relative_change": 1e6}  # more than any training does
    ended = stack.wait(stack.submit(f"finetune/{NAME}-manual", gate=gate))
    assert ended.state is not None
    assert ended.state.name == "Rejected: unchanged"
    assert str(ended.state.message).startswith("Rejected: ")
    assert champion(stack) == before
    assert core.list_versions(stack.registry, NAME) == versions


def test_rollback_goes_back_and_says_who(stack: Stack) -> None:
    previous = core.history(stack.registry, NAME)[-1]["previous"]
    ended = stack.wait(stack.submit(f"rollback/{NAME}-rollback", by="bob"))
    assert ended.state is not None
    assert ended.state.name == "Rolled back"
    assert str(ended.state.message).endswith(f" to {str(previous)[:12]} by bob")
    assert champion(stack) == previous
    assert core.history(stack.registry, NAME)[-1]["by"] == "bob"


def test_a_path_outside_of_the_allowed_roots_is_refused(stack: Stack) -> None:
    outside = Path(stack.folder) / "elsewhere"
    ended = stack.wait(stack.submit(f"finetune/{NAME}-manual", run_dir=str(outside)))
    assert ended.state is not None
    assert ended.state.name == "Failed"
    assert "outside of the folders that this worker may use" in str(ended.state.message)
    assert not outside.exists()
