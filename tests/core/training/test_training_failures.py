"""What goes wrong while training runs: gradients that are not finite, updates that get lost."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map_with_path
from mlx_lm import load

from nested_core.config.sections import GateSection
from nested_core.errors import (
    DatasetError,
    GateRejected,
    SilentUpdateWarning,
    TrainingDiverged,
    TrainingStopped,
)
from nested_core.pipeline import steps
from nested_core.training import trainer
from tests.example import DATA, MODEL, Finished, example_config, prepare, train, train_example
from tests.left_out import slow_except

FIRST = json.loads((DATA / "train.jsonl").read_text().splitlines()[0])["messages"][0]["content"]


def rarest_token(tokenizer: Any, text: str) -> int:
    """The token of a training example that no other training example has: its country."""
    lines = (DATA / "train.jsonl").read_text().splitlines()
    counts = Counter(token for line in lines for token in set(tokenizer.encode(line)))
    rarest: int = min(tokenizer.encode(text), key=lambda token: counts[token])
    return rarest


@pytest.fixture(scope="module")
def poisoned_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with NaN as the embedding of one country: an example that names it has no loss."""
    folder = tmp_path_factory.mktemp("poisoned")
    model, tokenizer = load(str(MODEL))[:2]
    weights: dict[str, mx.array] = mx.load(str(MODEL / "model.safetensors"))  # type: ignore[assignment]
    embedding = weights["model.embed_tokens.weight"]
    weights["lm_head.weight"] = mx.array(embedding)  # untied, or every logit would be NaN
    embedding[rarest_token(tokenizer, FIRST)] = float("nan")
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    for path in MODEL.iterdir():
        if path.suffix == ".json":
            config = json.loads(path.read_bytes())
            if path.name == "config.json":
                config["tie_word_embeddings"] = False
            (folder / path.name).write_text(json.dumps(config))
    return folder


def poisoned(base: Path, **changes: Any) -> dict[str, Any]:
    """One epoch of 20 steps, one of them with the poisoned example; no clock but the first."""
    settings: dict[str, Any] = {"model": str(base), "iters": 20, "val_batches": 0}
    return settings | {"nested": {"frequencies": [1]}} | changes


@pytest.fixture(scope="module")
def skipping(poisoned_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run of that epoch without validation data, with a report and a checkpoint a step."""
    folder = tmp_path_factory.mktemp("skipping")
    data = folder / "data"
    data.mkdir()
    (data / "train.jsonl").write_bytes((DATA / "train.jsonl").read_bytes())
    every_step = {"save_every": 1, "steps_per_report": 1, "training": {"keep_checkpoints": 99}}
    changes = poisoned(poisoned_base, data=str(data), **every_step)
    return train_example(folder / "run", **changes)


def skipped_step(done: Finished) -> int:
    return [record["skipped"][0] for record in done.metrics()[1:]].index(1) + 1


def test_a_step_with_gradients_that_are_not_finite_is_skipped_and_counted(skipping) -> None:
    last = skipping.metrics()[-1]
    assert (last["step"], last["updates"], last["skipped"]) == (20, [19], [1])
    losses = [record["loss"] for record in skipping.metrics()[1:]]
    assert losses[skipped_step(skipping) - 1] is None
    assert losses.count(None) == 1
    assert skipping.result.red_flags == ()


def test_a_skipped_step_leaves_the_adapter_as_it_was(skipping: Finished) -> None:
    step = skipped_step(skipping)
    assert skipping.at(step).tensors == skipping.at(step - 1).tensors
    assert skipping.at(step + 1).tensors != skipping.at(step).tensors
    arrays = skipping.at(20).tensors.values()
    assert all(np.isfinite(tensor.to_numpy()).all() for tensor in arrays)


@pytest.mark.slow("trains a run of its own")
def test_a_checkpoint_can_be_written_in_a_report_that_holds_a_skipped_step(
    poisoned_base: Path, tmp_path: Path
) -> None:
    changes = {"steps_per_report": 50, "save_every": 4}
    done = train_example(tmp_path / "run", **poisoned(poisoned_base, **changes))
    assert done.result.step == 20


def test_skipped_steps_above_the_gates_share_are_rejected(skipping: Finished) -> None:
    with pytest.raises(GateRejected, match=r"updates_missing: .*1 of 20 updates were skipped"):
        steps.judge(skipping.config, skipping.run)
    bounds = GateSection(max_skipped_share=0.05)
    lenient = skipping.config.model_copy(update={"gate": bounds})
    (tier,) = steps.judge(lenient, skipping.run).tiers
    assert (tier.expected_updates, tier.applied_updates, tier.skipped_updates) == (20, 19, 1)


@pytest.mark.slow("trains a run of its own")
def test_the_gate_passes_a_run_whose_last_open_chunk_is_one_skipped_step(
    skipping: Finished, tmp_path: Path
) -> None:
    last = skipped_step(skipping)
    clocks = {"frequencies": [1, last - 1], "slow_gradients": "accumulate"}
    changes = {"iters": last, "data": skipping.config.data, "nested": clocks}
    changes["gate"] = {"max_skipped_share": 0.5}
    done = train_example(tmp_path / "run", **poisoned(Path(skipping.config.model), **changes))
    slow = steps.judge(done.config, done.run).tiers[1]
    assert (slow.expected_updates, slow.applied_updates, slow.skipped_updates) == (2, 1, 1)


def test_training_that_ends_right_after_the_limit_is_given_up_too(tmp_path, caplog) -> None:
    changes: dict[str, Any] = {"iters": 4, "learning_rate": 1e30, "val_batches": 0}
    with pytest.raises(
        TrainingDiverged, match=r"3 steps in a row, up to step 4.*learning_rate 1e\+30"
    ):
        train_example(tmp_path / "run", training={"max_nonfinite_steps": 3}, **changes)
    assert caplog.messages == [
        f"step {step} was skipped: its gradients are not finite ({row} in a row)"
        for step, row in ((2, 1), (3, 2), (4, 3))
    ]


@pytest.mark.parametrize("limit", slow_except([1, 3], 1, reason="trains a run of its own"))
def test_training_that_stays_non_finite_is_given_up_after_the_limit(tmp_path, limit) -> None:
    changes: dict[str, Any] = {
        "iters": 12,
        "learning_rate": 1e30,
        "val_batches": 0,
        "steps_per_report": 1,
        "training": {"max_nonfinite_steps": limit},
    }
    with pytest.raises(TrainingDiverged, match=rf"not finite for {limit} steps in a row"):
        train_example(tmp_path / "run", **changes)
    assert not (tmp_path / "run" / "adapter").exists()


@pytest.mark.slow("trains a run of its own for many steps")
def test_diverged_training_with_checkpoints_and_evaluations_says_that_it_diverged(tmp_path) -> None:
    changes: dict[str, Any] = {"iters": 12, "learning_rate": 1e30, "val_batches": 1}
    with pytest.raises(TrainingDiverged, match="training has diverged"):
        train_example(
            tmp_path / "run", save_every=2, steps_per_eval=2, steps_per_report=2, **changes
        )


@pytest.mark.slow("trains a run of its own")
def test_a_base_that_computes_nan_is_not_taken_for_a_learning_rate_too_large(tmp_path) -> None:
    weights: dict[str, mx.array] = mx.load(str(MODEL / "model.safetensors"))  # type: ignore[assignment]
    weights["model.norm.weight"][0] = float("nan")
    shutil.copytree(MODEL, tmp_path / "base")
    mx.save_safetensors(str(tmp_path / "base" / "model.safetensors"), weights)
    with pytest.raises(TrainingDiverged) as caught:
        train_example(tmp_path / "run", model=str(tmp_path / "base"), val_batches=0)
    assert "in any of the first 5 steps" in str(caught.value)
    assert "Look for NaN and infinity in its weights" in str(caught.value)
    assert "learning_rate" not in str(caught.value)


def lose(self: trainer.Trainer, updates: dict[str, Any]) -> None:
    """What the original trainer did: `'.'.join(path)` on a path that is one string."""
    parameters = self.model.trainable_parameters()
    self.model.update(
        tree_map_with_path(lambda path, value: updates.get(".".join(path), value), parameters)
    )


def test_updates_that_never_reach_the_model_raise_a_red_flag_and_the_gate_rejects(tmp_path) -> None:
    config = example_config()
    run = prepare(config, tmp_path / "run")
    with (
        patch.object(trainer.Trainer, "write_parameters_into_model", lose),
        pytest.warns(SilentUpdateWarning, match="at step 1 7 of 14 computed updates are not in"),
        pytest.warns(SilentUpdateWarning, match="checkpoint of step 8 equals the initial adapter"),
    ):
        done = train(config, run)
    assert [flag.split(" ")[0] for flag in done.result.red_flags] == [
        "updates_not_applied:",
        "checkpoint_unchanged:",
    ]
    with pytest.raises(GateRejected, match="unchanged"):
        steps.judge(config, run)
    assert json.loads(run.gate.read_bytes())["reasons"][0]["code"] == "unchanged"
    assert [r["val_loss"] for r in done.metrics() if "val_loss" in r][0] == done.result.val_loss


def test_a_learning_rate_too_small_to_move_a_weight_raises_a_red_flag(tmp_path: Path) -> None:
    with pytest.warns(SilentUpdateWarning, match="is the learning rate too small"):
        done = train_example(
            tmp_path / "run", learning_rate=1e-12, val_batches=0, nested={"frequencies": [1]}
        )
    assert [flag.split(":")[0] for flag in done.result.red_flags] == ["parameters_unchanged"]


def test_a_checkpoint_that_equals_the_initial_adapter_raises_a_red_flag(tmp_path: Path) -> None:
    no_rate = {"name": "linear_schedule", "arguments": [0.0, 0.0, 10]}
    with pytest.warns(SilentUpdateWarning) as caught:
        done = train_example(
            tmp_path / "run", lr_schedule=no_rate, val_batches=0, save_every=2, iters=6
        )
    assert [str(warning.message) for warning in caught] == [
        "checkpoint_unchanged: the checkpoint of step 4 equals the initial adapter, byte for byte: "
        "nothing has been trained yet."
    ]
    assert list(done.result.red_flags) == [str(caught[0].message)]


@pytest.mark.slow("trains a run of its own for many steps")
def test_a_loss_that_does_not_move_raises_a_red_flag(tmp_path: Path) -> None:
    changes: dict[str, Any] = {
        "lr_schedule": {"name": "linear_schedule", "arguments": [0.0, 0.0, 10]},
        "batch_size": 40,
        "iters": 5,
        "val_batches": 0,
        "steps_per_report": 1,
        "training": {"flat_loss_reports": 4},
    }
    with pytest.warns(SilentUpdateWarning) as caught:
        done = train_example(tmp_path / "run", **changes)
    flat, unchanged = (str(warning.message) for warning in caught)
    assert flat.startswith(
        "loss_flat: the training loss has not changed significantly over 4 reports"
    )
    assert unchanged.startswith("checkpoint_unchanged: the checkpoint of step 5")
    assert done.result.red_flags == (flat, unchanged)


@pytest.mark.slow("trains a run of its own")
def test_slow_tiers_that_gather_raise_no_red_flag_between_their_updates(tmp_path: Path) -> None:
    nested = {"frequencies": [1, 4], "slow_gradients": "accumulate"}
    done = train_example(tmp_path / "run", iters=6, steps_per_report=1, nested=nested)
    assert done.result.red_flags == ()


def test_data_that_changed_between_validation_and_training_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for name in ("train.jsonl", "valid.jsonl"):
        (data / name).write_bytes((DATA / name).read_bytes())
    config = example_config(data=str(data))
    run = prepare(config, tmp_path / "run")
    lines = (data / "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(lines[1:]) + "\n")
    with pytest.raises(DatasetError, match=r"data has changed since it was validated.*new run"):
        train(config, run)
    assert not run.metrics.exists()


def test_a_stop_while_the_model_is_being_fetched_is_a_stop(tmp_path: Path) -> None:
    stopped = TrainingStopped("a signal came during the download")
    with patch("mlx_lm.utils._download", side_effect=stopped), pytest.raises(TrainingStopped):
        prepare(example_config(model="some/repository"), tmp_path / "run")
