"""More than a hundred steps on the example: the loss falls, memory is flat, disk equals model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from nested_core.models.parameters import trainable_parameters
from nested_core.pipeline import steps
from nested_core.storage.checkpoint_verification import checkpoint_path
from tests.example import DATA, MODEL, Finished, example_config, generate_answers, prepare, train

STEPS = 104

pytestmark = pytest.mark.slow("trains more than a hundred steps")


class MemoryProbe:
    """Memory held by MLX at every report, and its peak since the one before."""

    def __init__(self) -> None:
        self.active: dict[int, int] = {}
        self.peak: dict[int, int] = {}

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        step = train_info["step"]
        self.active[step], self.peak[step] = mx.get_active_memory(), mx.get_peak_memory()
        mx.reset_peak_memory()

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        pass


@pytest.fixture(scope="module")
def probe() -> MemoryProbe:
    return MemoryProbe()


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory, probe: MemoryProbe) -> Finished:
    config = example_config(iters=STEPS, batch_size=4, steps_per_report=20, steps_per_eval=52)
    run = prepare(config, tmp_path_factory.mktemp("long") / "run")
    return train(config, run, probe)


def test_the_loss_starts_above_4_and_falls_below_2(long_run: Finished) -> None:
    validation = [r["val_loss"] for r in long_run.metrics() if "val_loss" in r]
    training = [r["loss"] for r in long_run.metrics() if "loss" in r]
    assert validation[0] > 4
    assert validation[-1] < 2
    assert training[-1] < 0.5 * training[0]
    assert long_run.result.red_flags == ()


def test_memory_at_the_end_is_what_it_was_after_20_steps(long_run, probe) -> None:
    assert sorted(probe.active) == [20, 40, 60, 80, 100, STEPS]
    for step in (40, 60, 80, 100, STEPS):
        assert probe.active[step] <= 1.02 * probe.active[20]
        assert probe.peak[step] <= 1.05 * probe.peak[20]


def test_the_last_checkpoint_holds_what_the_model_holds(long_run: Finished) -> None:
    held, stored = trainable_parameters(long_run.trainer.model), long_run.at(STEPS).tensors
    assert held.keys() == stored.keys()
    for name, leaf in held.items():
        assert np.array(leaf).tobytes() == stored[name].data


def test_the_adapter_offered_is_the_best_checkpoints_and_passes_the_gate(long_run) -> None:
    verdict = steps.judge(long_run.config, long_run.run)
    best = checkpoint_path(long_run.run.checkpoints, long_run.result.adapter_step)
    for name in ("adapters.safetensors", "adapter_config.json"):
        assert (best / name).read_bytes() == (long_run.run.adapter / name).read_bytes()
    assert verdict.validation is not None
    assert verdict.validation.loss_after == pytest.approx(long_run.result.best_val_loss, rel=1e-4)
    assert [row.changed for row in verdict.tiers] == [14, 14, 14]


def test_mlx_lm_answers_with_the_adapter_what_it_could_not_without(long_run: Finished) -> None:
    lines = (DATA / "held_out.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    questions = [json.loads(line) for line in lines]
    prompts = [question["messages"][0]["content"] for question in questions]
    right = []
    for adapter in (None, long_run.run.adapter):
        replies = generate_answers(str(MODEL), prompts, adapter=adapter, max_tokens=16)
        right.append(
            sum(q["expected"] in reply for q, reply in zip(questions, replies, strict=True))
        )
    assert right[0] <= 1
    assert right[1] >= 4


def test_a_finished_run_is_not_trained_again(long_run: Finished) -> None:
    before = {path: path.stat().st_mtime_ns for path in Path(long_run.run.path).rglob("*")}
    assert steps.train(long_run.config, long_run.run) == long_run.result
    assert {path: path.stat().st_mtime_ns for path in long_run.run.path.rglob("*")} == before
