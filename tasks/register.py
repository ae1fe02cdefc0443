"""The task that adds a verified adapter to the registry."""

from __future__ import annotations

from pathlib import Path

from prefect import get_run_logger

from nested_core.config.schema import FineTuneConfig
from nested_core.pipeline.publishing import register_run
from nested_core.storage.dataset_record import read_dataset_record
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest
from tasks.lineage import champion_asset, dataset_asset, emit_materialization, run_asset
from tasks.retrying import REGISTRY_RETRY_DELAYS, retried_task


@retried_task("register", "register {config.registry.name}", REGISTRY_RETRY_DELAYS)
def register(config: FineTuneConfig, run_dir: Path, champion: str | None) -> str:
    """Register the run's adapter; return its version. Doing it twice changes nothing.

    `champion` is the one that stood when the run was judged.
    """
    run = RunDirectory(run_dir)
    version = register_run(config, run, champion)
    get_run_logger().info(
        "Registered %s as version %s.", config.registry.name, shorten_digest(version)
    )
    _emit_lineage(config, run, version)
    return version


def _emit_lineage(config: FineTuneConfig, run: RunDirectory, version: str) -> None:
    """The verified run as an asset, made of its data set and of the champion that it began from."""
    name = str(config.registry.name)
    digest = read_dataset_record(run.dataset).digest
    made_of = [dataset_asset(name, digest, config.data)]
    if config.continual.start is not None:
        made_of.append(champion_asset(name))
    emit_materialization(run_asset(name, run.path.name), made_of, name, {"version": version})
