"""What a run tries before its first step: it is refused then, and leaves no run directory."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import ConfigError, DamagedError, NestedTuneError
from nested_core.pipeline import preflight
from nested_core.pipeline.finetune import finetune
from nested_core.pipeline.preflight import estimate_checkpoint_bytes, require_room_for_checkpoints
from nested_core.pipeline.steps import require_askable_suites
from nested_core.storage.run_directory import RunDirectory
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.example import MODEL, example_config, prepare, train
from tests.left_out import slow_except

NAME = "capitals"
Usage = namedtuple("Usage", "total used free")


def registry_at(path: Path | str) -> dict[str, Any]:
    return {"registry": {"path": str(path), "name": NAME}}


def damaged_registry(folder: Path) -> dict[str, Any]:
    registry = folder / "registry"
    promote(registry, NAME, register(write_run(folder / "old", 1), registry, NAME, {}), by="ann")
    (registry / NAME / "champion.json").write_text("{")
    return registry_at(registry)


def champion_as_adapter_path(folder: Path) -> dict[str, Any]:
    registry = folder / "registry"
    promote(registry, NAME, register(write_run(folder / "old", 1), registry, NAME, {}), by="ann")
    return {"adapter_path": str(registry / NAME / "champion"), "data": "nowhere"}


def file_in_place(folder: Path) -> dict[str, Any]:
    (folder / "file").write_text("")
    return registry_at(folder / "file" / "registry")


def other_case(folder: Path) -> dict[str, Any]:
    (folder / "registry" / NAME.upper() / "versions").mkdir(parents=True)
    return registry_at(folder / "registry")


def link_in_place(folder: Path) -> dict[str, Any]:
    (folder / "registry").mkdir()
    (folder / "registry" / NAME).symlink_to(folder)
    return registry_at(folder / "registry")


def suite(folder: Path) -> dict[str, Any]:
    (folder / "suite.jsonl").write_text('{"prompt": "a", "expected": "b"}\n')
    task = {"name": "x", "file": str(folder / "suite.jsonl"), "score": "exact"}
    return {"gate": {"tasks": [task]}}


REFUSED = {
    "a registry where a file is": (file_in_place, ConfigError, "cannot be made a directory"),
    "a registry in a folder that takes no files": (
        lambda _: registry_at("/proc/registry"),
        ConfigError,
        "cannot be a registry: nothing can be written in /proc",
    ),
    "a name in another case": (other_case, ConfigError, "differs from 'capitals' only in case"),
    "a link for a name": (link_in_place, DamagedError, "is a symbolic link"),
    "a damaged champion": (damaged_registry, DamagedError, "champion"),
    "a suite that is missing": (
        lambda folder: {
            "gate": {"tasks": [{"name": "x", "file": str(folder / "none"), "score": "exact"}]}
        },
        NestedTuneError,
        "none",
    ),
    "a champion as adapter_path": (
        champion_as_adapter_path,
        ConfigError,
        "adapter_path: .* lies in the registry",
    ),
    "the new registry as adapter_path": (
        lambda folder: registry_at(folder / "new") | {"adapter_path": str(folder / "new" / "x")},
        ConfigError,
        "adapter_path: .* lies in the registry",
    ),
    "a file as adapter_path": (
        lambda folder: {"adapter_path": __file__},
        ConfigError,
        "adapter_path",
    ),
}


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_used_in_the_end_is_refused_before_there_is_a_run_directory(
    case: tuple[Any, type[NestedTuneError], str], tmp_path: Path
) -> None:
    make, error, message = case
    config, run = example_config(**make(tmp_path)), RunDirectory(tmp_path / "run")
    with pytest.raises(error, match=message) as raised:
        finetune(config, run)
    assert raised.value.exit_code in (2, 6)
    assert len(str(raised.value).splitlines()) == 1
    assert not run.path.exists()


def test_a_cache_for_answers_that_cannot_be_used_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "answers").touch()
    with pytest.raises(ConfigError, match="where answers are kept, cannot be made"):
        finetune(example_config(**suite(tmp_path)), RunDirectory(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_run_directory_in_a_folder_that_takes_no_files_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing can be written in /proc"):
        finetune(example_config(), RunDirectory(Path("/proc/runs/run")))


def test_a_registry_that_can_be_used_is_left_as_it_is(tmp_path: Path) -> None:
    config = example_config(**registry_at(tmp_path / "new" / "registry"))
    preflight.check_before_start(config, RunDirectory(tmp_path / "run"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "optimizer", slow_except(["adamw", "sgd"], "adamw", reason="trains another run")
)
def test_the_size_of_a_checkpoint_is_estimated_to_a_tenth(optimizer: str, tmp_path: Path) -> None:
    config = example_config(optimizer=optimizer, num_layers=-1, iters=4, val_batches=0)
    finished = train(config, prepare(config, tmp_path / "run"))
    (folder,) = finished.run.checkpoints.iterdir()
    size = sum(file.stat().st_size for file in folder.iterdir())
    assert estimate_checkpoint_bytes(config, finished.run) == pytest.approx(size, rel=0.1)


def test_a_disk_without_room_for_the_checkpoints_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = example_config(iters=8, save_every=2)
    run = prepare(config, tmp_path / "run")
    one = estimate_checkpoint_bytes(config, run)
    usage = Usage(10 * one, 6 * one, 4 * one)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="up to 5 are kept at a time") as raised:
        require_room_for_checkpoints(config, run)
    assert "Make room" in str(raised.value)
    fewer = example_config(iters=8, save_every=2, training={"keep_checkpoints": 1})
    require_room_for_checkpoints(fewer, run)


def test_where_epochs_decide_the_room_is_that_of_their_iterations(tmp_path, monkeypatch) -> None:
    config = example_config(iters=2, save_every=2, batch_size=8, training={"epochs": 1.0})
    run = prepare(config, tmp_path / "run")
    usage = Usage(1, 1, 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ConfigError, match="up to 4 are kept at a time"):  # 40 examples, 5 batches
        require_room_for_checkpoints(config, run)


def test_a_sample_with_a_token_that_the_model_has_no_row_for_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    stored = json.loads((model / "tokenizer.json").read_text())
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    token = {"id": size, "content": "<|order|>", "special": True, **flags}
    stored["added_tokens"].append(token)
    (model / "tokenizer.json").write_text(json.dumps(stored))
    config = example_config(model=str(model), samples=["<|order|>Where to?"])
    with pytest.raises(ConfigError, match=rf"^samples: .*<\|order\|> has id {size}, the model has"):
        require_askable_suites(config, None)
