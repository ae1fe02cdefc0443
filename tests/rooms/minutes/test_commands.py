"""`--minutes` at the command line: what is refused and what wins; `init` and `explain` with it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from nested_core.config.loading import load_config
from nested_core.errors import ConfigError
from nested_core.rooms.minutes import forecast
from tests.example import DATA, MODEL, require_refused, write_config
from tests.flows.conftest import called
from tests.left_out import needs_rooms

FILES = ("--continual.replay.sources", f"[{DATA / 'train.jsonl'}]")


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--minutes", "5", "--iters", "40"), "both say how long the run is: give one of them"),
        (("--minutes", "5", "--training.epochs", "2"), "epochs 2 and minutes 5: give one of them"),
        (("--minutes", "0"), "greater than 0"),
        (("--minutes", "-3"), "greater than 0"),
        (("--minutes", "20000"), "less than 10080"),
        pytest.param(
            *(("--minutes", "5", "--continual.replay.fraction", "0.5", *FILES), "without replay"),
            marks=needs_rooms("replay"),
        ),
        pytest.param(
            ("--minutes", "5", "--training.processes", "2"),
            "steps of one process, without replay",
            marks=needs_rooms("ranks"),
        ),
    ],
)
def test_minutes_that_mean_nothing_are_refused(tmp_path, flags, said) -> None:
    write_config(tmp_path / "config.yaml")
    refused = called("train", "-c", "config.yaml", *flags, "--run-dir", "run", cwd=tmp_path)
    assert refused.code == ConfigError.exit_code
    assert said in refused.message()
    assert not (tmp_path / "run").exists()


def test_too_few_minutes_are_refused_with_how_many_it_takes(tmp_path: Path) -> None:
    long_verdict = {"sample_tokens": 1_000_000}
    write_config(tmp_path / "config.yaml", training=long_verdict)
    refused = called(
        "train", "-c", "config.yaml", "--minutes", "0.001", "--run-dir", "run", cwd=tmp_path
    )
    assert refused.code == ConfigError.exit_code
    said = refused.message()
    assert "training.minutes: 0.001 minutes hold no step and its verdict on this machine" in said
    needed = int(said.partition("Give --minutes ")[2].partition(" ")[0])
    assert needed > 10
    assert "or more, or a smaller batch_size" in said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("in_file", "flags", "length"),
    [
        ({"epochs": 3}, {"training.minutes": 5.0}, "5 minutes"),
        ({"minutes": 5}, {"iters": 40}, "40 iterations"),
        ({"minutes": 5}, {"training.epochs": 3.0}, "3 epochs"),
        ({"minutes": 5}, {"training.minutes": 2.5}, "2.5 minutes"),
        ({"minutes": 5}, {}, "5 minutes"),
    ],
)
def test_a_flag_for_the_length_wins_over_the_file(tmp_path, in_file, flags, length) -> None:
    path = write_config(tmp_path / "config.yaml", training=in_file)
    assert load_config(path, flags).length == length


def test_a_reference_run_knows_nothing_of_minutes() -> None:
    training = {"reference": "mlx_lm", "max_grad_norm": 0.0, "minutes": 5}
    said = r"mlx_lm\.lora knows nothing of training\.minutes"
    require_refused(said, training=training, nested={"frequencies": [1]})


@pytest.mark.parametrize(
    "command", ["train", "run", pytest.param("explain", marks=needs_rooms("planning"))]
)
def test_the_short_help_lists_minutes(command: str, tmp_path: Path) -> None:
    assert "\n  --minutes M " in called(command, "--help", cwd=tmp_path).stdout


@pytest.mark.slow("a command and its data")
@needs_rooms("planning")
def test_init_writes_minutes_in_place_of_passes(tmp_path: Path) -> None:
    words = ("init", "--data", DATA, "--model", MODEL, "-o", "lora.yaml", "--minutes")
    assert called(*words, "5", cwd=tmp_path).code == 0
    text = (tmp_path / "lora.yaml").read_text()
    training = yaml.safe_load(text)["training"]
    assert (training["minutes"], "epochs" in training) == (5, False)
    assert "minutes: 5  # as many steps as fit with their verdict" in text
    (tmp_path / "lora.yaml").unlink()
    refused = called(*words, "-1", cwd=tmp_path)
    assert refused.code == ConfigError.exit_code
    assert "--minutes: expected minutes above 0" in refused.message()


@pytest.mark.parametrize(
    ("load", "end"),
    [
        (
            9.7,
            "as busy as the machine is now (load 10 on 2 cores): shorter when it is quiet, or by "
            "--minutes.",
        ),
        (2.0, "as busy as the machine is now."),
    ],
)
def test_explain_says_that_the_machine_is_busy(load: float, end: str, monkeypatch) -> None:
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 1.0, 1.0))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    run = forecast.MeasuredRun(
        seconds_a_step=270.0, training_seconds=1620.0, seconds=8100.0, tokens_per_second=0.28
    )
    said = run.describe()["time"]
    assert said.endswith(end)
    assert ": 0.3 trained-on tokens a second" in said


@pytest.mark.slow("measures the speed of steps and of answers")
@needs_rooms("planning")
def test_explain_says_how_long_a_run_takes_and_counts_the_steps_of_minutes(
    tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(forecast, "TRIED_SECONDS", 0.3)
    write_config(tmp_path / "config.yaml", iters=4)
    whole = called("explain", "-c", "config.yaml", "--json", cwd=tmp_path)
    said = json.loads(whole.stdout)
    assert "trained-on tokens a second" in said["time"]
    assert "With evaluations and the gate about " in said["time"]
    assert said["steps"].startswith("4 batches of 2 examples")
    words = ("explain", "-c", "config.yaml", "--minutes", "1", "--json")
    minutes = json.loads(called(*words, cwd=tmp_path).stdout)
    assert not minutes["steps"].startswith("4 batches")
    assert "layers:" not in whole.stderr  # of the steps that are tried
