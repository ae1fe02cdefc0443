"""Which work pool a fine-tune is deployed to, where the pools' devices differ in memory.

A prefect.yaml says it under `pools`: the name of each pool, and the memory of its devices in GB
(10^9 bytes), as `explain` forecasts it. What trains goes to the smallest that holds its forecast.
What a room's flow has a fine-tune's deployment train goes to that one's pool, which has to hold it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import chdir
from dataclasses import replace

from prefect.client.schemas.actions import WorkPoolCreate

from flows.finetune import FinetuneParameters
from flows.rooms.deploy.planned_deployments import (
    FINETUNE_ENTRYPOINT,
    DeploymentPlan,
    PlannedDeployment,
    runs_home,
)
from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import ContinualSection, RegistrySection
from nested_core.errors import ConfigError

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
    deployments: list[PlannedDeployment] = []
    lines: list[str] = []
    for each in plan.deployments:
        if each.entrypoint != FINETUNE_ENTRYPOINT:
            deployments.append(each)
            continue
        config = FinetuneParameters.model_validate(each.configuration).configuration()
        needs = {each.full_name: _forecast_gigabytes([config], on_wait)}
        for other in plan.deployments:
            configs = _list_trained_by(each.full_name, other)
            if configs:
                needs[other.full_name] = _forecast_gigabytes(configs, on_wait)
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


def _list_trained_by(name: str, other: PlannedDeployment) -> list[FineTuneConfig]:
    """What the deployment `name` trains for another, once where only what takes no memory differs.

    Empty where the other is no room's flow that has this one train.
    """
    flow = seams.find_training_flow(other.entrypoint)
    if flow is None or other.parameters["config"].get("deployment") != name:
        return []
    given = seams.load(flow.parameters).model_validate(other.parameters["config"])
    first, *others = given.configurations()
    same = {key: getattr(first, key) for key in KEYS_WITHOUT_MEMORY}
    configs = (first, *(config.model_copy(update=same) for config in others))
    return list({config.model_dump_json(): config for config in configs}.values())


def _forecast_gigabytes(configs: Iterable[FineTuneConfig], on_wait: Callable[[str], None]) -> float:
    """The largest peak of memory; where a run starts and where it is registered change none."""
    from nested_core.pipeline.run_explanation import explain_run

    seams.require("memory", "pools")
    without_registry = {"registry": RegistrySection(), "continual": ContinualSection()}
    with chdir(runs_home()):  # where relative paths begin
        return max(
            (
                explain_run(
                    config.model_copy(update=without_registry), on_wait, measures_speed=False
                ).memory.needed
                or 0
            )
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
