"""The configuration that a run began with, and which keys may differ when it is resumed."""

from __future__ import annotations

import os
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from nested_core.config.key_properties import Key, iterate_keys, replace_configured_paths
from nested_core.config.loading import parse_config, read_yaml
from nested_core.config.schema import FineTuneConfig
from nested_core.config.section_base import PathRule
from nested_core.errors import ConfigError, DamagedError, list_first
from nested_core.storage.run_directory import RunDirectory

MAX_SHOWN_DIFFERENCES = 10
BOUNDS_OF_A_SUITE = {f"gate.tasks.{key}" for key in ("min", "max_drop", "min_gain", "canary")}


def read_run_config(run: RunDirectory) -> FineTuneConfig:
    """Read the configuration that a run was started with.

    Raises ConfigError if `run` is no run directory, DamagedError if config.yaml is invalid.
    """
    run.require_begun()
    try:
        values = {key: value for key, value in read_yaml(run.config).items() if value is not None}
        return parse_config(values, source=str(run.config))
    except ConfigError as error:
        raise DamagedError(
            f"{error}\nThe run wrote this file. Bring it back, or remove it: --resume with the "
            f"configuration that the run began with writes it again."
        ) from error


def refuse_differences_on_resume(old: FineTuneConfig, new: FineTuneConfig, run_dir: Path) -> None:
    """Raise ConfigError, listing every key that must not differ on resume but does.

    old: the configuration that the run began with; new: the one that it would go on with. Each
    key's declaration says whether it may differ on resume. Paths are compared as absolute ones. The
    name whose champion a run follows, and how the suite that selects its step is asked and scored,
    stay as they are.
    """
    before, after = (_resolve_paths(config).model_dump(mode="json") for config in (old, new))
    free = {
        key.name
        for key in iterate_keys(FineTuneConfig)
        if may_differ_on_resume(key) and not key.is_section
    }
    if old.continual.start is not None:
        free.remove("registry.name")
    lines = [
        line
        for key in before
        for line in _forbidden_differences(key, before[key], after.get(key), free)
    ]
    selected, selects = _find_selecting_suite(before), _find_selecting_suite(after)
    lines += _forbidden_differences("gate.tasks", selected, selects, BOUNDS_OF_A_SUITE)
    if lines:
        shown = "".join(f"  {line}\n" for line in list_first(lines, MAX_SHOWN_DIFFERENCES))
        raise ConfigError(
            f"{run_dir} cannot be resumed with a configuration that differs from its config.yaml:\n"
            f"{shown}Give what the run began with, or another --run-dir for a new run."
        )


def _find_selecting_suite(config: dict[str, Any]) -> dict[str, object] | None:
    """Return the keys of the suite that `training.select_by` names; None if it names none."""
    name, tasks = config["training"]["select_by"], config["gate"]["tasks"]
    return next((task for task in tasks if task["name"] == name), None)


def _resolve_paths(config: FineTuneConfig) -> FineTuneConfig:
    """Return the configuration with existing paths resolved, so that equal folders are equal."""

    def resolve(_: str, rule: PathRule, value: str) -> str:
        """Resolve an existing path; a name on the hub stays as it is."""
        return os.path.realpath(value) if os.path.exists(value) else value

    return replace_configured_paths(config, resolve)


def may_differ_on_resume(key: Key) -> bool:
    """Return whether a run may be resumed with another value of this key."""
    return key.affects in ("length", "ranks", "output")


def _forbidden_differences(name: str, before: Any, after: Any, allowed: Set[str]) -> Iterator[str]:
    """Yield a line for each key that differs and is not in `allowed`, also within sections.

    before, after: the key's value in the run and now.
    """
    if before == after or name in allowed:
        return
    if isinstance(before, dict) and isinstance(after, dict):
        for key in before | after:
            yield from _forbidden_differences(
                f"{name}.{key}", before.get(key), after.get(key), allowed
            )
    else:
        yield f"{name}: {before} in the run, {after} now"
