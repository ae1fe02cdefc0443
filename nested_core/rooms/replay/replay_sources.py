"""Earlier data that a run may replay, read before training.

The registry's data store gives a version's examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from glob import glob
from itertools import chain
from pathlib import Path
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.data.data_settings import SPLITS, DataSettings
from nested_core.data.example_rows import read_split_rows
from nested_core.errors import ConfigError, DatasetError, shorten
from nested_core.registry.data_store import read_lineage, read_stored_data
from nested_core.registry.folders import name_exists
from nested_core.registry.ledger import read_ledger
from nested_core.registry.promotion_policy import registry_location
from nested_core.registry.queries import holding_champion
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.rooms.replay.replay_record import ReplaySource
from nested_core.rooms.replay.replayed_examples import EarlierData

MAX_REASON_CHARACTERS = 200
Rows = list[dict[str, Any]]


def read_files(config: FineTuneConfig) -> list[EarlierData]:
    """Read the data sets that `replay.sources` names, the newest first.

    One that cannot be read is returned without rows, with its `problem`.
    """
    settings = DataSettings.from_config(config)
    earlier = []
    for name in config.continual.replay.sources:
        data = replace(settings, data=name, hf_dataset=(), data_format="auto")
        exists = Path(name).exists() or glob(name, recursive=True)  # other names mean the hub
        splits, problem = _read_splits(data) if exists else ({}, "there is no such file or folder")
        if problem is None and "train" not in splits:
            problem = "there is no training example in it"
        source = ReplaySource(file=name, problem=problem)
        train = splits.pop("train", [])
        earlier.append(EarlierData(source, train, [*chain(*splits.values())]))
    return earlier


def _read_splits(settings: DataSettings) -> tuple[dict[str, Rows], str | None]:
    """The rows of a data set that is read again, by split, or why it cannot be."""
    try:
        read = {split: read_split_rows(settings, split) for split in SPLITS}
    except (ConfigError, DatasetError, FileNotFoundError, PermissionError) as error:
        reason = shorten(error, MAX_REASON_CHARACTERS)
        return {}, f"it cannot be read, and is not replayed: {reason}"
    return {split: found.rows for split, found in read.items() if found is not None}, None


@dataclass(frozen=True)
class Lineage:
    """A champion and its ancestors: what they were trained on, newest first.

    removed: the ancestor at which the known lineage ends, because it is not in the registry.
    is_recorded: the history says that it was removed; else it may never have been there.
    rows_of_first: how many rows the oldest known version's `iters` were counted for; None if its
        provenance does not say.
    """

    champion: str | None = None
    data: Sequence[EarlierData] = ()
    removed: str | None = None
    is_recorded: bool = True
    rows_of_first: float | None = None


def read_champions_lineage(config: FineTuneConfig) -> Lineage:
    """Read the data of the champion that a run follows, and of the versions before it.

    The lineage is empty without a champion, and if `replay.sources` names files instead.
    """
    if not config.continual.replay.is_lineage:
        return Lineage()
    registry, name = registry_location(config.registry)
    if not name_exists(registry, name):
        return Lineage()
    with holding_champion(registry, name) as champion:  # so that gc removes no version meanwhile
        versions = [] if champion is None else read_lineage(registry, name, champion)
        known = [each for each in versions if version_folder(registry, name, each).is_dir()]
        removed = versions[-1] if known != versions else None
        is_recorded = removed is None or read_ledger(registry / name).is_removed(removed)
        data = [_read_version(registry, name, version) for version in known]
        first = read_provenance(version_folder(registry, name, known[-1])) if known else {}
    return Lineage(champion, data, removed, is_recorded, _count_rows_of_iterations(first))


def _count_rows_of_iterations(provenance: dict[str, Any]) -> float | None:
    """Return the number of rows on which the first version of a lineage was planned to train.

    It is computed from what provenance.json records: the rows of all planned iterations, divided
    by the planned passes. For a rebuilt version these are the rows of the first night that it
    follows. None if nothing was trained.
    """
    config, trained = provenance.get("config", {}), provenance.get("trained")
    if not trained or not trained["steps"]:
        return None
    passes = trained["epochs"] * trained["planned_steps"] / trained["steps"]
    iterations = trained["planned_steps"] * config["grad_accumulation_steps"]
    if config["training"]["epochs"] is None:
        iterations = config["iters"]
    return float(iterations * config["batch_size"] / passes)


def _read_version(registry: Path, name: str, version: str) -> EarlierData:
    """What a version was trained on, of the registry's data store."""
    stored = read_stored_data(registry, name, version)
    if stored is None:
        problem = "the registry keeps no data of it: none is replayed, nor known to be held out"
        return EarlierData(ReplaySource(version=version, problem=problem))
    lost = f"{stored.missing:,} of its examples are not in the registry's data store"
    train = [row.row for row in stored.train]
    held_out = [row.row for row in (*stored.held_out, *stored.kept_out)]
    source = ReplaySource(version=version, problem=lost if stored.missing else None)
    return EarlierData(source, train, held_out)
