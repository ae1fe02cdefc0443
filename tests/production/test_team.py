"""Deployments of a team: a set for each adapter, two deploys at once, and what a server has."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import yaml
from prefect.client.schemas.actions import DeploymentUpdate

from tests.production.stack import NAME, Stack

pytestmark = [pytest.mark.production, pytest.mark.timeout(900)]
ADAPTER = "team-bot"
SET = (
    *("finetune/%s-nightly", "finetune/%s-manual", "promote/%s-approved"),
    *("reconcile/%s-hourly", "rollback/%s-rollback", "housekeeping/%s-housekeeping"),
)


def write_config(stack: Stack, name: str, **changes: Any) -> str:
    """The example's small configuration, published under another name."""
    settings = yaml.safe_load((stack.home / "small.yaml").read_text())
    settings |= {"registry": {"path": "registry", "name": name}} | changes
    (stack.home / f"{name}.yaml").write_text(yaml.safe_dump(settings))
    return f"{name}.yaml"


def deployments(stack: Stack) -> Counter[str]:
    with stack.connected() as client:
        flows = {flow.id: flow.name for flow in client.read_flows()}
        return Counter(f"{flows[d.flow_id]}/{d.name}" for d in client.read_deployments())


def test_two_deploys_at_once_leave_one_of_everything_and_the_first_adapters_set_alone(
    stack: Stack,
) -> None:
    config = write_config(stack, ADAPTER)
    others = deployments(stack)  # the first adapter's, and what other tests have deployed
    with stack.connected() as client:
        client.delete_automation(client.read_automations()[0].id)  # one that both have to make
    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(lambda _: stack.nested_tune("deploy", "-c", config), range(2)))
    assert [each.returncode for each in done] == [0, 0], done
    assert others.keys() >= {"promote/auto", *(name % NAME for name in SET)}
    assert deployments(stack) == others | Counter(name % ADAPTER for name in SET)
    assert set(deployments(stack).values()) == {1}
    with stack.connected() as client:
        automations = Counter(automation.name for automation in client.read_automations())
        schedules = client.read_deployment_by_name(f"finetune/{ADAPTER}-nightly").schedules
    assert set(automations.values()) == {1}
    assert len(schedules) == 1


def test_deploying_again_puts_back_what_the_file_says_and_keeps_what_a_person_switched_on(
    stack: Stack,
) -> None:
    config = write_config(stack, ADAPTER)
    stack.nested_tune("deploy", "-c", config)
    with stack.connected() as client:
        there = client.read_deployment_by_name(f"finetune/{ADAPTER}-nightly")
        (schedule,) = there.schedules
        client.update_deployment_schedule(there.id, schedule.id, active=True)
        changed = there.parameters["config"] | {"seed": 7}
        del changed["iters"]
        client.update_deployment(there.id, DeploymentUpdate(parameters={"config": changed}))
        missing = client.read_deployment_by_name(f"rollback/{ADAPTER}-rollback")
        client.delete_deployment(missing.id)
        old = client.create_deployment(
            there.flow_id, "nightly", parameters=there.parameters, tags=["nested-tune"]
        )
    again = stack.nested_tune("deploy", "-c", config)
    assert "deployment finetune/nightly: removed, for an earlier deploy left it" in again.stderr
    with stack.connected() as client:
        nightly = client.read_deployment_by_name(f"finetune/{ADAPTER}-nightly")
        assert nightly.parameters == there.parameters
        assert [each.active for each in nightly.schedules] == [True]
        assert client.read_deployment_by_name(f"rollback/{ADAPTER}-rollback") is not None
        assert old not in {d.id for d in client.read_deployments()}
        assert client.read_deployment_by_name(f"finetune/{NAME}-nightly") is not None
