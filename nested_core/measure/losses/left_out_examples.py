"""Find what an adapter was trained on, to leave such rows out of the examples that judge it.

A run records it at its beginning, for itself and all adapters that it comes from; a version's
provenance has it from the run.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from nested_core.data.example_digests import TrainedRows
from nested_core.errors import DamagedError
from nested_core.registry.folders import VERSIONS_FOLDER_NAME, list_names
from nested_core.registry.versions import PROVENANCE_NAME, read_provenance, version_folder
from nested_core.storage.adapter import Adapter
from nested_core.storage.atomic import write_json
from nested_core.storage.manifest import read_manifest
from nested_core.storage.output_places import TRAINING_EXAMPLES_NAME
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import collect_strings, read_json_object, regular_sha256
from nested_core.text.digest_format import shorten_digest

ADAPTER_KEY = "adapter"  # beside an exported adapter: the SHA-256 of its weights, in a line


def read_version_rows(version: Path) -> TrainedRows:
    """Return what a version and its ancestors were trained on, as its provenance records it."""
    recorded = {}
    with suppress(DamagedError):  # `audit` and `promote` report the damage
        recorded = read_provenance(version)
    return TrainedRows.from_json(recorded, f"version {shorten_digest(version.name)}")


def read_run_rows(run: RunDirectory) -> TrainedRows:
    """Return what a run and its ancestors were trained on, as the run recorded it."""
    path = run.training_examples
    return TrainedRows.from_json(read_json_object(path) if path.is_file() else {}, str(run.path))


def write_exported_rows(folder: Path, rows: TrainedRows) -> None:
    """Record beside an exported adapter what it was trained on, and that it is this adapter."""
    record = rows.to_json() | {ADAPTER_KEY: " ".join(_hash_weights(folder))}
    write_json(folder / TRAINING_EXAMPLES_NAME, record)


def find_trained_rows(
    adapter: Adapter, registry: Path | None, place: Path | None = None
) -> TrainedRows:
    """Return what an adapter was trained on, by what it is: a run's, a version, or a copy of one.

    registry: where a version with the same tensors is looked for, under any name.
    place: the folder that the adapter was read from, if it was converted.
    """
    place = (place or adapter.path).resolve()
    folder, weights = (place.parent if place.is_file() else place), _hash_weights(place)
    for run in (RunDirectory(folder.parent), RunDirectory(folder.parent.parent)):
        if run.config.is_file() and weights <= _read_hashes_of_run(run):
            return read_run_rows(run)
    if (exported := folder / TRAINING_EXAMPLES_NAME).is_file():  # in `adapter_path`
        recorded = read_json_object(exported)
        if weights <= {*str(recorded.get(ADAPTER_KEY)).split()}:
            return TrainedRows.from_json(recorded, str(folder))
    digest, copies = adapter.digest(), []
    if registry is not None:
        copies = [version_folder(registry, name, digest) for name in list_names(registry)]
    for version in (folder, *copies):
        if (version / PROVENANCE_NAME).is_file() and digest == _read_version_digest(version):
            return read_version_rows(version)
    return TrainedRows(unknown=f"{place} is neither a run's adapter nor a registered version")


def _hash_weights(place: Path) -> set[str]:
    """Return the SHA-256 of a file of weights, or of those in a folder, mlx-lm's or PEFT's."""
    files = [place] if place.is_file() else place.glob("adapter*.safetensors")
    return {regular_sha256(path, follow_links=True) for path in files}


def _read_hashes_of_run(run: RunDirectory) -> set[str]:
    """Return the SHA-256 of each file that a run's checkpoints and its verdict list."""
    hashes = set[str]()
    for folder in (run.path, *run.checkpoints.glob("*")):
        with suppress(DamagedError):  # not written yet, or damaged: then it lists nothing
            hashes.update(collect_strings(read_manifest(folder)["files"]))
    return hashes


def _read_version_digest(folder: Path) -> str | None:
    """Return which version a folder, or what it is a copy of, is; None if that is not known."""
    if folder.parent.name == VERSIONS_FOLDER_NAME:
        return folder.name
    with suppress(DamagedError):
        return str(read_manifest(folder)["facts"].get("version"))
    return None
