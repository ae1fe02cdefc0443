"""How a server differs from what `deploy` would put on it: `deploy --diff` changes nothing."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound

from flows.deployment.deploy import (
    ServerDeployment,
    complete_automation,
    describe_automation,
    find_outdated,
    link_nights_page,
    read_automations,
    read_server_deployments,
)
from flows.deployment.plan import DeploymentPlan, full_name
from tasks.night_pages import find_nights_page

MISSING = "-"
Outcome = Literal["puts it", "keeps the server's", "removes it"]
AUTOMATION_PREFIX = "nested-tune"


@dataclass(frozen=True)
class Difference:
    """One key on which server and file do not agree; `outcome` is what `deploy` does about it.

    Values are JSON as text; "-" is a value that one of the two does not have.
    """

    name: str
    key: str
    server: str
    file: str
    outcome: Outcome


def find_differences(plan: DeploymentPlan) -> list[Difference]:
    """All differences between the server of PREFECT_API_URL and a plan."""
    with get_client(sync_client=True) as client:
        link_nights_page(plan, find_nights_page(client, plan.adapter))
        return [
            *_compare_work_pools(client, plan),
            *_compare_deployments(client, plan),
            *_compare_automations(client, plan),
        ]


def _compare_work_pools(client: SyncPrefectClient, plan: DeploymentPlan) -> Iterator[Difference]:
    for wanted in plan.work_pools:
        name, limit = f"work pool {wanted['name']}", wanted["concurrency_limit"]
        try:
            there = client.read_work_pool(wanted["name"]).concurrency_limit
        except ObjectNotFound:
            yield Difference(name, "", MISSING, "limit " + json.dumps(limit), "puts it")
            continue
        if there != limit:
            values = (json.dumps(there), json.dumps(limit))
            outcome: Outcome = "puts it" if there is None else "keeps the server's"
            yield Difference(name, "concurrency_limit", *values, outcome)


def _compare_deployments(client: SyncPrefectClient, plan: DeploymentPlan) -> Iterator[Difference]:
    there = read_server_deployments(client)
    by_name = {each.name: each for each in there}
    for wanted in plan.deployments:
        name = full_name(wanted)
        if name not in by_name:
            yield Difference(f"deployment {name}", "", MISSING, "in the file", "puts it")
            continue
        server, file = _describe_on_server(by_name[name]), _describe_in_file(plan, wanted)
        yield from _compare_values(f"deployment {name}", server, file)
    for old in find_outdated(there, plan):
        yield Difference(f"deployment {old.name}", "", "on the server", MISSING, "removes it")


def _compare_automations(client: SyncPrefectClient, plan: DeploymentPlan) -> Iterator[Difference]:
    there = {
        automation.name: automation
        for automation in read_automations(client)
        if automation.name.startswith(AUTOMATION_PREFIX)
    }
    for planned in plan.automations:
        name = f"automation {planned['name']}"
        if planned["name"] not in there:
            yield Difference(name, "", MISSING, "in the file", "puts it")
            continue
        wanted = complete_automation(client, planned, None)
        server = describe_automation(there[planned["name"]])
        yield from _compare_values(name, server, describe_automation(wanted))
    for name in there.keys() - {planned["name"] for planned in plan.automations}:
        yield Difference(f"automation {name}", "", "on the server", MISSING, "keeps the server's")


def _compare_values(
    name: str, server: dict[str, Any], file: dict[str, Any]
) -> Iterator[Difference]:
    """The keys, dotted, whose values differ; a schedule's `active` is the server's to say."""
    in_server, in_file = _flatten_keys(server), _flatten_keys(file)
    for key in [*in_file, *(key for key in in_server if key not in in_file)]:
        values = (in_server.get(key, MISSING), in_file.get(key, MISSING))
        if values[0] != values[1]:
            is_kept = key.startswith("schedules.") and key.endswith(".active")
            yield Difference(name, key, *values, "keeps the server's" if is_kept else "puts it")


def _flatten_keys(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted key -> value as JSON; an empty mapping is a value too."""
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict) and value:
            flat |= _flatten_keys(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = json.dumps(value, sort_keys=True)
    return flat


def _describe_on_server(deployment: ServerDeployment) -> dict[str, Any]:
    """What a deployment on the server has of the keys that prefect.yaml can give."""
    response = deployment.response
    limit, options = response.global_concurrency_limit, response.concurrency_options
    described: dict[str, Any] = {
        "entrypoint": response.entrypoint,
        "description": response.description,
        "tags": sorted(response.tags),
        "work_pool": {
            "name": response.work_pool_name,
            "job_variables": response.job_variables,
        },
        "schedules": {
            str(each.slug): each.schedule.model_dump(
                mode="json", exclude_none=True, exclude_defaults=True
            )
            | {"active": each.active}
            for each in response.schedules
        },
        "pull": response.pull_steps,
        "parameters": response.parameters,
    }
    if limit is not None:
        strategy = None if options is None else options.collision_strategy.value
        described["concurrency_limit"] = {"limit": limit.limit, "collision_strategy": strategy}
    return described


def _describe_in_file(plan: DeploymentPlan, deployment: dict[str, Any]) -> dict[str, Any]:
    """The same keys as the plan has them."""
    described = {
        "entrypoint": deployment["entrypoint"],
        "description": deployment.get("description"),
        "tags": sorted(deployment.get("tags", ())),
        "work_pool": {"job_variables": {}} | deployment["work_pool"],
        "schedules": {
            str(each.get("slug")): {k: v for k, v in each.items() if k != "slug"}
            for each in deployment.get("schedules", ())
        },
        "pull": plan.project["pull"],
        "parameters": deployment.get("parameters", {}),
    }
    if "concurrency_limit" in deployment:
        described["concurrency_limit"] = deployment["concurrency_limit"]
    return described
