"""Which adapter a run offers, when it stops by itself, and which checkpoints stay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.sections import GateSection
from nested_core.errors import ConfigError
from nested_core.pipeline import steps
from nested_core.storage.adapter import read_adapter
from nested_core.storage.checkpoint_verification import (
    STATE_NAME,
    checkpoint_path,
    list_checkpoints,
)
from tests.example import DATA, Finished, train_example


def evaluations(done: Finished) -> dict[int, float]:
    return {r["step"]: r["val_loss"] for r in done.metrics() if "val_loss" in r}


@pytest.fixture(scope="module")
def overshot(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A rate that is far too high after step 10, so that the last adapter is not the best."""
    return train_example(
        tmp_path_factory.mktemp("overshot") / "run",
        iters=14,
        lr_schedule={"name": "step_decay", "arguments": [2e-3, 1000, 10]},
        steps_per_eval=2,
        training={"keep_checkpoints": 1},
    )


def test_the_adapter_offered_is_the_best_by_validation_loss(overshot: Finished) -> None:
    losses = evaluations(overshot)
    candidates = {step: loss for step, loss in losses.items() if step >= 4}
    best = min(candidates, key=lambda step: candidates[step])
    assert best != max(candidates)
    assert overshot.result.adapter_step == best
    assert overshot.result.best_val_loss == losses[best]
    assert read_adapter(overshot.run.adapter).tensors == overshot.at(best).tensors
    assert read_adapter(overshot.run.adapter).tensors != overshot.at(14).tensors


def test_only_the_best_and_the_last_checkpoint_stay_where_one_is_to_be_kept(overshot) -> None:
    kept = {path.name for path in list_checkpoints(overshot.run.checkpoints)}
    assert kept == {f"step-{overshot.result.adapter_step:07d}", "step-0000014"}


@pytest.mark.slow("trains a run of its own")
def test_a_step_before_every_tier_had_an_update_is_no_candidate(tmp_path: Path) -> None:
    too_high_from_step_3 = {"name": "step_decay", "arguments": [2e-3, 1000, 2]}
    done = train_example(
        tmp_path / "run", iters=5, lr_schedule=too_high_from_step_3, steps_per_eval=1
    )
    losses = evaluations(done)
    assert min(losses, key=lambda step: losses[step]) in (1, 2)
    assert done.result.adapter_step >= 4
    assert done.result.best_val_loss == losses[done.result.adapter_step]


@pytest.mark.slow("trains and judges a run of its own")
def test_without_a_validation_set_the_last_adapter_is_offered(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_bytes((DATA / "train.jsonl").read_bytes())
    done = train_example(tmp_path / "run", data=str(data), steps_per_eval=2)
    assert evaluations(done) == {}
    assert (done.result.adapter_step, done.result.val_loss) == (8, None)
    assert read_adapter(done.run.adapter).tensors == done.at(8).tensors
    assert steps.judge(done.config, done.run).validation is None


def test_training_stops_early_after_evaluations_without_enough_improvement(tmp_path: Path) -> None:
    patience: dict[str, Any] = {"early_stop_patience": 2, "min_delta": 100.0}
    done = train_example(tmp_path / "run", iters=40, steps_per_eval=3, training=patience)
    assert list(evaluations(done)) == [0, 3, 6, 9, 12]  # all tiers are updated from step 4 on
    assert (done.result.step, done.result.ended) == (12, "patience")
    state = json.loads((checkpoint_path(done.run.checkpoints, 12) / STATE_NAME).read_bytes())
    assert state["ended"] == "patience"
    assert steps.train(done.config, done.run) == done.result
    # An end is stored: neither a last evaluation that was better nor more iterations undo it.
    done.trainer.state.evaluations_without_improvement = 0
    done.trainer._saver.save(done.trainer.state)
    done.run.result.unlink()
    longer = done.config.model_copy(update={"iters": 50})
    again = steps.train(longer, done.run)
    assert (again.step, again.adapter_step) == (12, done.result.adapter_step)


def test_a_run_is_not_resumed_with_fewer_iterations_than_its_newest_checkpoint(overshot) -> None:
    recorded = overshot.run.config.read_bytes()
    fewer = overshot.config.model_copy(update={"iters": 13})
    with pytest.raises(ConfigError, match=r"iters: 13, since its newest checkpoint has 14 already"):
        steps.write_run_config(fewer, overshot.run, resume=True)
    assert overshot.run.config.read_bytes() == recorded
    steps.write_run_config(overshot.config, overshot.run, resume=True)


@pytest.mark.slow("trains and evaluates")
def test_the_adapter_of_an_early_stop_has_the_loss_that_is_recorded_for_it(tmp_path: Path) -> None:
    done = train_example(
        tmp_path / "run",
        iters=40,
        steps_per_eval=6,
        training={"early_stop_patience": 1, "min_delta": 100.0},
        nested={
            "frequencies": [1, 4],
            "slow_gradients": "accumulate",
            "learning_rate_scale": [1.0, 100.0],
        },
    )
    lenient = done.config.model_copy(update={"gate": GateSection(max_val_loss_increase=1e6)})
    verdict = steps.judge(lenient, done.run)
    assert verdict.validation is not None
    assert verdict.validation.loss_after == pytest.approx(done.result.best_val_loss, rel=1e-4)


@pytest.mark.slow("trains and judges a run of its own")
@pytest.mark.parametrize("slow_gradients", ["skip", "accumulate"])
def test_a_last_evaluation_comes_after_the_last_update(tmp_path: Path, slow_gradients: str) -> None:
    nested = {"frequencies": [1, 2, 4], "slow_gradients": slow_gradients}
    done = train_example(tmp_path / "run", iters=7, steps_per_eval=4, nested=nested)
    losses = evaluations(done)
    assert list(losses) == [0, 4, 7]
    state = json.loads((checkpoint_path(done.run.checkpoints, 7) / STATE_NAME).read_bytes())
    assert state["flushed"] is (slow_gradients == "accumulate")
    assert done.result.adapter_step == 7
    verdict = steps.judge(done.config, done.run)
    assert verdict.validation is not None
    assert verdict.validation.loss_after == pytest.approx(losses[7], rel=1e-4)
