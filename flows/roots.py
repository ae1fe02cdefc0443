"""Where the flow runs of deployments may read and write: parameters and events name paths.

`NESTED_TUNE_ROOTS` in the worker's environment lists the folders, separated as PATH is; without it
the folder that the flow runs in is the only one. A flow that a person starts at a command line may
go wherever that person may.
"""

from __future__ import annotations

import os
from pathlib import Path

from prefect import runtime

from nested_core.config import FineTuneConfig
from nested_core.errors import ConfigError

VARIABLE = "NESTED_TUNE_ROOTS"
READ_OR_WRITTEN = ("model", "data", "resume_adapter_file", "adapter_path")


def allowed_roots() -> tuple[Path, ...]:
    """The folders that paths in parameters must lie in, resolved."""
    listed = [folder for folder in os.environ.get(VARIABLE, "").split(os.pathsep) if folder]
    return tuple(Path(folder).resolve() for folder in listed or ["."])


def confined(path: str, what: str) -> Path:
    """The path as it was given; ConfigError where a deployment's run may not use it.

    Symbolic links are followed first: one that leads out of the roots is refused.
    """
    if runtime.deployment.id is None:
        return Path(path)
    roots = allowed_roots()
    if not any(Path(path).resolve().is_relative_to(root) for root in roots):
        listed = ", ".join(map(str, roots))
        raise ConfigError(
            f"{what}: {path} is outside of the folders that this worker may use ({listed}). Give a "
            f"path inside, or start the worker with {VARIABLE} naming that folder too."
        )
    return Path(path)


def confine_configuration(config: FineTuneConfig) -> None:
    """Check every path of a configuration; a model or data set of the hub is no path."""
    for key in READ_OR_WRITTEN:
        if (value := getattr(config, key)) is not None:
            confined(value, key)
    if config.training.hostfile is not None:
        confined(config.training.hostfile, "training.hostfile")
    if config.gate.general_data is not None:
        confined(config.gate.general_data, "gate.general_data")
    if config.registry.path is not None:
        confined(config.registry.path, "registry.path")
