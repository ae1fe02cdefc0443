"""Nights of an adapter without any training: versions of a registry, and what replay chooses."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.data.data_settings import SPLITS, DataSettings
from nested_core.data.example_rows import read_split_rows
from nested_core.pipeline import steps
from nested_core.registry.data_store import RunExamples
from nested_core.rooms.replay.replay_record import ReplayRecord, read_replay
from nested_core.storage.run_directory import RunDirectory
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.example import example_config

NAME = "capitals"
FRESH = "0" * 64


def row(prompt: str, answer: str) -> str:
    return json.dumps({"prompt": prompt, "completion": answer})


def write_split(folder: Path, **splits: Iterable[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, lines in splits.items():
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return folder


def choose(config: FineTuneConfig, path: Path) -> tuple[RunDirectory, ReplayRecord]:
    path.mkdir()
    run = RunDirectory(path)
    steps.write_run_config(config, run, resume=False)
    steps.validate(config, run)
    return run, read_replay(run.replay)


def replayed_prompts(run: RunDirectory) -> list[str]:
    rows = map(json.loads, run.replayed_rows.read_text().splitlines())
    return sorted(each.get("prompt") or each["messages"][0]["content"] for each in rows)


def add_version(
    folder: Path,
    parent: str,
    data: Path,
    *,
    keeps: bool = True,
    changes: Any = None,
    trained: Any = None,
) -> str:
    """A champion that was trained from `parent` on a data set, without any training."""
    registry = folder / "registry"
    seed = len(list(folder.glob("run-*")))
    config = example_config(data=str(data), **changes or {})
    settings = DataSettings.from_config(config)
    train, valid, test = (read_split_rows(settings, split) for split in SPLITS)
    assert train is not None
    assert valid is not None
    provenance = {
        "parent": None if parent == FRESH else parent,
        "config": config.model_dump(mode="json"),
        "train_digest": train.digest,
        "validation_digest": valid.digest,
        "trained": trained,
    }
    run = write_run(folder / f"run-{seed}", seed, initial=parent)
    kept_out = [] if test is None else test.rows
    examples = RunExamples(train.rows, valid.rows, kept_out=kept_out) if keeps else None
    version = register(run, registry, NAME, provenance, examples=examples)
    promote(registry, NAME, version, by="ann")
    return version


def from_champion(folder: Path, **changes: Any) -> FineTuneConfig:
    registry = {"path": str(folder / "registry"), "name": NAME}
    """A run on the new data that follows the champion."""
    replay = {"fraction": 0.3} | changes.pop("replay", {})
    continual = {"from": "champion", "replay": replay} | changes.pop("continual", {})
    settings = {"data": str(folder / "new"), "registry": registry, "iters": 40}
    return example_config(**settings | changes, continual=continual)


def night(folder: Path, number: int) -> Path:
    """The data of a night: two facts of its own, and one that each night answers anew.

    Its valid set stands for the one that the gate judged by, its test set for the other.
    """
    facts = [row(f"own {number} {n}?", "1") for n in range(2)]
    held_out = [row(f"held {number}?", "1")]
    changed = row("today?", str(number))
    tested = [row(f"tested {number}?", "1")]
    return write_split(
        folder / f"night-{number}", train=[*facts, changed], valid=held_out, test=tested
    )
