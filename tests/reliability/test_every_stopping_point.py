"""Stopped after any of the first 24 steps and resumed, a run equals the one that never stopped."""

from __future__ import annotations

from typing import Any

import pytest

from nested_core.errors import TrainingStopped
from nested_core.pipeline import steps
from nested_core.storage.checkpoint import OPTIMIZER_NAME
from nested_core.storage.checkpoint_verification import checkpoint_path
from nested_core.storage.safetensors_files import read_tensors
from tests.example import SPEEDS, Finished, prepare, stop_after, train, train_example
from tests.example import example_config as configure

STEPS = 26  # 51 micro-batches, two a step: the last is alone, and two chunks are left open
pytestmark = [pytest.mark.reliability]


def settings(slow_gradients: str) -> dict[str, Any]:
    """Tiers on every clock, dropout, accumulation with a remainder."""
    return {
        "iters": 51,
        "grad_accumulation_steps": 2,
        "steps_per_report": 5,
        "steps_per_eval": 14,
        "save_every": 10,
        "lora_parameters": {"rank": 4, "dropout": 0.1},
        "nested": {"frequencies": [1, 2, 4], "slow_gradients": slow_gradients},
    }


@pytest.fixture(scope="module", params=["skip", "accumulate"])
def straight(request, tmp_path_factory) -> tuple[str, Finished]:
    """The run that nobody stops, in each mode."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    return request.param, train_example(folder, **settings(request.param))


@pytest.mark.parametrize("step", range(1, 25))
def test_stopped_at_this_step_and_resumed_it_is_bit_identical(straight, tmp_path, step) -> None:
    mode, whole = straight
    config = configure(**settings(mode))
    run = prepare(config, tmp_path / "run")
    with pytest.raises(TrainingStopped, match=f"at step {step} of {STEPS}"):
        train(config, run, on_start=stop_after(step))
    steps.write_run_config(config, run, resume=True)
    resumed = train(config, run)
    assert resumed.at(STEPS).tensors == whole.at(STEPS).tensors
    states = [
        read_tensors(checkpoint_path(each.run.checkpoints, STEPS) / OPTIMIZER_NAME)
        for each in (resumed, whole)
    ]
    assert states[0] == states[1]
    assert resumed.metrics(without=SPEEDS) == whole.metrics(without=SPEEDS)
