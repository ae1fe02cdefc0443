"""What a run asks of rooms: how many processes train, and the services of `report_to`."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError
from nested_core.models.session import Session
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reports.training_callback import TrainingCallback

OnStart = Callable[[Any], None] | None
LAUNCHED_VARIABLE = "MLX_RANK"  # which mlx.launch sets for each process that it starts


@dataclass(frozen=True)
class Processes:
    """A room's training in several processes.

    count: returns the number of a run's processes; ConfigError for an unusable hostfile.
    train: trains a run in this number of processes. A callback, if there is one, gets the reports;
        the last argument is called with what stands for the trainer before the first step.
    helping: returns the context in which such processes compute losses of the session's gate too.
    """

    count: Callable[[FineTuneConfig], int]
    train: Callable[[FineTuneConfig, RunDirectory, int, TrainingCallback | None, OnStart], None]
    helping: Callable[[FineTuneConfig, Session], AbstractContextManager[None]]


class ServicesOfRun(Protocol):
    """The services that `report_to` names."""

    def reporting(
        self, run: RunDirectory, callback: TrainingCallback | None
    ) -> AbstractContextManager[TrainingCallback]:
        """Return a context of training; its callback reports to the services and to `callback`."""


@dataclass(frozen=True)
class ReportingServices:
    """A room's services that losses are reported to.

    of_config: returns those of `report_to`; ConfigError for one that cannot be used.
    """

    of_config: Callable[[FineTuneConfig], ServicesOfRun]


def count_processes(config: FineTuneConfig) -> int:
    """Return the number of processes that train.

    Raises ConfigError if the room that starts them is not installed, or the hostfile is unusable.
    """
    training = config.training
    if (training.processes, training.hostfile) == (1, None):
        return 1
    asked = "training.processes" if training.hostfile is None else "training.hostfile"
    return seams.load_only(Processes, asked).count(config)


def refuse_mlx_launch() -> None:
    """Raise ConfigError if mlx.launch started this command: each process would train alone."""
    if LAUNCHED_VARIABLE not in os.environ:
        return
    seams.load_only(Processes, "mlx.launch")
    raise ConfigError(
        "mlx.launch started this command several times, and each would train a run of its own. "
        "Start it without mlx.launch, and give training.processes, or training.hostfile for "
        "several hosts: it starts mlx.launch itself."
    )


def load_services(config: FineTuneConfig) -> ServicesOfRun | None:
    """Return the services that `report_to` names; None if it names nothing.

    Raises ConfigError for a service that is unknown or not installed, and without the room.
    """
    if not config.report_to:
        return None
    return seams.load_only(ReportingServices, "report_to").of_config(config)
