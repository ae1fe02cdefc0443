"""Which work pool a fine-tune is deployed to, where the pools' devices differ in memory.

A prefect.yaml says it under `pools`: the name of each pool, and the memory of its devices in GB
(10^9 bytes), as `explain` forecasts it. What trains goes to the smallest that holds its forecast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import chdir
from dataclasses import replace

from prefect.client.schemas.actions import WorkPoolCreate

from flows.deployment.planned_deployments import (
    FINETUNE_ENTRYPOINT,
    DeploymentPlan,
    PlannedDeployment,
    runs_home,
)
from flows.finetune import FinetuneParameters
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
        if each.entrypoint != FINETUNE_ENTRYPOINT:
            deployments.append(each)
            continue
        gigabytes = _forecast_gigabytes(each, on_wait)
        pool = _find_smallest_pool(each.full_name, gigabytes, sizes)
        work_pool = each.work_pool.model_copy(update={"name": pool})
        deployments.append(each.model_copy(update={"work_pool": work_pool}))
        lines.append(f"{each.full_name}: needs about {gigabytes:.2g} GB, so it is for pool {pool}")
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


def _forecast_gigabytes(deployment: PlannedDeployment, on_wait: Callable[[str], None]) -> float:
    """The peak of a fine-tune's memory; where it starts and where it is registered change none."""
    from nested_core.pipeline.run_explanation import explain_run

    given = FinetuneParameters.model_validate(deployment.configuration)
    config = given.configuration().model_copy(
        update={"registry": RegistrySection(), "continual": ContinualSection()}
    )
    with chdir(runs_home()):  # where relative paths begin
        return explain_run(config, on_wait, measures_speed=False).memory.needed / 1e9


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
