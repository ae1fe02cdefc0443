"""An adapter's last night for Prometheus: a file that node_exporter's textfile collector reads."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from nested_core.records.run_status import AdapterRuns, Run
from nested_core.registry import read_champion_changes
from nested_core.registry.folders import name_exists
from nested_core.storage.folder_size import size_on_disk


@dataclass(frozen=True)
class EndedNight:
    """What became of a night: the name of its state, its seconds, and its run."""

    outcome: str
    seconds: float
    run: Run


def write_night_metrics(
    folder: Path, adapter: AdapterRuns, runs: Sequence[Run], night: EndedNight
) -> None:
    """Write FOLDER/nested_tune_NAME.prom, which everybody may read.

    runs: all that are there, of other adapters too. Raises OSError, and DamagedError for a registry
    that cannot be read.
    """
    registry = CollectorRegistry()

    def put(metric: str, meaning: str, value: float, **labels: str) -> None:
        """Add a sample of the adapter."""
        names = ("name", *labels)
        gauge = Gauge(f"nested_tune_{metric}", meaning, names, registry=registry)
        gauge.labels(adapter.name, *labels.values()).set(value)

    put("night_outcome", "1: what became of the last night.", 1.0, outcome=night.outcome)
    put("night_end_timestamp_seconds", "When the last night ended.", time.time())
    put("night_seconds", "How long the last night took.", night.seconds)
    if night.run.gate_loss is not None:
        meaning = f"{night.run.loss_unit} of its adapter, on the gate's examples."
        put("night_loss", meaning, night.run.gate_loss)
    is_begun = name_exists(adapter.registry, adapter.name)
    changes = read_champion_changes(adapter.registry, adapter.name) if is_begun else []
    if changes and changes[-1].version is not None:
        since = datetime.fromisoformat(changes[-1].time).timestamp()
        put("champion_info", "1: the champion's version.", 1.0, version=changes[-1].version)
        put("champion_timestamp_seconds", "When it became champion.", since)
    own = [run.path for run in adapter.among(runs)]
    put("runs_bytes", "Bytes of the runs.", sum(map(size_on_disk, own)))
    put("registry_bytes", "Bytes of the versions.", size_on_disk(adapter.registry / adapter.name))
    file = folder / f"nested_tune_{adapter.name}.prom"
    write_to_textfile(str(file), registry)
    file.chmod(0o644)  # a unit's umask closes files to node_exporter's user
