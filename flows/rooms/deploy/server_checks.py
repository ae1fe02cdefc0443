"""What `doctor` asks the server of PREFECT_API_URL: would a night on it come to an adapter."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from typing import Any
from urllib.parse import urlsplit

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.exceptions import ObjectNotFound
from prefect.settings import get_current_settings

from flows.commands.check import Check, DoctorChecks
from flows.flow_runs.allowed_folders import allowed_roots
from flows.rooms.deploy.alerts import alert_block, read_automations
from flows.rooms.deploy.deployed_registries import adapters_in, read_server_deployments
from flows.rooms.deploy.planned_deployments import (
    FINETUNE_ENTRYPOINT,
    read_automations_yaml,
    read_deployments_file,
    read_work_pools,
)

MAX_HEARTBEAT_AGE_SECONDS = 90
LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")


def iterate_server_checks() -> Iterator[Check]:
    """Yield every check that needs the server; only the first one if it does not answer."""
    with get_client(sync_client=True) as client:
        try:
            client.request("GET", "/admin/version").raise_for_status()
        except (httpx.HTTPError, OSError) as error:
            yield _server_unreachable(error)
            return
        yield _check_version(client)
        yield _check_auth()
        yield _check_database()
        yield from _check_pools(client)
        yield _check_deployments(client)
        yield from _check_automations(client)
        yield _check_result_serializer()
        yield _check_allowed_folders()


def _server_unreachable(error: Exception) -> Check:
    url = get_current_settings().api.url
    if isinstance(error, httpx.HTTPStatusError) and error.response.status_code in (401, 403):
        mend = "set PREFECT_API_AUTH_STRING to the server's PREFECT_SERVER_API_AUTH_STRING"
        return Check("server", False, f"{url} refuses this user", mend)
    mend = "start it: systemctl start nested-tune-server, or prefect server start"
    return Check("server", False, f"{url} does not answer: {type(error).__name__}", mend)


def _check_version(client: SyncPrefectClient) -> Check:
    theirs, ours = client.api_version(), version("prefect")
    seen = f"{client.api_url}, version {theirs}"
    mend = "" if theirs == ours else f"install prefect {theirs} here, or {ours} on the server"
    return Check("server", theirs == ours, seen, mend)


def _check_auth() -> Check:
    """Check that a server asks who is there; one that other machines reach must."""
    settings = get_current_settings()
    host = urlsplit(str(settings.api.url)).hostname
    url = f"{settings.api.url}/admin/version"
    is_open = httpx.get(url, timeout=10).status_code == 200
    where = "this machine alone" if host in LOCAL_HOSTS else str(host)
    mend = "set PREFECT_SERVER_API_AUTH_STRING=user:password for the server" if is_open else ""
    return Check("auth", not is_open, f"{'open to all' if is_open else 'asked'}, on {where}", mend)


def _check_database() -> Check:
    """Return whether this machine's server uses a database that is fit for schedules.

    A server on another machine does not tell its settings.
    """
    settings = get_current_settings()
    if urlsplit(str(settings.api.url)).hostname not in LOCAL_HOSTS:
        return Check("database", True, "known on the server's machine alone")
    database = settings.server.database
    url = database.connection_url
    if url is None or not database.model_fields_set & {"connection_url", "driver"}:
        return Check("database", True, "unknown here: it is in the environment of the server alone")
    dialect = url.get_secret_value().partition(":")[0]
    is_fit = not dialect.startswith("sqlite")
    mend = "" if is_fit else "PostgreSQL for what is scheduled: deployments/postgresql"
    return Check("database", is_fit, dialect, mend)


def _check_pools(client: SyncPrefectClient) -> Iterator[Check]:
    """Yield a check of each pool that our deployments use, or that `deploy` would create."""
    limits = {wanted.name: wanted.concurrency_limit for wanted in read_work_pools()}
    used = {each.work_pool_name for each in read_server_deployments(client).values()} - {None}
    for name in sorted(map(str, used or limits)):
        try:
            pool = client.read_work_pool(name)
        except ObjectNotFound:
            yield Check(f"pool {name}", False, "is not there", "nested-tune deploy")
            continue
        is_well = pool.concurrency_limit is not None and not pool.is_paused
        state = f"limit {pool.concurrency_limit}{', paused' if pool.is_paused else ''}"
        mend = f"prefect work-pool set-concurrency-limit {name} {limits.get(name, 1)}"
        if pool.is_paused:
            mend = f"prefect work-pool resume {name}"
        yield Check(f"pool {name}", is_well, state, "" if is_well else mend)
        yield _check_workers(client, name)


def _check_workers(client: SyncPrefectClient, pool: str) -> Check:
    since = datetime.now(UTC) - timedelta(seconds=MAX_HEARTBEAT_AGE_SECONDS)
    heard = client.read_workers_for_work_pool(pool)
    alive = [w.name for w in heard if w.last_heartbeat_time and w.last_heartbeat_time > since]
    mend = f"systemctl start nested-tune-worker@{pool}, or prefect worker start --pool {pool}"
    seen = ", ".join(alive) or "none has been heard of lately"
    return Check(f"worker {pool}", bool(alive), seen, "" if alive else mend)


def _check_deployments(client: SyncPrefectClient) -> Check:
    """Return whether each adapter that the server trains has the whole set of deployments."""
    there = read_server_deployments(client)
    trainings = [each for each in there.values() if each.entrypoint == FINETUNE_ENTRYPOINT]
    adapters = sorted({name for each in trainings for name in adapters_in(each.parameters)[1]})
    if not adapters:
        return Check("deployments", False, "none are there", "nested-tune deploy -c CONFIG")
    shipped = read_deployments_file()
    sets = [shipped.filled({"adapter": adapter, "registry": ""}) for adapter in adapters]
    wanted = {each.full_name: each for content in sets for each in content.deployments}
    missing = sorted(wanted.keys() - there.keys())
    limits = []
    for name in sorted(wanted.keys() & there.keys()):
        limit, server_limit = wanted[name].concurrency_limit, there[name].global_concurrency_limit
        if limit is not None and (server_limit is None or server_limit.limit != limit.limit):
            limits.append(name)
    seen = f"{len(wanted) - len(missing)} of {len(wanted)} are there, for {', '.join(adapters)}"
    seen += f"; missing: {', '.join(missing)}" if missing else ""
    seen += f"; another limit: {', '.join(limits)}" if limits else ""
    is_well = not missing and not limits
    return Check("deployments", is_well, seen, "" if is_well else "nested-tune deploy -c CONFIG")


def _check_automations(client: SyncPrefectClient) -> Iterator[Check]:
    """Yield whether all automations exist and are on, and whether alerts are sent to anybody."""
    planned = read_automations_yaml()
    names = [automation["name"] for automation in planned]
    is_enabled = {each.name: each.enabled for each in read_automations(client, names)}
    missing = [name for name in names if name not in is_enabled]
    paused = [name for name in names if not is_enabled.get(name, True)]
    seen, mend = f"{len(planned)} are in place", ""
    if missing:
        seen, mend = f"missing: {', '.join(missing)}", "nested-tune deploy -c CONFIG"
    elif paused:
        seen, mend = f"paused: {', '.join(paused)}", f"prefect automation resume '{paused[0]}'"
    yield Check("automations", not mend, seen, mend)
    yield check_alerts(client, planned)


def check_alerts(client: SyncPrefectClient, planned: list[dict[str, Any]]) -> Check:
    """Return whether alerts are sent to anybody; `planned` is the content of automations.yaml."""
    alerts = read_automations(client, [each["name"] for each in planned if "notify" in each])
    if any(map(alert_block, alerts)):
        return Check("alerts", True, f"{len(alerts)} are sent to a block")
    seen = "nobody is notified of a run that failed, crashed or is late"
    mend = "nested-tune deploy -c CONFIG --notify TYPE/NAME, or --notify @FILE"
    return Check("alerts", False, seen, mend)


def _check_result_serializer() -> Check:
    serializer = get_current_settings().results.default_serializer
    mend = "" if serializer == "json" else "PREFECT_RESULTS_DEFAULT_SERIALIZER=json"
    return Check("results", serializer == "json", f"kept as {serializer}", mend)


def _check_allowed_folders() -> Check:
    """Check where the runs of a worker that is started here may read and write."""
    roots = allowed_roots()
    missing = [str(root) for root in roots if not root.is_dir()]
    writable = [root for root in roots if os.access(root, os.W_OK)]
    is_well = not missing and bool(writable)
    seen = ", ".join(map(str, roots))
    return Check("roots", is_well, seen, "" if is_well else "set NESTED_TUNE_ROOTS to folders")


CHECKS = DoctorChecks(of_server=iterate_server_checks)
