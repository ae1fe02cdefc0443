"""What a run asks of rooms: how many processes train, and the services of `report_to`."""

from __future__ import annotations

import os
from typing import Any

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError

LAUNCHED_VARIABLE = "MLX_RANK"  # which mlx.launch sets for each process that it starts


def count_processes(config: FineTuneConfig) -> int:
    """Return the number of processes that train.

    Raises ConfigError if the room that starts them is not installed, or the hostfile is unusable.
    """
    training = config.training
    if (training.processes, training.hostfile) == (1, None):
        return 1
    asked = "training.processes" if training.hostfile is None else "training.hostfile"
    count: int = seams.load_only("count_processes", asked)(config)
    return count


def refuse_mlx_launch() -> None:
    """Raise ConfigError if mlx.launch started this command: each process would train alone."""
    if LAUNCHED_VARIABLE not in os.environ:
        return
    seams.load_only("train_in_processes", "mlx.launch")
    raise ConfigError(
        "mlx.launch started this command several times, and each would train a run of its own. "
        "Start it without mlx.launch, and give training.processes, or training.hostfile for "
        "several hosts: it starts mlx.launch itself."
    )


def load_services(config: FineTuneConfig) -> Any:
    """Return the Services object for what `report_to` names; None if it names nothing.

    Raises ConfigError for a service that is unknown or not installed, and without the room.
    """
    return seams.load_only("services", "report_to")(config) if config.report_to else None
