"""Puts work pools, deployments and automations on a Prefect server, from the data in deployments/.

Doing it again changes nothing that a person has set on the server since: a pool's limit, a schedule
that was switched on or off, an automation that was paused, the block that alerts are sent to. Two
at once leave one of everything.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.client.schemas.objects import WorkerStatus
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import MissingFlowError, ObjectAlreadyExists, ObjectNotFound, ScriptError
from prefect.flows import Flow, load_flow_from_entrypoint
from prefect.schedules import Schedule
from prefect.settings import get_current_settings
from prefect.utilities.callables import parameter_schema

from flows.flow_runs.watchers import AdapterPage, list_watchers
from flows.rooms.deploy.alerts import find_or_make_block, put_automations
from flows.rooms.deploy.deployed_registries import adapters_in, read_server_deployments
from flows.rooms.deploy.planned_deployments import (
    FINETUNE_ENTRYPOINT,
    RECONCILE_ENTRYPOINT,
    DeploymentPlan,
    PlannedDeployment,
    replace_placeholders,
)
from nested_core.errors import ConfigError

LIST_OF_RUNS = AdapterPage("of all runs", "/runs")


def require_server() -> None:
    """Raise ConfigError if no server is named."""
    if get_current_settings().api.url is None:
        raise ConfigError(
            "PREFECT_API_URL is not set: there is no server to deploy to. On a laptop, type "
            "`export PREFECT_API_URL=http://127.0.0.1:4200/api` in this terminal and in another "
            "one, `prefect server start` in that one, and this command again. For a team: "
            "deployments/README.md."
        )


def deploy(plan: DeploymentPlan, notify: str | None = None) -> Iterator[str]:
    """Create or update a plan's pools, deployments and automations; yield a line for each.

    Deployments of an earlier plan that are not in this one are deleted.

    notify: where alerts are sent: a notification block as TYPE/NAME, or a webhook's URL; None
        leaves that as it is.
    """
    with get_client(sync_client=True) as client:
        block = None if notify is None else find_or_make_block(client, notify)
        yield from _make_work_pools(client, plan.work_pools)
        found = (watcher.find_page(client, plan.adapter) for watcher in list_watchers())
        page = next((page for page in found if page is not None), LIST_OF_RUNS)
        nights = {"nights": page.path}
        existing = read_server_deployments(client)
        names = {planned.full_name for planned in plan.deployments}
        left = {name: one for name, one in existing.items() if name not in names}
        outdated = {name: one for name, one in left.items() if _is_for(one, plan)}
        for planned in plan.deployments:
            update = {
                "description": replace_placeholders(planned.description, nights),
                "schedules": _keep_schedules(
                    planned, [*outdated.values()], existing.get(planned.full_name)
                ),
            }
            yield put_deployment(client, planned.model_copy(update=update), plan.pull)
        for name, old in outdated.items():
            with suppress(ObjectNotFound):  # another deploy has just deleted it
                client.delete_deployment(old.id)
            yield f"deployment {name}: removed, for an earlier deploy left it"
        yield from put_automations(client, plan.automations, block)
        yield f"page {page.name}: {ui_address()}{page.path}"


def ui_address() -> str:
    """Return the address of the server's pages for a browser."""
    settings = get_current_settings()
    return str(settings.ui_url or settings.api.url).removesuffix("/api")


def list_next_commands(plan: DeploymentPlan) -> Iterator[str]:
    """Yield what to type next: a worker for each pool, told where one runs, and a run."""
    pools = sorted({each.work_pool.name for each in plan.deployments})
    with get_client(sync_client=True) as client:
        for pool in pools:
            workers = client.read_workers_for_work_pool(pool)
            runs = any(worker.status == WorkerStatus.ONLINE for worker in workers)
            yield f"prefect worker start --pool {shlex.quote(pool)}{'  # has one' if runs else ''}"
    trained = [each for each in plan.deployments if each.entrypoint == FINETUNE_ENTRYPOINT]
    for each in trained[:1]:
        yield f"prefect deployment run {shlex.quote(each.full_name)}"


def _is_for(deployment: DeploymentResponse, plan: DeploymentPlan) -> bool:
    """Tell if it is about the plan's adapter, or reconciles all adapters of its registry."""
    registry, names = adapters_in(deployment.parameters)
    if len(names) == 1:
        return names[0] == plan.adapter
    return deployment.entrypoint == RECONCILE_ENTRYPOINT and registry == plan.registry


def _make_work_pools(client: SyncPrefectClient, work_pools: list[WorkPoolCreate]) -> Iterator[str]:
    """Create missing pools, and set the limit of those without one; yield a line for each.

    Raises ConfigError for a pool of another type: Prefect changes none.
    """
    for planned in work_pools:  # before one is made
        with suppress(ObjectNotFound):
            pool = client.read_work_pool(planned.name)
            if pool.type != planned.type:
                raise ConfigError(
                    f"The work pool {pool.name} of this server is of type {pool.type}. Expected "
                    f"{planned.type}. Give --pool {pool.type}, or delete the pool and its waiting "
                    f"runs: prefect work-pool delete {shlex.quote(pool.name)}."
                )
    for planned in work_pools:
        try:
            pool = client.read_work_pool(planned.name)
            limit, done = pool.concurrency_limit, "there already"
            if limit is None:  # `prefect worker start` made it
                limit, done = planned.concurrency_limit, "there without a limit, and has one now"
                client.update_work_pool(pool.name, WorkPoolUpdate(concurrency_limit=limit))
            yield f"work pool {pool.name}: {done}, limit {limit}"
        except ObjectNotFound:
            with suppress(ObjectAlreadyExists):  # another deploy has just created it
                client.create_work_pool(planned)
            yield f"work pool {planned.name}: made, limit {planned.concurrency_limit}"


def _keep_schedules(
    planned: PlannedDeployment, outdated: list[DeploymentResponse], there: DeploymentResponse | None
) -> tuple[Schedule, ...]:
    """Leave a schedule on or off as the server has it, else as an outdated deployment has it."""
    earlier = [each for each in outdated if each.entrypoint == planned.entrypoint]
    earlier += [] if there is None else [there]
    schedules = [schedule for each in earlier for schedule in each.schedules]
    is_active: dict[str | None, bool] = {each.slug: each.active for each in schedules if each.slug}
    return tuple(
        replace(each, active=is_active.get(each.slug, each.active)) for each in planned.schedules
    )


def put_deployment(
    client: SyncPrefectClient, planned: PlannedDeployment, pull: list[dict[str, Any]]
) -> str:
    """Create or replace a deployment on the server; return a line about it.

    The client is called directly, since `prefect deploy` would replace {{ ... }} in every value, a
    person's prompts too, by blocks, variables and the environment. Raises ConfigError for an
    entrypoint or a schedule that is not valid.

    pull: the steps that a worker takes before it runs the flow.
    """
    try:
        flow: Flow[..., Any] = load_flow_from_entrypoint(planned.entrypoint)
        described = planned.describe()
    except (ScriptError, MissingFlowError, ImportError, AttributeError, ValueError) as error:
        raise ConfigError(
            f"deployment {planned.full_name}: {type(error).__name__}: {error!s:.500} Expected an "
            "entrypoint and schedules as in deployments/prefect.yaml."
        ) from error
    client.create_deployment(
        client.create_flow(flow),
        version=flow.version,
        parameter_openapi_schema=parameter_schema(flow).model_dump(exclude_unset=True),
        enforce_parameter_schema=True,
        pull_steps=pull,
        **described,
    )
    schedules = [f"{each.slug} {'on' if each.active else 'off'}" for each in planned.schedules]
    scheduled = f", schedule {', '.join(schedules)}" if schedules else ""
    return f"deployment {planned.full_name}: in pool {planned.work_pool.name}{scheduled}"
