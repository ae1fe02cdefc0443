"""What `deploy` is to put on a server: the data of deployments/, filled in for one adapter."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from contextlib import chdir
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import yaml
from prefect.client.schemas.actions import DeploymentScheduleCreate, WorkPoolCreate
from prefect.client.schemas.objects import ConcurrencyLimitConfig, ConcurrencyOptions
from prefect.schedules import Schedule
from pydantic import Field

from flows.process.environment import packaged_folder
from flows.rooms.deploy.command import PoolType
from flows.rooms.deploy.container_pools import NO_REQUEST, Request, make_job_template
from nested_core import seams
from nested_core.config.error_messages import explain_problems, find_problems
from nested_core.config.loading import read_yaml as read_config
from nested_core.config.section_base import Section
from nested_core.errors import ConfigError, DamagedError, NestedTuneError
from nested_core.registry.folders import create_name_folder, name_exists
from nested_core.storage.untrusted_files import read_regular

RESTARTING = " -m nested_core.rooms.restart.restarting"  # of the command of a run
HOME_IN_CONTAINER = "/work"  # of deployments/image, with the volume of runs, registry and data
HOME, INTERPRETER = "NESTED_TUNE_HOME", "NESTED_TUNE_PYTHON"
PENDING_SECONDS, DEFAULT_PENDING_SECONDS = "NESTED_TUNE_PENDING_SECONDS", "600"
FINETUNE_ENTRYPOINT = "flows.finetune.finetune"
RECONCILE_ENTRYPOINT = "flows.reconcile.reconcile"
PLACEHOLDER_PATTERN = re.compile(r"\{\{ *(adapter|registry|nights|\$NESTED_TUNE_\w+) *\}\}")
ENTER_HOME = [  # the pull step of a file that has none
    {"prefect.deployments.steps.set_working_directory": {"directory": f"{{{{ ${HOME} }}}}"}}
]
MAX_FILE_BYTES = 1024 * 1024


class DeploymentPool(Section):
    """The work pool that a deployment's runs wait in, as Prefect's own format calls its keys."""

    name: str
    work_queue_name: str | None = None
    job_variables: dict[str, Any] = {}


class PlannedDeployment(Section):
    """One deployment, as Prefect's own format writes it; any other key is refused."""

    name: str
    entrypoint: str
    work_pool: DeploymentPool
    description: str | None = None
    tags: tuple[str, ...] = ()
    schedules: tuple[Schedule, ...] = ()
    concurrency_limit: ConcurrencyLimitConfig | None = None
    parameters: dict[str, Any] = {}

    @property
    def full_name(self) -> str:
        """FLOW/DEPLOYMENT; our flows are named as their functions are."""
        return f"{self.entrypoint.rpartition('.')[2]}/{self.name}"

    @property
    def configuration(self) -> dict[str, Any] | None:
        """The configuration of a fine-tune in its parameters; None where nothing is trained."""
        if self.entrypoint != FINETUNE_ENTRYPOINT:
            return None
        configuration: dict[str, Any] = self.parameters.get("config") or {}
        return configuration

    def with_configuration(self, configuration: dict[str, Any]) -> Self:
        """The same deployment, training by this configuration."""
        return self.model_copy(update={"parameters": self.parameters | {"config": configuration}})

    def find_conflicts(self) -> Iterator[str]:
        """A schedule without a time, and a flow that trains without a configuration."""
        if any((each.cron or each.interval or each.rrule) is None for each in self.schedules):
            yield "a schedule has one of cron, interval, rrule"
        trains = self.entrypoint == FINETUNE_ENTRYPOINT
        if trains and not isinstance(self.parameters.get("config"), dict):
            yield "what trains has its configuration in parameters.config"

    def in_containers(self, pool: PoolType, request: Request) -> Self:
        """The same deployment by Prefect's own command, with what a training asks for."""
        variables = {k: v for k, v in self.work_pool.job_variables.items() if k != "command"}
        if self.entrypoint == FINETUNE_ENTRYPOINT:
            variables = request.job_variables(pool) | variables
        work_pool = self.work_pool.model_copy(update={"job_variables": variables})
        return self.model_copy(update={"work_pool": work_pool})

    def describe(self) -> dict[str, Any]:
        """Return the arguments for Prefect's client; ValueError for a schedule that it refuses."""
        limit, options = self.concurrency_limit, None
        if limit is not None:
            options = ConcurrencyOptions(**limit.model_dump(exclude={"limit"}))
        own = self.model_dump(include={"name", "entrypoint", "description", "tags", "parameters"})
        return own | {
            "work_pool_name": self.work_pool.name,
            "work_queue_name": self.work_pool.work_queue_name,
            "job_variables": self._make_job_variables(),
            "schedules": [DeploymentScheduleCreate.from_schedule(each) for each in self.schedules],
            "concurrency_limit": None if limit is None else limit.limit,
            "concurrency_options": options,
        }

    def _make_job_variables(self) -> dict[str, Any]:
        """The work pool's; the command begins nothing again where the room restart is deleted."""
        variables = self.work_pool.job_variables
        if "command" in variables and not seams.is_there("restart"):
            variables = variables | {"command": variables["command"].replace(RESTARTING, "")}
        return variables


class DeploymentsFile(Section):
    """A prefect.yaml: what is deployed, and the steps that lead a run to its folder."""

    name: str | None = None
    prefect_version: str | None = Field(None, alias="prefect-version")
    definitions: Any = None
    pull: list[dict[str, Any]] = ENTER_HOME
    deployments: tuple[PlannedDeployment, ...]

    def filled(self, values: dict[str, str]) -> Self:
        """The same with placeholders replaced, but in configurations: they keep each character."""
        filled = type(self).model_validate(replace_placeholders(self.model_dump(), values))
        pairs = zip(self.deployments, filled.deployments, strict=True)
        deployments = [
            new if old.configuration is None else new.with_configuration(old.configuration)
            for old, new in pairs
        ]
        return filled.model_copy(update={"deployments": tuple(deployments)})


@dataclass(frozen=True)
class DeploymentPlan:
    """The content of prefect.yaml for one adapter, and what all adapters of a server share."""

    adapter: str
    registry: str
    pull: list[dict[str, Any]]
    deployments: tuple[PlannedDeployment, ...]
    work_pools: list[WorkPoolCreate]
    automations: list[dict[str, Any]]


def make_plan(
    file: Path | None = None,
    config: Path | None = None,
    pool: PoolType = "process",
    request: Request = NO_REQUEST,
) -> DeploymentPlan:
    """Return the plan for a configuration and a prefect.yaml; None takes the shipped one.

    The configuration's keys replace those in the deployments of `file`. Placeholders of `file` are
    filled, but nothing in a configuration is. Raises ConfigError if the adapter's name is not
    known, or a flow would refuse a deployment's configuration.

    pool: the type of the work pools. In those of containers, nothing of this machine is named.
    request: what the container of a training asks for.
    """
    if config is None and file is None:
        config = packaged_folder("deployments") / "geography.yaml"
    given = {} if config is None else read_config(config)
    given = {key: value for key, value in given.items() if value is not None}  # the default
    content = read_deployments_file(file)
    deployments = tuple(
        each.with_configuration(_merge_config(each.configuration, given))
        if each.configuration is not None
        else each
        for each in content.deployments
    )
    adapter, registry = _find_adapter(deployments, config or file)
    # No other variable of the environment is put into anything that the server is given.
    interpreter = os.environ.get(INTERPRETER) or shlex.quote(sys.executable)
    values = {"adapter": adapter, "registry": registry}
    home = runs_home() if pool == "process" else HOME_IN_CONTAINER
    values |= {f"${HOME}": home, f"${INTERPRETER}": interpreter}
    if pool != "process":
        deployments = tuple(each.in_containers(pool, request) for each in deployments)
    content = content.model_copy(update={"deployments": deployments}).filled(values)
    for deployment in content.deployments:
        _require_valid_parameters(deployment, home if pool == "process" else None)
    return DeploymentPlan(
        adapter=adapter,
        registry=registry,
        pull=content.pull,
        deployments=content.deployments,
        work_pools=read_work_pools(pool),
        automations=read_automations_yaml(),
    )


def runs_home() -> str:
    """The folder that the runs start in, and relative paths with them."""
    return os.environ.get(HOME) or str(Path.cwd())


def begin_name(plan: DeploymentPlan) -> str:
    """Create the adapter's empty folder in its registry, below the runs' home; return a sentence.

    A deployment's run creates no name unless NESTED_TUNE_REGISTRIES of its worker lists the
    registry. A home that belongs to another user is left as it is.
    """
    home = Path(runs_home())
    registry = home / plan.registry
    try:
        if home.stat().st_uid != os.geteuid():
            raise ConfigError(f"{home} belongs to another user")
        if name_exists(registry, plan.adapter):
            return f"registry {registry}: {plan.adapter} is there already"
        create_name_folder(registry, plan.adapter)
    except (NestedTuneError, OSError) as error:
        return (
            f"registry {registry}: {plan.adapter} was not begun here ({error}); the first run "
            f"begins it where NESTED_TUNE_REGISTRIES in the worker's settings lists the registry"
        )
    return f"registry {registry}: {plan.adapter} begun"


def read_deployments_file(file: Path | None = None) -> DeploymentsFile:
    """Read a person's prefect.yaml, or the shipped one (None), without flows of deleted rooms.

    Raises ConfigError with all that is wrong in the file, and if a person's file names a flow of a
    deleted room.
    """
    path = file or packaged_folder("deployments") / "prefect.yaml"
    content = _read_yaml(path)
    if problems := find_problems(DeploymentsFile, content):
        raise ConfigError(
            f"{explain_problems(problems, str(path), places={})}\nA prefect.yaml has the list "
            "`deployments`, as deployments/prefect.yaml has."
        )
    read = DeploymentsFile.model_validate(content)
    deployments: list[PlannedDeployment] = []
    for deployment in read.deployments:
        room = seams.room_of(deployment.entrypoint)
        if room is not None and file is not None:
            seams.require(room, f"{path}: {deployment.entrypoint}")
        if room is None or seams.is_there(room):
            deployments.append(deployment)
    return read.model_copy(update={"deployments": tuple(deployments)})


def read_work_pools(pool: PoolType = "process") -> list[WorkPoolCreate]:
    """The work pools that a server is to have, by the job template of their type."""
    content = _read_yaml(packaged_folder("deployments") / "work-pools.yaml")
    template = make_job_template(pool, content["templates"][pool])
    typed = {"type": pool, "base_job_template": template}
    return [WorkPoolCreate(**each | typed) for each in content["work_pools"]]


def read_automations_yaml() -> list[dict[str, Any]]:
    """Read the shipped automations, with the seconds that the environment sets.

    Raises ConfigError if that is no number.
    """
    bound = os.environ.get(PENDING_SECONDS) or DEFAULT_PENDING_SECONDS
    items = _read_yaml(packaged_folder("deployments") / "automations.yaml")["automations"]
    automations: list[dict[str, Any]] = replace_placeholders(items, {f"${PENDING_SECONDS}": bound})
    for automation in automations:
        try:
            automation["trigger"]["within"] = float(automation["trigger"]["within"])
        except ValueError:
            raise ConfigError(
                f"{PENDING_SECONDS}={bound!r:.40} is no number. Expected seconds, such as 600."
            ) from None
    return automations


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(read_regular(path, MAX_FILE_BYTES, follow_links=True))
    except (OSError, DamagedError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, as in deployments/prefect.yaml.")
    return content


def _merge_config(shipped: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Return `given` completed by the keys of `shipped` that it does not set, in sections too.

    Left out of the shipped keys are those of deleted rooms, and those of `continual` that do not
    fit the configuration (`_list_unusable_keys`).
    """
    merged = dict(given)
    deleted = seams.list_deleted_keys()
    for key, section in shipped.items():
        value = section
        if isinstance(section, dict):
            value = {k: v for k, v in section.items() if f"{key}.{k}" not in deleted}
        if key not in given:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(given[key], dict):
            merged[key] = value | given[key]
    if isinstance(merged.get("continual"), dict):
        left_out = _list_unusable_keys(merged) - (given.get("continual") or {}).keys()
        merged["continual"] = {k: v for k, v in merged["continual"].items() if k not in left_out}
    return merged


def _list_unusable_keys(config: dict[str, Any]) -> set[str]:
    """Return the keys of `continual` that have no effect in a configuration, or are refused in it.

    Earlier examples are not replayed by a run that does not start from the champion, nor by one
    with `training.reference` or `training.minutes`. The policy that chooses between champion and
    base, and its window, need the rows of earlier versions in the registry (not `replay.sources`),
    and the room minutes, which measures the speed.
    """

    def read(section: str, name: str) -> Any:
        """Return the value of a key; None if it or its section is not given."""
        values = config.get(section)
        return values.get(name) if isinstance(values, dict) else None

    cannot_replay = any(read("training", name) is not None for name in ("reference", "minutes"))
    if cannot_replay or not read("continual", "from"):
        return {"policy", "window", "replay"}
    keeps_no_rows = read("registry", "keep_data") is False
    replay = read("continual", "replay")
    names_sources = isinstance(replay, dict) and "sources" in replay
    if keeps_no_rows or names_sources or not seams.is_there("minutes"):
        return {"policy", "window"}
    return set()


def _find_adapter(
    deployments: tuple[PlannedDeployment, ...], source: Path | None
) -> tuple[str, str]:
    """Return the adapter's name and the registry's path that all deployments train for.

    Raises ConfigError if none gives both, or they differ.
    """
    configurations = [deployment.configuration for deployment in deployments]
    sections = [config.get("registry") for config in configurations if config is not None]
    named = [[one.get("name"), one.get("path")] for one in sections if isinstance(one, dict)]
    adapter, registry = named[0] if named and named == named[:1] * len(sections) else (None, None)
    if not (isinstance(adapter, str) and isinstance(registry, str)):
        raise ConfigError(
            f"{source}: deployments need the one adapter that they train: registry.name, under "
            "which it is published, and registry.path. Add, for example,\n"
            "registry: {path: registry, name: support-bot}"
        )
    return adapter, registry


def replace_placeholders(value: Any, values: dict[str, str]) -> Any:
    """A copy with the placeholders that `values` has replaced in every text, once each."""
    if isinstance(value, dict):
        return {key: replace_placeholders(inner, values) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [replace_placeholders(inner, values) for inner in value]
    if isinstance(value, str):
        return PLACEHOLDER_PATTERN.sub(lambda found: values.get(found[1], found[0]), value)
    return value


def _require_valid_parameters(deployment: PlannedDeployment, home: str | None) -> None:
    """Raise ConfigError if the flow of a deployment that trains would refuse its configuration.

    Paths are checked in the runs' home, by this process's NESTED_TUNE_ROOTS, if that home is on
    this machine; None where it is in containers.
    """
    from flows.finetune import FinetuneParameters
    from flows.flow_runs.allowed_folders import allow_paths, with_trusted_code

    if (configuration := deployment.configuration) is None:
        return
    source = f"deployment {deployment.full_name}"
    if problems := find_problems(FinetuneParameters, configuration):
        raise ConfigError(explain_problems(problems, source, places={}))
    try:
        config = with_trusted_code(FinetuneParameters.model_validate(configuration))
        if home is not None and Path(home).is_dir():
            with chdir(home):  # where relative paths begin
                allow_paths(config)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error
