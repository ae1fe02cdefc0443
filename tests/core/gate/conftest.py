"""A finished run, and copies of it that a test may tamper with."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.pipeline import steps
from nested_core.storage.run_directory import RunDirectory
from tests.core.gate.rewriting import rewrite_run
from tests.example import DATA, train_example

STEPS = 8
Rewrite = Callable[..., RunDirectory]


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[FineTuneConfig, RunDirectory]:
    """Eight steps of tiers [1, 2, 4], with a test set of its own."""
    folder = tmp_path_factory.mktemp("gate")
    data = folder / "data"
    data.mkdir()
    for name in ("train.jsonl", "valid.jsonl"):
        shutil.copyfile(DATA / name, data / name)
    done = train_example(folder / "run", iters=STEPS, data=str(data))
    return done.config, done.run


@pytest.fixture
def run(finished: tuple[FineTuneConfig, RunDirectory], tmp_path: Path) -> RunDirectory:
    """A copy of the finished run."""
    return RunDirectory(Path(shutil.copytree(finished[1].path, tmp_path / "copy")))


@pytest.fixture(scope="session")
def judged_once(
    finished: tuple[FineTuneConfig, RunDirectory], tmp_path_factory: pytest.TempPathFactory
) -> RunDirectory:
    """A copy of the finished run that the gate has passed."""
    config, run = finished
    copied = RunDirectory(tmp_path_factory.mktemp("judged") / "run")
    shutil.copytree(run.path, copied.path)
    assert steps.judge(config, copied).has_passed
    return copied


@pytest.fixture
def judged(judged_once: RunDirectory, tmp_path: Path) -> RunDirectory:
    """A copy of the finished run with its verdict."""
    return RunDirectory(Path(shutil.copytree(judged_once.path, tmp_path / "judged")))


@pytest.fixture
def config(finished: tuple[FineTuneConfig, RunDirectory]) -> FineTuneConfig:
    return finished[0]


@pytest.fixture
def rewrite(run: RunDirectory, config: FineTuneConfig) -> Rewrite:
    """Put a sound checkpoint that says something else in the last one's place, and offer it."""
    return partial(rewrite_run, config, run)
