"""A moving average of the adapter: its formula, that it is what is offered, and that it resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.errors import TrainingStopped
from nested_core.pipeline import steps
from nested_core.storage.adapter import WEIGHTS_NAME, read_adapter
from nested_core.storage.checkpoint import OPTIMIZER_NAME, read_checkpoint
from nested_core.storage.checkpoint_verification import checkpoint_path
from nested_core.storage.safetensors_files import load_arrays
from tests.example import (
    Finished,
    example_config,
    prepare,
    require_refused,
    stop_after,
    train,
    train_example,
)

STEPS = 6


def settings(kind: str) -> dict[str, Any]:
    average = {"decay": 0.25, "kind": kind}
    return {
        "iters": STEPS,
        "save_every": 1,
        "steps_per_eval": 2,
        "nested": {"frequencies": [1, 2]},
        "training": {"average": average, "offer": "average", "keep_checkpoints": 99},
    }


@pytest.fixture(scope="module", params=["ema", "bema"])
def averaged(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train_example(tmp_path_factory.mktemp("averaged") / "run", **settings(request.param))


def trained_at(done: Finished, step: int) -> dict[str, np.ndarray[Any, Any]]:
    """The trained values of a checkpoint, which are not those that it publishes."""
    found = read_checkpoint(checkpoint_path(done.run.checkpoints, step)).parameters()
    return {name: np.array(value, np.float64) for name, value in found.items()}


def test_what_is_offered_is_the_average_of_the_formula_as_of_the_last_step(
    averaged: Finished,
) -> None:
    section = averaged.config.training.average
    assert section is not None
    initial = {n: np.array(a, np.float64) for n, a in averaged.at(0).to_mlx().items()}
    expected = dict(initial)
    for n in range(1, STEPS + 1):
        decay = min(0.25, (1 + n) / (10 + n))  # below the bound at the first step: 2 / 11
        trained = trained_at(averaged, n)
        expected = {k: decay * s + (1 - decay) * trained[k] for k, s in expected.items()}
    if section.kind == "bema":
        trained = trained_at(averaged, STEPS)
        share = (10 + STEPS) ** -0.2
        expected = {k: s + share * (trained[k] - initial[k]) for k, s in expected.items()}
    offered = load_arrays(averaged.run.adapter / WEIGHTS_NAME)
    assert averaged.result.adapter_step == STEPS
    for name, value in offered.items():
        np.testing.assert_allclose(np.array(value), expected[name], rtol=1e-5, atol=1e-7)
        assert not np.array_equal(np.array(value), trained_at(averaged, STEPS)[name])


def test_what_is_evaluated_is_what_is_offered_and_the_gate_finds_it_sound(
    averaged: Finished,
) -> None:
    verdict = steps.judge(averaged.config, averaged.run)
    assert verdict.validation is not None
    assert verdict.validation.loss_after == pytest.approx(averaged.result.val_loss, rel=1e-5)
    assert verdict.validation.chosen_among == 1


def test_a_run_that_was_stopped_goes_on_to_the_bit(averaged: Finished, tmp_path: Path) -> None:
    kind = averaged.config.training.average
    assert kind is not None
    config = example_config(**settings(kind.kind))
    run = prepare(config, tmp_path / "run")
    with pytest.raises(TrainingStopped):
        train(config, run, on_start=stop_after(3))
    train(config, run)
    assert read_adapter(run.adapter).tensors == read_adapter(averaged.run.adapter).tensors
    last = checkpoint_path(run.checkpoints, STEPS)
    whole = checkpoint_path(averaged.run.checkpoints, STEPS)
    assert (last / OPTIMIZER_NAME).read_bytes() == (whole / OPTIMIZER_NAME).read_bytes()


def test_an_average_is_offered_where_it_is_kept() -> None:
    for training in ({"offer": "average"}, {"average": {"decay": 0.9}}):
        require_refused("offer: average and average", training=training)
