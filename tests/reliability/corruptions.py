"""Random corruptions of a finished run and of a registry, by the thousand: each one is found."""

from __future__ import annotations

import os
import random
import shutil
from collections import Counter
from pathlib import Path

from nested_core import registry
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DamagedError, GateRejected
from nested_core.pipeline import steps
from nested_core.pipeline.publishing import confirm_recorded_verdict
from nested_core.storage.manifest import read_manifest
from nested_core.storage.run_directory import RunDirectory
from tests.example import SMALL_RUN, train_example
from tests.registry_care import audit
from tests.reliability.mutations import BYTE_EDITS, mutate

NAME = "geography"


def corrupt_runs(folder: Path, count: int, seed: int) -> str:
    """Mutate adapters and checkpoints; the gate must refuse each before it judges."""
    done = train_example(folder / "run", **SMALL_RUN)
    assert steps.judge(done.config, done.run).has_passed
    kinds: Counter[str] = Counter()
    for number in range(seed, seed + count):
        name, run = mutate(done.run.path, folder / "copy", number)
        assert is_refused(done.config, run), f"mutation {number}, {name}, passed: {run.path}"
        shutil.rmtree(run.path)
        kinds[name] += 1
    return f"{count} corruptions of adapters and checkpoints of {len(kinds)} kinds, all refused"


def corrupt_verdicts(folder: Path, count: int, seed: int) -> str:
    """Change bytes of one file that a verdict rests on, or of it; promoting must refuse each."""
    done = train_example(folder / "run", **SMALL_RUN)
    steps.judge(done.config, done.run)
    confirm_recorded_verdict(done.config, done.run)
    files = [*read_manifest(done.run.path)["files"], done.run.manifest.name]
    damaged: Counter[str] = Counter()
    for number in range(seed, seed + count):
        name = random.Random(number).choice(files)
        run = RunDirectory(folder / "copy")
        shutil.copytree(done.run.path, run.path, copy_function=os.link)
        change_bytes(run.path / name, number)
        try:
            confirm_recorded_verdict(done.config, run)
        except (DamagedError, GateRejected):
            damaged[name] += 1
        else:
            raise AssertionError(f"corruption {number} of {run.path / name} was not found")
        shutil.rmtree(run.path)
    return f"{count} corruptions of {len(damaged)} files of a verdict, none would be promoted"


def change_bytes(path: Path, number: int) -> None:
    """Replace a file by one with other bytes; its other hard links stay as they are."""
    dice = random.Random(number)
    before = path.read_bytes()
    content = bytearray(before)
    while bytes(content) == before:
        dice.choice(BYTE_EDITS)(content, dice)
    path.parent.chmod(0o755)
    path.unlink()
    path.write_bytes(content)


def is_refused(config: FineTuneConfig, run: RunDirectory) -> bool:
    """Whether the gate finds damage, before it judges; any other error is a crash."""
    try:
        steps.judge(config, run)
    except DamagedError as damage:
        return len(str(damage)) < 2000
    return False


def corrupt_registries(folder: Path, count: int, seed: int) -> str:
    """Change bytes of one file of a registry with three versions; an audit must find each."""
    original = folder / "registry"
    for number in range(3):
        run = train_example(folder / f"version-{number}", **SMALL_RUN, seed=number)
        assert steps.judge(run.config, run.run).has_passed
        version = registry.register(run.run.path, original, NAME, {"number": number})
        registry.promote(original, NAME, version, by="soak")
    files = [
        path.relative_to(original)
        for path in sorted(original.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.name != ".lock"
    ]
    damaged: Counter[str] = Counter()
    for number in range(seed, seed + count):
        copy = folder / "copy"
        shutil.copytree(original, copy, symlinks=True, copy_function=os.link)
        path = copy / random.Random(number).choice(files)
        change_bytes(path, number)
        assert is_found(copy), f"corruption {number} of {path} was not found"
        damaged[path.name] += 1
        shutil.rmtree(copy)
    return f"{count} corruptions of {len(damaged)} files of a registry, all found by an audit"


def is_found(root: Path) -> bool:
    """Whether an audit has something against a registry, or refuses to read it."""
    try:
        return bool(audit(root, NAME).findings)
    except DamagedError:
        return True


VOLUMES = {"runs": corrupt_runs, "verdicts": corrupt_verdicts, "registries": corrupt_registries}
