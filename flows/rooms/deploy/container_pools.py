"""Work pools whose runs are containers: Prefect's own job templates, with what is ours in them.

What is ours (image, volume) is data, in deployments/work-pools.yaml. What a training asks for comes
from the forecast of `explain`.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect.workers.base import BaseWorker

from flows.rooms.deploy.command import PoolType
from nested_core import seams
from nested_core.config.loading import load_config
from nested_core.config.sections import ContinualSection, RegistrySection
from nested_core.errors import ConfigError

PROCESS_MIB = 1024  # of a training beside its arrays: its processes, 346 MB with the example


@dataclass(frozen=True)
class Request:
    """What the containers of a training ask for.

    memory_mib: memory in MiB; None asks for none.
    gpus: NVIDIA GPUs.
    """

    memory_mib: int | None = None
    gpus: int = 0

    def describe(self) -> str:
        """Say what is asked for, as a progress line."""
        memory = "no memory" if self.memory_mib is None else f"{self.memory_mib} MiB of memory"
        return f"request: a training asks for {memory} and {self.gpus or 'no'} GPU"

    def job_variables(self, pool: PoolType) -> dict[str, Any]:
        """Return the request as variables of Prefect's template of a type of work pool."""
        if pool == "kubernetes":
            memory = {} if self.memory_mib is None else {"memory_request": f"{self.memory_mib}Mi"}
            return memory | ({"gpus": self.gpus} if self.gpus else {})
        options: dict[str, Any] = {}
        if self.memory_mib is not None:
            options["mem_reservation"] = f"{self.memory_mib}m"
        if self.gpus:
            options["device_requests"] = [{"count": self.gpus, "capabilities": [["gpu"]]}]
        return {"container_create_kwargs": options} if options else {}


NO_REQUEST = Request()


def forecast_request(config: Path) -> Request:
    """Ask `explain` what a training of this configuration needs on a machine like this one.

    On a GPU the memory forecast is the GPU's: a GPU a process is asked for, and no memory.

    Raises what `explain` raises, ConfigError without the room planning.
    """
    seams.require("planning", "a request from the forecast of `explain`")
    from nested_core import backend
    from nested_core.rooms.planning.run_explanation import explain_run

    # Where a night starts from, and where it ends, changes no memory
    kept = {"registry": RegistrySection(), "continual": ContinualSection()}
    explained = explain_run(load_config(config).model_copy(update=kept), measures_speed=False)
    if backend.computes_on_cuda():
        return Request(gpus=explained.config.training.processes)
    needed = explained.memory.needed
    return NO_REQUEST if needed is None else Request(needed // 2**20 + PROCESS_MIB)


def make_job_template(pool: PoolType, ours: dict[str, Any]) -> dict[str, Any]:
    """Return the template of Prefect's own worker for a type of work pool, with `ours` in it.

    Raises ConfigError if the package of that worker is not installed.
    """
    worker = BaseWorker.get_worker_class_from_type(pool)
    if worker is None:
        raise ConfigError(
            f"--pool {pool} needs the package prefect-{pool}, here and where its workers are "
            f"started: pip install 'nested-tune[{pool}]'."
        )
    template: dict[str, Any] = _merge(deepcopy(worker.get_default_base_job_template()), ours)
    return template


def _merge(template: Any, ours: Any) -> Any:
    """Return `template` with the values of `ours` set or added, key by key and item by item."""
    if isinstance(template, dict) and isinstance(ours, dict):
        return template | {key: _merge(template.get(key), value) for key, value in ours.items()}
    if isinstance(template, list) and isinstance(ours, list):
        return [_merge(*pair) for pair in zip(template, ours, strict=True)]
    return ours
