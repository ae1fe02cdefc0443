"""Where the flow runs of deployments may read and write: parameters and events name paths.

`NESTED_TUNE_ROOTS` in the worker's environment lists the folders, separated as PATH is; without it
the folder that the flow runs in is the only one. A flow that a person starts at a command line may
go wherever that person may.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from prefect import runtime

from nested_core.config.data import HubDataset
from nested_core.config.key_properties import iterate_configured_paths
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError

ROOTS_VARIABLE = "NESTED_TUNE_ROOTS"
HUB_NAME_PATTERN = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
DATASET_FOLDER_ARGUMENTS = ("data_dir", "cache_dir")  # arguments of datasets.load_dataset
REMOTE_URL_PATTERN = re.compile(
    r"(https?|hf)://(?!.*::)"
)  # anything else with :// or :: may be a local file


def allowed_roots() -> tuple[Path, ...]:
    """The folders that paths in parameters must lie in, resolved."""
    listed = [folder for folder in os.environ.get(ROOTS_VARIABLE, "").split(os.pathsep) if folder]
    return tuple(Path(os.path.realpath(folder)) for folder in listed or ["."])


def require_allowed(path: str, what: str) -> Path:
    """The path as it was given; ConfigError where a deployment's run may not use it.

    Symbolic links are followed first: one that leads out of the roots is refused.
    """
    if runtime.deployment.id is None:
        return Path(path)
    roots = allowed_roots()
    if not any(Path(os.path.realpath(path)).is_relative_to(root) for root in roots):
        listed = ", ".join(map(str, roots))
        raise ConfigError(
            f"{what}: {path} is outside of the folders that this worker may use ({listed}). Give a "
            f"path inside, or start the worker with {ROOTS_VARIABLE} naming that folder too."
        )
    return Path(path)


def require_allowed_paths(config: FineTuneConfig) -> None:
    """Check every path of a configuration; a model or data set of the hub is no path."""
    if runtime.deployment.id is None:
        return
    for name, rule, value in iterate_configured_paths(config):
        if rule == "local_or_hub":
            _require_allowed_unless_on_hub(value, name)
        else:
            require_allowed(value, name)
    for index, entry in enumerate(config.hf_dataset):
        _require_allowed_arguments(entry, f"hf_dataset[{index}].config")


def refuse_python_scorers(config: FineTuneConfig) -> None:
    """Raise ConfigError for `gate.allow_python_scorers`: no parameter of a flow runs code."""
    if config.gate.allow_python_scorers:
        raise ConfigError(
            "gate.allow_python_scorers: a flow takes it from no parameter, for whoever may start a "
            "run could then run any function with the worker's rights. `nested-tune train` takes "
            "it from your own file."
        )


def _require_allowed_unless_on_hub(value: str, what: str) -> None:
    """OWNER/NAME is the hub's where nothing lies here under that name."""
    if not HUB_NAME_PATTERN.fullmatch(value) or os.path.lexists(value):
        require_allowed(value, what)


def _require_allowed_arguments(entry: HubDataset, what: str) -> None:
    """`datasets` reads the folders and files that its arguments name too."""
    folders = [Path(), Path(entry.path)]  # a relative name starts at either
    for key in DATASET_FOLDER_ARGUMENTS:
        for value in _strings_in(entry.config.get(key)):
            _require_below(folders, value, f"{what}.{key}")
    folders += [
        base / text for base in folders for text in _strings_in(entry.config.get("data_dir"))
    ]
    for value in _strings_in(entry.config.get("data_files")):
        if not REMOTE_URL_PATTERN.match(value):
            _require_below(folders, value, f"{what}.data_files")


def _require_below(folders: list[Path], value: str, what: str) -> None:
    """A path or pattern, wherever it may start; what a pattern matches now is followed too."""
    if "://" in value or "::" in value or "~" in value:
        raise ConfigError(
            f"{what}: {value!r} is neither a path nor an https:// or hf:// address. Give one of "
            f"them: other addresses can name files that this worker may not read."
        )
    for folder in folders:
        require_allowed(str(folder / value), what)
        for found in glob.iglob(str(folder / value), recursive=True):
            require_allowed(found, what)


def _strings_in(value: Any) -> Iterator[str]:
    """Every string in an argument that may be one, a list of them, or a mapping to either."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings_in(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings_in(each)
