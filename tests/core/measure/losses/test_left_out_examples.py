"""What an adapter was trained on is known by what the adapter is, wherever it lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from nested_core.data.example_digests import TrainedRows
from nested_core.measure.losses.left_out_examples import find_trained_rows, write_exported_rows
from nested_core.models.lora_attachment import read_adapter_file
from nested_core.storage.adapter import read_adapter
from nested_core.storage.atomic import write_json
from nested_core.storage.manifest import write_manifest
from nested_core.storage.run_directory import RunDirectory
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run

ROWS = TrainedRows(np.array([3, 5], np.uint64))


@pytest.fixture
def places(tmp_path: Path) -> dict[str, Path]:
    """One adapter as a run's, a version, the champion, and copies."""
    run = RunDirectory(write_run(tmp_path / "run", 1))
    run.config.write_text("{}")
    write_json(run.training_examples, ROWS.to_json())
    version = register(run.path, tmp_path / "other", "capitals", ROWS.to_json())
    promote(tmp_path / "other", "capitals", version, by="ann")
    folder = tmp_path / "other" / "capitals"
    shutil.copytree(run.adapter, tmp_path / "copy")
    shutil.copytree(run.adapter, run.checkpoints / "step-0000008")
    return {
        "a run": run.adapter,
        "a checkpoint": run.checkpoints / "step-0000008",
        "a version": folder / "versions" / version,
        "a champion": folder / "champion",
        "a copy": tmp_path / "copy",
    }


@pytest.mark.parametrize("what", ["a run", "a checkpoint", "a version", "a champion"])
def test_a_runs_or_a_versions_adapter_is_known_without_a_registry(places, what: str) -> None:
    found = find_trained_rows(read_adapter(places[what], follow_links=True), None)
    assert (found.digests.tolist(), found.unknown) == ([3, 5], None)


def test_a_copy_is_known_where_a_registry_has_it_and_else_said_to_be_unknown(places) -> None:
    copy = read_adapter(places["a copy"])
    assert find_trained_rows(copy, places["a version"].parents[2]).digests.tolist() == [3, 5]
    found = find_trained_rows(copy, places["a copy"].parent / "nowhere")
    assert str(found.unknown).endswith("copy is neither a run's adapter nor a registered version")


def test_a_copy_in_adapter_path_is_known_until_another_adapter_lies_there(places) -> None:
    copy = places["a copy"]
    write_exported_rows(copy, ROWS)
    assert find_trained_rows(read_adapter(copy), None).digests.tolist() == [3, 5]
    shutil.copytree(write_run(copy.parent / "new", 2) / "adapter", copy, dirs_exist_ok=True)
    assert find_trained_rows(read_adapter(copy), None).unknown is not None


@pytest.mark.parametrize("what", ["a run", "a checkpoint"])
def test_a_runs_adapter_is_not_known_once_it_was_trained_further_in_place(places, what) -> None:
    further = write_run(places["a copy"].parent / "further", 2) / "adapter"
    shutil.copy(further / "adapters.safetensors", places[what])
    assert find_trained_rows(read_adapter(places[what]), None).unknown is not None


@pytest.mark.parametrize("what", ["a run", "a copy"])
def test_another_file_beside_an_adapter_is_not_taken_for_it(places, what: str) -> None:
    place = places[what]
    if what == "a copy":
        write_exported_rows(place, ROWS)
    further = write_run(place.parent / "further", 2) / "adapter"
    shutil.copy(further / "adapters.safetensors", place / "more.safetensors")
    for name, is_known in (("adapters.safetensors", True), ("more.safetensors", False)):
        found = find_trained_rows(read_adapter_file(place / name), None)
        assert (found.unknown is None) == is_known
    assert find_trained_rows(read_adapter(place), None).digests.tolist() == [3, 5]


def test_a_checkpoint_of_a_run_without_a_verdict_is_known_by_its_manifest(places) -> None:
    checkpoint = places["a checkpoint"]
    (checkpoint.parents[1] / "MANIFEST.json").unlink()
    assert find_trained_rows(read_adapter(checkpoint), None).unknown is not None
    write_manifest(checkpoint, {"step": 8})
    for what in ("a checkpoint", "a run"):
        assert find_trained_rows(read_adapter(places[what]), None).digests.tolist() == [3, 5]


def test_another_adapter_in_the_folder_of_a_version_is_not_taken_for_it(places) -> None:
    version, root = places["a version"], places["a copy"].parent
    moved = root / "versions" / ("0" * 64)
    shutil.copytree(version, moved)
    assert find_trained_rows(read_adapter(moved), None).unknown is not None


def test_a_copy_of_a_version_is_known_until_it_is_trained_further(places) -> None:
    copy = places["a copy"].parent / "mine"
    shutil.copytree(places["a version"], copy)
    assert find_trained_rows(read_adapter(copy), None).digests.tolist() == [3, 5]
    further = write_run(copy.parent / "further", 2) / "adapter"
    (copy / "adapters.safetensors").chmod(0o600)
    shutil.copy(further / "adapters.safetensors", copy)
    found = find_trained_rows(read_adapter(copy), places["a version"].parents[2])
    assert (found.digests.size, found.unknown is None) == (0, False)


def test_an_adapter_exported_for_peft_is_known_until_it_is_trained_further(places) -> None:
    adapter, exported = read_adapter(places["a version"]), places["a copy"]
    weights = (exported / "adapters.safetensors").rename(exported / "adapter_model.safetensors")
    write_exported_rows(exported, ROWS)
    assert find_trained_rows(adapter, None, exported).digests.tolist() == [3, 5]
    weights.write_bytes(weights.read_bytes() + b" ")
    assert find_trained_rows(adapter, None, exported).unknown is not None
