"""The held-out examples of the champion and its ancestors, by which a candidate may be judged.

They come from the registry's data store. An example that newer data answers otherwise says nothing
of forgetting, and one that the run's gate or a newer version is judged by is judged there: both are
left out and counted. An adapter that a run goes on from without a registry was judged by the rows
that its own run holds out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import compress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset, replay_settings
from nested_core.data.example_rows import read_split_rows
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError, DamagedError, DatasetError, shorten
from nested_core.records.dataset import held_out_split, read_dataset_record
from nested_core.records.verdict import AncestorLoss
from nested_core.registry.data_store import (
    StoredData,
    StoredRow,
    read_lineage,
    read_stored_data,
    render_row,
)
from nested_core.registry.folders import VERSIONS_FOLDER_NAME
from nested_core.registry.ledger import LEDGER_NAME
from nested_core.registry.link_and_views import reading
from nested_core.rooms.replay.replayed_examples import (
    KeyedRow,
    NewerRows,
    Row,
    key_rows,
    read_held_out_file,
    read_new_data,
)
from nested_core.storage.run_directory import RunDirectory

MAX_ANCESTORS = 100  # the newest
MAX_ROWS = 2_000  # of all ancestors together: what a gate measures of them costs no more
MAX_ROWS_PER_ANCESTOR = 200


@dataclass(frozen=True)
class AncestorExamples:
    """What is left of the held-out examples of one version.

    entry: what gate.json says of the version before anything is compared: how many examples are
        left out, and why there are none.
    rows: those to judge by. Of more than MAX_ROWS_PER_ANCESTOR, or where all ancestors have more
        than MAX_ROWS, the first by their digests: each night draws the same, or a part of them.
    """

    entry: AncestorLoss
    rows: tuple[StoredRow, ...] = ()


def choose_ancestor_examples(
    config: FineTuneConfig, registry: Path, name: str, champion: str
) -> list[AncestorExamples]:
    """Return the held-out examples of the champion and its ancestors, newest first.

    There are at most MAX_ANCESTORS versions. An example is left out if newer data has or
    contradicts it: the data of the run, or of a later version.
    """
    lineage = read_lineage(registry, name, champion)[:MAX_ANCESTORS]
    stored = {version: _read_stored(registry, name, version) for version in lineage}
    is_kept = any(stored.values())
    newer = read_new_data(config, held_out_is_judged=True) if is_kept else NewerRows()
    with reading(registry, name) as (_, ledger):
        history = ledger.by_version
    chosen = []
    for version in lineage:
        registered = next((line.time for _, line in history.get(version, ())), None)
        entry = AncestorLoss(version, registered=registered)
        if (data := stored[version]) is None:
            problem = "none of its examples are kept, or they cannot be read"
            chosen.append(AncestorExamples(replace(entry, not_compared=problem)))
            continue
        held_out = key_rows(row.row for row in data.held_out)
        entry = replace(entry, missing=data.missing)
        chosen.append(_leave_out(entry, data.held_out, held_out, newer))
        newer.add(key_rows(row.row for row in data.train), are_held_out=False)
        newer.add(held_out, are_held_out=True)
    max_rows = share_rows([len(ancestor.rows) for ancestor in chosen])
    return [replace(ancestor, rows=ancestor.rows[:max_rows]) for ancestor in chosen]


def choose_examples(
    config: FineTuneConfig, champion: str | None, parent: str
) -> list[AncestorExamples]:
    """Return the held-out examples that a run is judged by beside its own; none without earlier.

    They are those of the champion and its ancestors, or else of the adapter that
    `resume_adapter_file` names.

    champion: the version that the run is compared with, if any. parent: that adapter's digest.
    """
    if champion is not None and config.registry.location is not None:
        return choose_ancestor_examples(config, *config.registry.location, champion)
    return [] if config.resume_adapter_file is None else choose_parent_examples(config, parent)


def choose_parent_examples(config: FineTuneConfig, parent: str) -> list[AncestorExamples]:
    """Return the held-out examples of the adapter that `resume_adapter_file` names.

    It is a version of a registry, which has ancestors too, or the adapter of a run, whose folder
    names its data. Of any other, or where the data has changed, the entry says why there are none.

    parent: its digest.
    """
    folder = Path(config.resume_adapter_file or "").resolve().parent
    name = folder.parent.parent  # of `/` it is `/`
    if folder.parent.name == VERSIONS_FOLDER_NAME and (name / LEDGER_NAME).is_file():
        return choose_ancestor_examples(config, name.parent, name.name, folder.name)
    entry = AncestorLoss(parent)
    runs = [one for one in map(RunDirectory, folder.parents[:2]) if one.dataset.is_file()]
    if not runs:
        problem = "its run, and so its held-out examples, are not known"
        return [AncestorExamples(replace(entry, not_compared=problem))]
    try:
        rows = _read_judging_rows(runs[0])
    except (ConfigError, DamagedError, DatasetError, OSError) as error:
        problem = f"its held-out examples cannot be read: {shorten(error, 200)}"
        return [AncestorExamples(replace(entry, not_compared=problem))]
    keyed = key_rows(rows)
    stored = tuple(StoredRow(keys.content.hex(), dict(row)) for row, keys in keyed)
    chosen = _leave_out(entry, stored, keyed, read_new_data(config, held_out_is_judged=True))
    return [replace(chosen, rows=chosen.rows[:MAX_ROWS_PER_ANCESTOR])]


def _read_judging_rows(run: RunDirectory) -> Sequence[Row]:
    """Read the rows that a run's gate judged by; DatasetError if they have changed since."""
    config, recorded = read_run_config(run), read_dataset_record(run.dataset).splits
    split = held_out_split(config.gate.held_out, recorded)
    if split is None:
        return read_held_out_file(config)
    settings = DataSettings.from_config(config)
    read = read_split_rows(settings, split)
    if read is None or read.digest != recorded[split].digest:
        raise DatasetError(f"the {split} set of {settings.describe_source} has changed")
    return read.rows


def _leave_out(
    entry: AncestorLoss, stored: Sequence[StoredRow], keyed: Sequence[KeyedRow], newer: NewerRows
) -> AncestorExamples:
    """Return a version's examples without those that newer data has or contradicts: counted.

    stored, keyed: its rows, in the same order, as they are kept and with their keys.
    """
    reasons = [newer.find_reason(*one) for one in keyed]
    # A row that newer data trains on is kept here: the measurement leaves it out as trained on
    rows = list(compress(stored, [reason in (None, "repeated") for reason in reasons]))
    entry = replace(
        entry,
        superseded=reasons.count("superseded"),
        repeated=reasons.count("held_out"),
        not_compared=None if rows else _describe_none_left(reasons),
    )
    return AncestorExamples(entry, tuple(sorted(rows, key=lambda row: row.digest)))


def share_rows(counts: Sequence[int]) -> int:
    """Return how many rows an ancestor may have at most, for all to have MAX_ROWS together."""
    most = MAX_ROWS_PER_ANCESTOR
    while sum(min(count, most) for count in counts) > MAX_ROWS:
        most -= 1
    return most


def _read_stored(registry: Path, name: str, version: str) -> StoredData | None:
    """Read the examples of a version; None if their list is damaged, which `audit` reports."""
    try:
        return read_stored_data(registry, name, version)
    except DamagedError:
        return None


def list_ancestor_digests(registry: Path, name: str, champion: str) -> list[Any]:
    """List the versions that `choose_ancestor_examples` reads, and the digests of what is kept."""
    lineage = read_lineage(registry, name, champion)[:MAX_ANCESTORS]
    stored = [_read_stored(registry, name, version) for version in lineage]
    return [
        [version, data and [[row.digest for row in rows] for rows in (data.train, data.held_out)]]
        for version, data in zip(lineage, stored, strict=True)
    ]


def _describe_none_left(why: Sequence[str | None]) -> str:
    if not why:
        return "no held-out examples of it are there"
    if "superseded" not in why:
        return "its held-out examples are in newer held-out data too, and are compared there"
    return "its held-out examples are in newer data too, or have another answer there"


def tokenize_stored_rows(config: FineTuneConfig, rows: list[StoredRow]) -> TokenizedSplit:
    """Return the rows, supervised as the run's own examples are; `lines` has their places, from 1.

    A row that is no sound example under the run's settings is not among them.
    """
    with TemporaryDirectory(prefix="nested-tune-") as folder:
        path = Path(folder, "rows.jsonl")
        path.write_bytes(b"".join(render_row(row.row) + b"\n" for row in rows))
        settings = replay_settings(DataSettings.from_config(config), path)
        return load_dataset(settings, TokenizerSource.from_config(config))[1]["train"]
