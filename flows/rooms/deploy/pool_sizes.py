"""Which work pool a fine-tune is deployed to, where the pools' devices differ in memory.

A prefect.yaml says it under `pools`: the name of each pool, and the memory of its devices in GB
(10^9 bytes), as `explain` forecasts it. What trains goes to the smallest that holds its forecast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import chdir
from dataclasses import replace

from prefect.client.schemas.actions import WorkPoolCreate

from flows.finetune import FinetuneParameters
from flows.rooms.deploy.planned_deployments import DeploymentPlan, PlannedDeployment, runs_home
from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import ContinualSection, RegistrySection
from nested_core.errors import ConfigError

POOL_DESCRIPTION = (
    "Training that is forecast to need at most {size:g} GB of a device's memory, one run at a "
    "time; one worker on each machine that has such a device."
)


def route_by_forecast(
    plan: DeploymentPlan, on_wait: Callable[[str], None]
) -> tuple[DeploymentPlan, list[str]]:
    """The plan with each fine-tune in the smallest pool that holds it, and a line for each.

    Unchanged where the plan says nothing of its pools' sizes. The forecast is that of `explain` on
    this machine's kind of device, which is held meanwhile; `on_wait` is told who has it. Raises
    ConfigError where no pool is large enough, and what `explain` raises.
    """
    sizes = plan.pool_sizes
    if not sizes:
        return plan, []
    deployments: list[PlannedDeployment] = []
    lines: list[str] = []
    for each in plan.deployments:
        if each.configuration is None:
            deployments.append(each)
            continue
        config = FinetuneParameters.model_validate(each.configuration).configuration()
        needed = _forecast_gigabytes(config, on_wait)
        pool = _find_smallest_pool(each.full_name, needed, sizes)
        deployments.append(each.in_pool(pool))
        lines.append(f"{each.full_name}: needs about {needed:.2g} GB, so it is for pool {pool}")
    known = {pool.name for pool in plan.work_pools}
    pools = [
        WorkPoolCreate(
            name=name,
            type="process",
            concurrency_limit=1,
            description=POOL_DESCRIPTION.format(size=size),
        )
        for name, size in sizes.items()
        if name not in known
    ]
    routed = replace(plan, deployments=tuple(deployments), work_pools=[*plan.work_pools, *pools])
    return routed, lines


def _forecast_gigabytes(config: FineTuneConfig, on_wait: Callable[[str], None]) -> float:
    """The peak of memory; where a run starts and where it is registered does not change it."""
    seams.require("memory", "pools")
    seams.require("planning", "pools")
    from nested_core.rooms.planning.run_explanation import explain_run

    changes = {"registry": RegistrySection(), "continual": ContinualSection()}
    with chdir(runs_home()):  # where relative paths begin
        run = explain_run(config.model_copy(update=changes), on_wait, measures_speed=False)
    return (run.memory.needed or 0) / 1e9


def _find_smallest_pool(name: str, gigabytes: float, sizes: Mapping[str, float]) -> str:
    fitting = [pool for pool in sizes if sizes[pool] >= gigabytes]
    if fitting:
        return min(fitting, key=lambda pool: sizes[pool])
    listed = ", ".join(f"{pool}: {size:g}" for pool, size in sizes.items())
    raise ConfigError(
        f"{name} needs about {gigabytes:.2g} GB, and no pool holds that much (pools: {{{listed}}}, "
        f"in GB). Lower batch_size or max_seq_length, set grad_checkpoint: true, or name a pool "
        f"of larger devices. `nested-tune explain -c CONFIG` says which settings need less."
    )
