"""kill -9 at random moments of a training run, resumed each time: nothing is lost, not a bit."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from nested_core.storage.checkpoint import OPTIMIZER_NAME, list_checkpoints, read_checkpoint
from nested_core.storage.manifest import MANIFEST_NAME
from tests.example import SPEEDS, write_config


def start(config: Path, run_dir: Path) -> subprocess.Popen[str]:
    """A training process; it resumes where there is something to resume."""
    command = [str(Path(sys.executable).with_name("nested-tune")), "train", "-c", str(config)]
    command += ["--run-dir", str(run_dir)] + (["--resume"] if run_dir.exists() else [])
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(config: Path, run_dir: Path) -> None:
    """Train to the end, undisturbed."""
    process = start(config, run_dir)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def digests(run_dir: Path) -> dict[str, str]:
    """Manifest bytes of every checkpoint that stands, by name; each is verified."""
    found = {}
    for path in list_checkpoints(run_dir / "checkpoints"):
        read_checkpoint(path)
        found[path.name] = (path / MANIFEST_NAME).read_text()
    return found


def comparable_metrics(run_dir: Path) -> list[dict[str, object]]:
    """metrics.jsonl without what a clock or a process decides."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in SPEEDS} for record in records]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kills", [3, pytest.param(100, marks=pytest.mark.reliability)])
def test_killed_and_resumed_training_ends_like_the_uninterrupted_run(
    tmp_path: Path, kills: int
) -> None:
    config = write_config(
        tmp_path / "config.yaml",
        iters=160,
        save_every=4,
        steps_per_eval=40,
        grad_accumulation_steps=2,
        lora_parameters={"rank": 4, "scale": 2.0, "dropout": 0.1},
        training={"max_grad_norm": 1.0, "keep_checkpoints": 1000},
    )
    finish(config, tmp_path / "straight")
    dice, done, runs, seconds = random.Random(kills), 0, 0, 1.0
    while done < kills:
        runs += 1
        run_dir, reported = tmp_path / f"killed-{runs}", dict[str, str]()
        while done < kills:
            process = start(config, run_dir)
            try:
                _, errors = process.communicate(timeout=dice.uniform(1.0, 1.0 + 4 * seconds))
                assert process.returncode == 0, errors
                break
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
                done += 1
            standing = digests(run_dir)
            assert reported.items() <= standing.items()
            reported = standing
        finish(config, run_dir)
        for name in ("adapter/adapters.safetensors", f"checkpoints/step-0000080/{OPTIMIZER_NAME}"):
            assert (run_dir / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
        assert comparable_metrics(run_dir) == comparable_metrics(tmp_path / "straight")
