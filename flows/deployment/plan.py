"""What `deploy` is to put on a server: the data of deployments/, filled in for one adapter."""

from __future__ import annotations

import os
import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.process.environment import packaged_folder
from nested_core.config.error_messages import explain_problems, find_problems
from nested_core.config.loading import read_yaml as read_config
from nested_core.config.section import Section
from nested_core.errors import ConfigError, DamagedError, NestedTuneError
from nested_core.registry.folders import create_name_folder, name_exists
from nested_core.storage.strict_files import read_regular

HOME, INTERPRETER = "NESTED_TUNE_HOME", "NESTED_TUNE_PYTHON"
PENDING_SECONDS, DEFAULT_PENDING_SECONDS = "NESTED_TUNE_PENDING_SECONDS", "600"
FINETUNE_ENTRYPOINT, SWEEP_ENTRYPOINT = "flows.finetune.finetune", "flows.sweep.sweep"
RECONCILE_ENTRYPOINT = "flows.reconcile.reconcile"
PLACEHOLDER_PATTERN = re.compile(r"\{\{ *(adapter|registry|nights|\$NESTED_TUNE_\w+) *\}\}")
ENTER_HOME = [  # the pull step of a file that has none
    {"prefect.deployments.steps.set_working_directory": {"directory": f"{{{{ ${HOME} }}}}"}}
]
MAX_FILE_BYTES = 1024 * 1024
# What a file of deployments may have, as Prefect's own format calls it; anything else is refused.
PROJECT_KEYS = frozenset({"name", "prefect-version", "pull", "definitions", "deployments"})
DEPLOYMENT_KEYS = frozenset(
    {"name", "entrypoint", "description", "tags", "work_pool", "concurrency_limit", "schedules"}
    | {"parameters"}
)


@dataclass(frozen=True)
class DeploymentPlan:
    """The content of prefect.yaml for one adapter, and what all adapters of a server share."""

    adapter: str
    registry: str
    project: dict[str, Any]
    work_pools: list[dict[str, Any]]
    automations: list[dict[str, Any]]

    @property
    def deployments(self) -> list[dict[str, Any]]:
        """The deployments, each as prefect.yaml writes it."""
        listed: list[dict[str, Any]] = self.project["deployments"]
        return listed


def make_plan(file: Path | None = None, config: Path | None = None) -> DeploymentPlan:
    """The plan for a configuration and a prefect.yaml, or for those that are shipped.

    A configuration wins over the keys that the deployments of `file` give. Placeholders of `file`
    are replaced and nothing else is: a configuration that trains, from either file, keeps each of
    its characters. ConfigError where the adapter's name is not known, or where a deployment that
    trains would be refused by its flow.
    """
    folder = packaged_folder("deployments")
    if config is None and file is None:
        config = folder / "geography.yaml"
    given = {} if config is None else read_config(config)
    given = {key: value for key, value in given.items() if value is not None}  # the default
    project_file = file or folder / "prefect.yaml"
    project = read_deployments_yaml(project_file)
    _require_deployments(project, project_file)
    configurations = [
        _take_configuration(deployment, given) for deployment in project["deployments"]
    ]
    adapter, registry = _find_adapter(configurations, config or file)
    # No other variable of the environment is put into anything that the server is given.
    interpreter = os.environ.get(INTERPRETER) or shlex.quote(sys.executable)
    values = {"adapter": adapter, "registry": registry}
    values |= {f"${HOME}": runs_home(), f"${INTERPRETER}": interpreter}
    project = replace_placeholders({"pull": ENTER_HOME} | project, values)
    for deployment, configuration in zip(project["deployments"], configurations, strict=True):
        _put_configuration(deployment, configuration)
    plan = DeploymentPlan(
        adapter=adapter,
        registry=registry,
        project=project,
        work_pools=read_deployments_yaml(folder / "work-pools.yaml")["work_pools"],
        automations=read_automations_yaml(folder / "automations.yaml"),
    )
    for deployment in plan.deployments:
        _require_valid_parameters(deployment)
    return plan


def runs_home() -> str:
    """The folder that the runs start in, and relative paths with them."""
    return os.environ.get(HOME) or str(Path.cwd())


def begin_name(plan: DeploymentPlan) -> str:
    """Make the adapter's empty folder in its registry, below the runs' home; say what came of it.

    A run of a deployment begins no name by itself, unless its worker's NESTED_TUNE_REGISTRIES lists
    the registry. What another user owns is left to that.
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


def read_deployments_yaml(path: Path) -> dict[str, Any]:
    """One of the files of deployments/, or a person's own in its place; ConfigError for others."""
    try:
        content = yaml.safe_load(read_regular(path, MAX_FILE_BYTES, follow_links=True))
    except (OSError, DamagedError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, as in deployments/prefect.yaml.")
    return content


def read_automations_yaml(path: Path) -> list[dict[str, Any]]:
    """The automations, with the bounds that the environment gives; ConfigError for no number."""
    bound = os.environ.get(PENDING_SECONDS) or DEFAULT_PENDING_SECONDS
    listed = read_deployments_yaml(path)["automations"]
    automations: list[dict[str, Any]] = replace_placeholders(listed, {f"${PENDING_SECONDS}": bound})
    for automation in automations:
        try:
            automation["trigger"]["within"] = float(automation["trigger"]["within"])
        except ValueError:
            raise ConfigError(
                f"{PENDING_SECONDS}={bound!r:.40} is no number. Expected seconds, such as 600."
            ) from None
    return automations


def _require_deployments(project: dict[str, Any], path: Path) -> None:
    """Raise ConfigError unless the file has deployments of the shape that a plan is made from."""
    deployments = project.get("deployments")
    if not isinstance(deployments, list) or not all(map(_is_deployment, deployments)):
        raise ConfigError(
            f"{path}: expected the list `deployments`, each with a name, an entrypoint and a "
            "work_pool with a name, and parameters.config where it trains, as in "
            "deployments/prefect.yaml."
        )
    unknown = project.keys() - PROJECT_KEYS
    unknown |= {key for deployment in deployments for key in deployment.keys() - DEPLOYMENT_KEYS}
    if unknown:
        raise ConfigError(
            f"{path}: `nested-tune deploy` does not know {', '.join(sorted(map(str, unknown)))}. "
            f"Expected at the top {', '.join(sorted(PROJECT_KEYS))}, and of a deployment "
            f"{', '.join(sorted(DEPLOYMENT_KEYS))}."
        )


def _is_deployment(value: object) -> bool:
    if not isinstance(value, dict) or not {"name", "entrypoint", "work_pool"} <= value.keys():
        return False
    if not isinstance(value["work_pool"], dict) or "name" not in value["work_pool"]:
        return False
    config = (value.get("parameters") or {}).get("config")
    if value["entrypoint"] == SWEEP_ENTRYPOINT:
        return isinstance(config, dict) and isinstance(config.get("base"), dict)
    return value["entrypoint"] != FINETUNE_ENTRYPOINT or isinstance(config, dict)


def full_name(deployment: dict[str, Any]) -> str:
    """FLOW/DEPLOYMENT; our flows are named as their functions are."""
    return f"{deployment['entrypoint'].rpartition('.')[2]}/{deployment['name']}"


def adapter_of(parameters: dict[str, Any]) -> str | None:
    """The adapter that a deployment's parameters name; None where they name none or several."""
    config = parameters.get("config", {})
    registry = config.get("base", config).get("registry")
    if isinstance(registry, dict):
        name = registry.get("name")
    else:
        names = config.get("names") or ()
        name = config.get("name") or (next(iter(names)) if len(names) == 1 else None)
    return None if name is None else str(name)


def _take_configuration(deployment: dict[str, Any], given: dict[str, Any]) -> dict[str, Any] | None:
    """Take the configuration out of a deployment that trains, with `given` laid over it."""
    if deployment["entrypoint"] == FINETUNE_ENTRYPOINT:
        return _merge_config(deployment["parameters"].pop("config"), given)
    if deployment["entrypoint"] == SWEEP_ENTRYPOINT:
        return _merge_config(deployment["parameters"]["config"].pop("base"), given)
    return None


def _put_configuration(deployment: dict[str, Any], configuration: dict[str, Any] | None) -> None:
    """Put a configuration back where it was taken from."""
    if deployment["entrypoint"] == FINETUNE_ENTRYPOINT:
        deployment["parameters"]["config"] = configuration
    elif deployment["entrypoint"] == SWEEP_ENTRYPOINT:
        deployment["parameters"]["config"]["base"] = configuration


def _merge_config(shipped: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `shipped`, key by key in sections too; the configuration's keys come first."""
    merged = dict(given)
    for key, value in shipped.items():
        if key not in given:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(given[key], dict):
            merged[key] = value | given[key]
    return merged


def _find_adapter(
    configurations: list[dict[str, Any] | None], source: Path | None
) -> tuple[str, str]:
    """The registry's name and path that all deployments that train agree on."""
    sections = [config.get("registry") or {} for config in configurations if config is not None]
    named = {(section.get("name"), section.get("path")) for section in sections}
    adapter, registry = named.pop() if len(named) == 1 else (None, None)
    if adapter is None or registry is None:
        raise ConfigError(
            f"{source}: deployments need the one adapter that they train: registry.name, under "
            "which it is published, and registry.path. Add, for example,\n"
            "registry: {path: registry, name: support-bot}"
        )
    return str(adapter), str(registry)


def replace_placeholders(value: Any, values: dict[str, str]) -> Any:
    """A copy with the placeholders that `values` has replaced in every text, once each."""
    if isinstance(value, dict):
        return {key: replace_placeholders(inner, values) for key, inner in value.items()}
    if isinstance(value, list):
        return [replace_placeholders(inner, values) for inner in value]
    if isinstance(value, str):
        return PLACEHOLDER_PATTERN.sub(lambda found: values.get(found[1], found[0]), value)
    return value


def _require_valid_parameters(deployment: dict[str, Any]) -> None:
    """ConfigError where the flow of a deployment that trains would refuse its configuration."""
    from flows.finetune import FinetuneParameters
    from flows.flow_runs.allowed_folders import PYTHON_SCORERS_REFUSAL
    from flows.sweep import SweepParameters

    sections: dict[str, type[Section]] = {
        FINETUNE_ENTRYPOINT: FinetuneParameters,
        SWEEP_ENTRYPOINT: SweepParameters,
    }
    section = sections.get(deployment["entrypoint"])
    if section is None:
        return
    config = deployment["parameters"]["config"]
    problems = find_problems(section, config)
    source = f"deployment {full_name(deployment)}"
    if (config.get("base", config).get("gate") or {}).get("allow_python_scorers"):
        raise ConfigError(f"{source}: {PYTHON_SCORERS_REFUSAL}")
    if problems:
        raise ConfigError(explain_problems(problems, source, places={}))
