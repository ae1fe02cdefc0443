"""A stop that comes in an evaluation ends it there, and loses nothing of the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import TrainingStopped
from nested_core.pipeline import steps
from nested_core.storage.checkpoint import OPTIMIZER_NAME
from nested_core.storage.checkpoint_verification import STATE_NAME, checkpoint_path
from nested_core.storage.safetensors_files import read_tensors
from nested_core.training.trainer import Trainer
from tests.example import SPEEDS, Finished, prepare, train, train_example

BATCHES = 5  # of the validation set, in each evaluation


class AtRequest:
    """False until it has been asked so often; in place of `stop_requested` it stops there."""

    def __init__(self, number: int) -> None:
        self.asked, self._number = 0, number

    def __bool__(self) -> bool:
        self.asked += 1
        return self.asked >= self._number


def stop_at(config: Any, path: Path, number: int) -> tuple[Any, AtRequest]:
    """A run that is stopped when the trainer asks for the so-many-th time."""
    run, request = prepare(config, path), AtRequest(number)

    def watch(trainer: Trainer) -> None:
        stand_in: Any = request
        trainer.stop_requested = stand_in

    with pytest.raises(TrainingStopped):
        train(config, run, on_start=watch)
    return run, request


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Seven steps with open chunks at the end, evaluated at steps 0, 4 and 7."""
    return train_example(
        tmp_path_factory.mktemp("whole") / "run",
        iters=13,
        grad_accumulation_steps=2,
        steps_per_eval=8,
        steps_per_report=8,
        val_batches=-1,
        lora_parameters={"dropout": 0.1},
        nested={"frequencies": [1, 2, 4], "slow_gradients": "accumulate"},
    )


# Asked once a batch in the evaluations, once before the first step, and once after each step.
STOPS = pytest.mark.slow("trains another run, stops and resumes it")


@pytest.mark.slow("trains three times")
@pytest.mark.parametrize(
    ("number", "step"),
    [
        pytest.param(3, 0, marks=STOPS),
        (BATCHES + 1 + 4 + 3, 4),
        pytest.param(2 * BATCHES + 1 + 7 + 2, 7, marks=STOPS),
    ],
)
def test_an_evaluation_that_is_cut_is_made_up_for_bit_for_bit(
    whole: Finished, tmp_path: Path, number: int, step: int
) -> None:
    run, request = stop_at(whole.config, tmp_path / "run", number)
    assert request.asked == number  # nothing was computed after that
    if step:
        state = json.loads((checkpoint_path(run.checkpoints, step) / STATE_NAME).read_bytes())
        end = "iterations" if step == 7 else None
        assert (state["observed"], state["ended"]) == (False, end)
        assert state["flushed"] is (step == 7)
    steps.write_run_config(whole.config, run, resume=True)
    done = train(whole.config, run)
    for name in ("adapters.safetensors", OPTIMIZER_NAME):
        found, expected = (
            checkpoint_path(each.run.checkpoints, 7) / name for each in (done, whole)
        )
        assert read_tensors(found) == read_tensors(expected)
    assert done.metrics(without=SPEEDS) == whole.metrics(without=SPEEDS)
    assert done.result.adapter_step == whole.result.adapter_step
    assert steps.judge(done.config, run).has_passed
