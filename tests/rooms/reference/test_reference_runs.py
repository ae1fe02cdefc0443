"""Runs under `training.reference`: stopped, with samples, judged, and without their room."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import ConfigError
from nested_core.gate.judge import run_gate_checks
from nested_core.pipeline import steps
from nested_core.pipeline.preflight import check_before_start
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reports.sample_prompts import samples_by_step
from tests.core.gate.pairs import codes
from tests.core.training.test_training_stop import stop_at
from tests.example import SPEEDS, example_config, prepare, train, train_example
from tests.left_out import leave_out_room

PROMPTS = ("I want to see Italy. Where to?", "The capital of Peru is Lima.")
REFERENCE: dict[str, Any] = {
    "training": {"reference": "mlx_lm", "max_grad_norm": 0},
    "nested": {"frequencies": [1]},
}


@pytest.mark.slow("trains a run whole, and one that is stopped and resumed")
def test_evaluations_of_a_reference_run_are_cut_and_made_again(tmp_path: Path) -> None:
    config = example_config(
        iters=6,
        grad_accumulation_steps=3,
        steps_per_eval=1,
        steps_per_report=1,
        val_batches=2,
        nested={"frequencies": [1]},
        training={"reference": "mlx_lm", "max_grad_norm": 0.0},
    )
    straight = train(config, prepare(config, tmp_path / "straight"))
    # Two batches at the start, two before each of iterations 2 and 3, one ask after step 1; then
    # two before iteration 4 and one before iteration 5.
    run, _ = stop_at(config, tmp_path / "run", 2 + 1 + 4 + 1 + 2 + 2)
    steps.write_run_config(config, run, resume=True)
    done = train(config, run)
    assert done.metrics(without=SPEEDS) == straight.metrics(without=SPEEDS)
    assert done.at(2).tensors == straight.at(2).tensors


@pytest.mark.slow("trains two runs of its own")
def test_a_reference_run_draws_the_same_random_numbers_with_samples(tmp_path: Path) -> None:
    settings = {
        "nested": {"frequencies": [1]},
        "training": {"reference": "mlx_lm", "max_grad_norm": 0.0},
        "lora_parameters": {"dropout": 0.3},
        "iters": 2,
        "steps_per_eval": 2,
    }
    plain = train_example(tmp_path / "plain", **settings)
    sampled = train_example(tmp_path / "sampled", **settings, samples=PROMPTS[:1])
    assert sampled.at(2).digest() == plain.at(2).digest()
    assert list(samples_by_step(sampled.metrics())) == [0, 1]


@pytest.mark.slow("trains and judges a run of its own")
def test_an_honest_reference_run_passes_the_gate(tmp_path: Path) -> None:
    done = train_example(tmp_path / "run", **REFERENCE)
    verdict = run_gate_checks(done.config, done.run).verdict
    assert codes(verdict) == []
    assert verdict.has_passed
    assert verdict.proof is not None
    assert verdict.adapter_step == done.result.step


def test_without_the_room_the_key_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_out_room("reference", monkeypatch)
    run = RunDirectory(tmp_path / "run")
    refusal = "`training.reference` belongs to the room reference, which is not installed here"
    with pytest.raises(ConfigError, match=refusal):
        check_before_start(example_config(**REFERENCE), run)
    assert not run.path.exists()
