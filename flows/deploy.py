"""Puts work pools, deployments and automations on a Prefect server, from the data in deployments/.

Doing it again changes nothing that a person has set on the server since: a pool's limit, a schedule
that was switched on or off, an automation that was paused.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.events.schemas.automations import AutomationCore
from prefect.exceptions import ObjectAlreadyExists, ObjectNotFound
from prefect.settings import get_current_settings
from prefect.workers.process import ProcessWorker

from flows.packaged_files import packaged_folder
from nested_core.errors import ConfigError, DamagedError, NestedTuneError
from nested_core.storage.strict_files import read_regular

HOME, INTERPRETER = "NESTED_TUNE_HOME", "NESTED_TUNE_PYTHON"
ENTRYPOINT_OF_TRAINING = "flows.finetune.finetune"
SHOWN_OUTPUT_LINES = 8
MAX_FILE_BYTES = 1024 * 1024


def deploy(
    file: Path | None = None, config: dict[str, Any] | None = None, notify: str | None = None
) -> Iterator[str]:
    """Put everything in place; yields a line for each thing that was done.

    `file` is used instead of deployments/prefect.yaml; `config` holds keys of a fine-tune that win
    over those written in the deployments that train; `notify` names a notification block as
    "<type>/<name>".
    """
    if get_current_settings().api.url is None:
        raise ConfigError(
            "PREFECT_API_URL is not set: there is no server to deploy to. Start one (see "
            "deployments/README.md) and set PREFECT_API_URL, as in deployments/settings.env."
        )
    project = read_yaml(file or packaged_folder("deployments") / "prefect.yaml")
    with get_client(sync_client=True) as client:
        yield from _make_work_pools(client)
        paused = {a.name for a in client.read_automations() if not a.enabled}
        _keep_schedules(client, project["deployments"])
        for deployment in project["deployments"]:
            if deployment["entrypoint"] == ENTRYPOINT_OF_TRAINING:
                deployment["parameters"]["config"].update(config or {})
        _run_prefect_deploy(project)
        for deployment in project["deployments"]:
            yield _describe(client, deployment)
        yield from _put_automations(client, notify)
        yield from _pause_again(client, paused)


def read_yaml(path: Path) -> dict[str, Any]:
    """One of the files of deployments/, or a person's own in its place."""
    try:
        text = read_regular(path, MAX_FILE_BYTES, follow_links=True)
        content: dict[str, Any] = yaml.safe_load(text)
    except (OSError, DamagedError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    return content


def _make_work_pools(client: SyncPrefectClient) -> Iterator[str]:
    for wanted in read_yaml(packaged_folder("deployments") / "work-pools.yaml")["work_pools"]:
        try:
            pool = client.read_work_pool(wanted["name"])
            yield f"work pool {pool.name}: there already, limit {pool.concurrency_limit}"
        except ObjectNotFound:
            template = ProcessWorker.get_default_base_job_template()
            with suppress(ObjectAlreadyExists):  # by another deploy, just now
                client.create_work_pool(WorkPoolCreate(**wanted, base_job_template=template))
            yield f"work pool {wanted['name']}: made, limit {wanted['concurrency_limit']}"


def _keep_schedules(client: SyncPrefectClient, deployments: list[dict[str, Any]]) -> None:
    """A schedule that is on the server already stays on or off as it is there."""
    for deployment in deployments:
        try:
            there = client.read_deployment_by_name(full_name(deployment))
        except ObjectNotFound:
            continue
        is_active = {schedule.slug: schedule.active for schedule in there.schedules}
        for schedule in deployment.get("schedules", ()):
            schedule["active"] = is_active.get(schedule.get("slug"), schedule["active"])


def full_name(deployment: dict[str, Any]) -> str:
    """FLOW/DEPLOYMENT; our flows are named as their functions are."""
    return f"{deployment['entrypoint'].rpartition('.')[2]}/{deployment['name']}"


def _run_prefect_deploy(project: dict[str, Any]) -> None:
    """Hand the project to Prefect's own command: its file format is Prefect's to read."""
    home = os.environ.get(HOME) or str(Path.cwd())
    interpreter = os.environ.get(INTERPRETER) or shlex.quote(sys.executable)
    with tempfile.TemporaryDirectory(prefix="nested-tune-") as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump(project, sort_keys=False), encoding="utf-8")
        command = ["--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        done = subprocess.run(
            [sys.executable, "-m", "prefect", *command],
            env=os.environ | {HOME: home, INTERPRETER: interpreter},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
    if done.returncode != 0:
        lines = "\n".join(done.stdout.strip().splitlines()[-SHOWN_OUTPUT_LINES:])
        raise NestedTuneError(f"`prefect deploy` failed; what it said last:\n{lines}")


def _describe(client: SyncPrefectClient, deployment: dict[str, Any]) -> str:
    there = client.read_deployment_by_name(full_name(deployment))
    schedules = [
        f"{schedule.slug} {'on' if schedule.active else 'off'}" for schedule in there.schedules
    ]
    scheduled = f", schedule {', '.join(schedules)}" if schedules else ""
    return f"deployment {full_name(deployment)}: in pool {there.work_pool_name}{scheduled}"


def _put_automations(client: SyncPrefectClient, notify: str | None) -> Iterator[str]:
    block = None if notify is None else _find_block(client, notify)
    for wanted in read_yaml(packaged_folder("deployments") / "automations.yaml")["automations"]:
        message = wanted.pop("notify", None)
        if message is not None and block is not None:
            notifying = {"type": "send-notification", "block_document_id": block}
            wanted["actions"] = [notifying | message]
        if not wanted["actions"]:
            yield f"automation {wanted['name']!r}: left out, for it needs --notify"
            continue
        automation = AutomationCore.model_validate(wanted)
        for old in client.read_automations_by_name(wanted["name"]):
            client.delete_automation(old.id)
        client.create_automation(automation)
        yield f"automation {automation.name!r}: put in place"


def _find_block(client: SyncPrefectClient, notify: str) -> str:
    kind, _, name = notify.partition("/")
    try:
        return str(client.read_block_document_by_name(name, kind).id)
    except ObjectNotFound:
        raise ConfigError(
            f"--notify {notify}: the server has no such block. Make a notification block in the UI "
            "under Blocks, and name it as TYPE/NAME, such as slack-webhook/ops."
        ) from None


def _pause_again(client: SyncPrefectClient, paused: set[str]) -> Iterator[str]:
    """Automations made anew are switched on; those that a person had paused are paused again."""
    for automation in client.read_automations():
        if automation.name in paused and automation.enabled:
            client.pause_automation(automation.id)
            yield f"automation {automation.name!r}: stays paused"
