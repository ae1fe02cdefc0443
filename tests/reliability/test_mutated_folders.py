"""Adapter and checkpoint folders damaged in thousands of ways: each is detected, none crashes."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DamagedError
from nested_core.pipeline import steps
from nested_core.storage.run_directory import RunDirectory
from tests.example import SMALL_RUN, train_example, write_config
from tests.fork_server import python
from tests.reliability.mutations import MUTATIONS, copy_run, delete_a_folder, mutate

PROGRAM = Path(sys.executable).with_name("nested-tune")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[FineTuneConfig, RunDirectory]:
    """A run of eight steps with one checkpoint and small tensors."""
    done = train_example(tmp_path_factory.mktemp("mutated") / "run", **SMALL_RUN)
    return done.config, done.run


def damage_found(config: FineTuneConfig, run: RunDirectory) -> DamagedError | None:
    """What the gate says of a folder before it judges; any other error is a crash."""
    try:
        steps.judge(config, run)
    except DamagedError as damage:
        return damage
    return None


@pytest.mark.slow("a command for each of three hundred folders")
@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.reliability)])
def test_every_mutated_folder_is_detected_with_exit_code_6(finished, tmp_path, count) -> None:
    config, original = finished
    detected: Counter[str] = Counter()
    for number in range(count):
        name, run = mutate(original.path, tmp_path / "copy", number)
        damage = damage_found(config, run)
        assert damage is not None, f"mutation {number}, {name}, was not detected"
        assert damage.exit_code == 6
        assert len(str(damage)) < 2000
        assert not run.gate.exists()
        shutil.rmtree(run.path)
        detected[name] += 1
    assert sum(detected.values()) == count
    assert len(detected) == len(MUTATIONS)
    whole = copy_run(original.path, tmp_path / "whole")
    assert steps.judge(config, whole).has_passed  # what nobody touched is no damage


def judged_again(config: Path, run_dir: Path) -> subprocess.CompletedProcess[str]:
    """`train --resume` of a finished run, which judges it again."""
    return python(PROGRAM, "train", "-c", config, "--run-dir", run_dir, "--resume")


def in_pairs(original: Path, folder: Path, count: int) -> Iterator[tuple[str, Path]]:
    """Mutations spread over all kinds, each in a folder of its own.

    But for folders that are gone: a resumed run has no checkpoint then, and trains again.
    """
    gone = MUTATIONS.index(delete_a_folder)
    numbers = [7 * number for number in range(2 * count) if 7 * number % len(MUTATIONS) != gone]
    for number in numbers[:count]:
        name, run = mutate(original, folder / str(number), number)
        yield name, run.path


@pytest.mark.timeout(900)
@pytest.mark.parametrize("count", [4, pytest.param(48, marks=pytest.mark.reliability)])
def test_the_command_line_ends_with_6_and_a_short_message(finished, tmp_path, count) -> None:
    config = write_config(tmp_path / "config.yaml", **SMALL_RUN)
    cases = list(in_pairs(finished[1].path, tmp_path, count))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ended = list(pool.map(lambda case: judged_again(config, case[1]), cases))
    for (name, run_dir), done in zip(cases, ended, strict=True):
        assert done.returncode == 6, (name, done.stderr)
        assert done.stdout == ""
        assert "Traceback" not in done.stderr
        message = done.stderr[done.stderr.rindex("nested-tune: ") :]
        assert str(run_dir) in message
        assert len(message.splitlines()) <= 14
