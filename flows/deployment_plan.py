"""What `deploy` is to put on a server: the data of deployments/, filled in for one adapter."""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flows.packaged_files import packaged_folder
from nested_core.config.error_messages import explain_problems, find_problems
from nested_core.config.loading import read_yaml as read_config
from nested_core.config.section import Section
from nested_core.errors import ConfigError, DamagedError
from nested_core.storage.strict_files import read_regular

HOME, INTERPRETER = "NESTED_TUNE_HOME", "NESTED_TUNE_PYTHON"
FINETUNE_ENTRYPOINT, SWEEP_ENTRYPOINT = "flows.finetune.finetune", "flows.sweep.sweep"
RECONCILE_ENTRYPOINT = "flows.reconcile.reconcile"
PLACEHOLDER_PATTERN = re.compile(r"\{\{ *(adapter|registry) *\}\}")
MAX_FILE_BYTES = 1024 * 1024


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

    A configuration wins over the keys that the deployments of `file` give. ConfigError where the
    adapter's name is not known, or where a deployment that trains would be refused by its flow.
    """
    folder = packaged_folder("deployments")
    if config is None and file is None:
        config = folder / "geography.yaml"
    given = {} if config is None else _drop_nulls(read_config(config))
    project_file = file or folder / "prefect.yaml"
    project = read_deployments_yaml(project_file)
    _require_deployments(project, project_file)
    for deployment in project["deployments"]:
        _fill_in_configuration(deployment, given)
    adapter, registry = _find_adapter(project, config or file)
    values = {"adapter": adapter, "registry": registry}
    plan = DeploymentPlan(
        adapter=adapter,
        registry=registry,
        project=replace_placeholders(project, values),
        work_pools=read_deployments_yaml(folder / "work-pools.yaml")["work_pools"],
        automations=read_deployments_yaml(folder / "automations.yaml")["automations"],
    )
    for deployment in plan.deployments:
        _require_valid_parameters(deployment)
    return plan


def read_deployments_yaml(path: Path) -> dict[str, Any]:
    """One of the files of deployments/, or a person's own in its place; ConfigError for others."""
    try:
        content = yaml.safe_load(read_regular(path, MAX_FILE_BYTES, follow_links=True))
    except (OSError, DamagedError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"{path}: expected keys and values, as in deployments/prefect.yaml.")
    return content


def _require_deployments(project: dict[str, Any], path: Path) -> None:
    """Raise ConfigError unless the file has deployments of the shape that a plan is made from."""
    deployments = project.get("deployments")
    if not isinstance(deployments, list) or not all(map(_is_deployment, deployments)):
        raise ConfigError(
            f"{path}: expected the list `deployments`, each with a name and an entrypoint, and "
            "parameters.config where it trains, as in deployments/prefect.yaml."
        )


def _is_deployment(value: object) -> bool:
    if not isinstance(value, dict) or not {"name", "entrypoint"} <= value.keys():
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


def prefect_yaml_variables() -> dict[str, str]:
    """The environment variables that prefect.yaml names: the runs' home and their interpreter."""
    home = os.environ.get(HOME) or str(Path.cwd())
    interpreter = os.environ.get(INTERPRETER) or shlex.quote(sys.executable)
    return {HOME: home, INTERPRETER: interpreter}


def _drop_nulls(values: dict[str, Any]) -> dict[str, Any]:
    """As in every configuration file, null at the top is the default."""
    return {key: value for key, value in values.items() if value is not None}


def _fill_in_configuration(deployment: dict[str, Any], given: dict[str, Any]) -> None:
    """Lay a configuration's keys over those of a deployment that trains."""
    config = deployment.get("parameters", {}).get("config")
    if deployment["entrypoint"] == FINETUNE_ENTRYPOINT:
        deployment["parameters"]["config"] = _merge_config(config, given)
    elif deployment["entrypoint"] == SWEEP_ENTRYPOINT:
        config["base"] = _merge_config(config["base"], given)


def _merge_config(shipped: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """`given` over `shipped`, key by key in sections too; the configuration's keys come first."""
    merged = dict(given)
    for key, value in shipped.items():
        if key not in given:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(given[key], dict):
            merged[key] = value | given[key]
    return merged


def _training_configurations(project: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The configuration of each deployment that trains."""
    for deployment in project["deployments"]:
        config = deployment.get("parameters", {}).get("config", {})
        if deployment["entrypoint"] == FINETUNE_ENTRYPOINT:
            yield config
        elif deployment["entrypoint"] == SWEEP_ENTRYPOINT:
            yield config["base"]


def _find_adapter(project: dict[str, Any], source: Path | None) -> tuple[str, str]:
    """The registry's name and path that all deployments that train agree on."""
    sections = [config.get("registry") or {} for config in _training_configurations(project)]
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
    """A copy with {{ adapter }} and {{ registry }} replaced in every text."""
    if isinstance(value, dict):
        return {key: replace_placeholders(inner, values) for key, inner in value.items()}
    if isinstance(value, list):
        return [replace_placeholders(inner, values) for inner in value]
    if isinstance(value, str):
        return PLACEHOLDER_PATTERN.sub(lambda found: values[found[1]], value)
    return value


def _require_valid_parameters(deployment: dict[str, Any]) -> None:
    """ConfigError where the flow of a deployment that trains would refuse its configuration."""
    from flows.finetune import FinetuneParameters
    from flows.sweep import SweepParameters

    sections: dict[str, type[Section]] = {
        FINETUNE_ENTRYPOINT: FinetuneParameters,
        SWEEP_ENTRYPOINT: SweepParameters,
    }
    section = sections.get(deployment["entrypoint"])
    if section is None:
        return
    problems = find_problems(section, deployment["parameters"]["config"])
    if problems:
        source = f"deployment {full_name(deployment)}"
        raise ConfigError(explain_problems(problems, source, lines={}))
