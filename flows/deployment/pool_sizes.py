"""Which work pool a fine-tune is deployed to, where the pools' devices differ in memory.

A prefect.yaml says it under `pools`: the name of each pool, and the memory of its devices in GB
(10^9 bytes), as `explain` forecasts it. What trains goes to the smallest that holds its forecast.
The runs of a sweep are runs of the fine-tune that it names, whose pool has to hold the largest too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import chdir
from dataclasses import replace

from prefect.client.schemas.actions import WorkPoolCreate

from flows.deployment.planned_deployments import (
    FINETUNE_ENTRYPOINT,
    SWEEP_ENTRYPOINT,
    DeploymentPlan,
    PlannedDeployment,
    runs_home,
)
from flows.finetune import FinetuneParameters
from flows.sweep import SweepParameters
from nested_core.config.loading import parse_config
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import ContinualSection, RegistrySection
from nested_core.errors import ConfigError
from nested_core.pipeline.sweep_points import grid_points, settings_of_point

KEYS_WITHOUT_MEMORY = ("learning_rate", "seed", "iters")
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
    sweeps = [each for each in plan.deployments if each.entrypoint == SWEEP_ENTRYPOINT]
    deployments: list[PlannedDeployment] = []
    lines: list[str] = []
    for each in plan.deployments:
        if each.entrypoint != FINETUNE_ENTRYPOINT:
            deployments.append(each)
            continue
        config = FinetuneParameters.model_validate(each.configuration).configuration()
        needs = {each.full_name: _forecast_gigabytes([config], on_wait)}
        for sweep in sweeps:
            if sweep.parameters["config"].get("deployment") == each.full_name:
                needs[sweep.full_name] = _forecast_gigabytes(_configs_of_sweep(sweep), on_wait)
        largest = max(needs, key=lambda name: needs[name])
        pool = _find_smallest_pool(largest, needs[largest], sizes)
        deployments.append(each.in_pool(pool))
        known_from = "" if largest == each.full_name else f" (for {largest})"
        needed = f"needs about {needs[largest]:.2g} GB{known_from}"
        lines.append(f"{each.full_name}: {needed}, so it is for pool {pool}")
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


def _configs_of_sweep(sweep: PlannedDeployment) -> list[FineTuneConfig]:
    """The configuration of each point, once where points differ only in what takes no memory."""
    given = SweepParameters.model_validate(sweep.parameters["config"])
    same = {key: given.base.model_dump()[key] for key in KEYS_WITHOUT_MEMORY}
    configs = (
        parse_config(settings_of_point(given.base, point) | same, source=sweep.full_name)
        for point in grid_points(given.grid)
    )
    return list({config.model_dump_json(): config for config in configs}.values())


def _forecast_gigabytes(configs: Iterable[FineTuneConfig], on_wait: Callable[[str], None]) -> float:
    """The largest peak of memory; where a run starts and where it is registered change none."""
    from nested_core.pipeline.run_explanation import explain_run

    without_registry = {"registry": RegistrySection(), "continual": ContinualSection()}
    with chdir(runs_home()):  # where relative paths begin
        return max(
            explain_run(
                config.model_copy(update=without_registry), on_wait, measures_speed=False
            ).memory.needed
            / 1e9
            for config in configs
        )


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
