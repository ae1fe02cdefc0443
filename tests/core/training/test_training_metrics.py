"""metrics.jsonl: its shape, the learning rate that was really used, the norm that was clipped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.data.batches import BatchOrder
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.models.base_model import load_base_model
from nested_core.models.lora_attachment import attach_adapter
from nested_core.optim.named_updates import flatten
from nested_core.training.loss.cross_entropy import supervised_loss
from tests.example import Finished, example_config, train_example

RATE = 2e-3


def test_the_first_line_is_step_0_with_a_validation_loss_and_no_loss(every_step: Finished) -> None:
    first = every_step.metrics()[0]
    assert set(first) == {"step", "iteration", "val_loss"}
    assert (first["step"], first["iteration"]) == (0, 0)
    assert first["val_loss"] > 4


def test_a_report_holds_every_number_of_design(every_step: Finished) -> None:
    wanted = {"step", "loss", "learning_rate", "grad_norm", "tokens_per_second", "peak_memory_gb"}
    wanted |= {"iteration", "updates", "skipped", "clipped_grad_norm", "trained_tokens"}
    for number, record in enumerate(every_step.metrics()[1:], start=1):
        assert wanted <= set(record)
        assert (record["step"], record["iteration"]) == (number, number)
        assert record["updates"] == [number, number // 2, number // 4]
        assert record["skipped"] == [0, 0, 0]
    assert "val_loss" in every_step.metrics()[-1]


def test_a_loss_is_a_float32_in_full_precision(every_step: Finished) -> None:
    losses = [record["loss"] for record in every_step.metrics()[1:]]
    assert [float(np.float32(loss)) for loss in losses] == losses
    assert len({round(loss, 4) for loss in losses}) == len(losses)


def test_a_report_is_the_mean_over_the_tokens_since_the_last(every_step, tmp_path) -> None:
    changes: dict[str, Any] = {"steps_per_report": 4, "training": {"keep_checkpoints": 99}}
    coarse = train_example(tmp_path / "run", iters=9, save_every=1, **changes)
    fine = every_step.metrics()[1:]
    tokens = np.diff([0, *(record["trained_tokens"] for record in fine)])
    losses = np.array([record["loss"] for record in fine])
    for record, window in zip(
        coarse.metrics()[1:], (slice(4), slice(4, 8), slice(8, 9)), strict=True
    ):
        expected = np.average(losses[window], weights=tokens[window])
        assert record["loss"] == pytest.approx(expected, rel=1e-6)
        assert record["trained_tokens"] == tokens[: window.stop].sum()


@pytest.mark.parametrize(
    "schedule",
    [
        pytest.param(None, marks=pytest.mark.slow("trains another run")),
        {"name": "cosine_decay", "arguments": [RATE, 20]},
    ],
)
def test_the_learning_rate_of_a_warm_up_is_rate_times_min_1_n_over_w(tmp_path, schedule) -> None:
    done = train_example(
        tmp_path / "run",
        iters=7,
        steps_per_report=1,
        val_batches=0,
        lr_schedule=schedule,
        training={"warmup_steps": 4},
    )
    records = done.metrics()[1:]
    for n, record in enumerate(records, start=1):
        decay = 1.0 if schedule is None else 0.5 * (1 + math.cos(math.pi * (n - 1) / 20))
        assert record["learning_rate"] == pytest.approx(RATE * min(1, n / 4) * decay, rel=1e-5)
    assert len(records) == 7


def _expected_norm(config: FineTuneConfig, due: set[int], tiers: dict[str, int]) -> float:
    """The global norm of the first step's gradients of the due tiers, by nn.value_and_grad."""
    model, _ = load_base_model(config)
    attach_adapter(model, config)
    _, splits = load_dataset(DataSettings.from_config(config), TokenizerSource.from_config(config))
    plan = BatchOrder(splits["train"].lengths, config.batch_size, config.seed)
    tokens, supervised = (mx.array(part) for part in plan.arrays(splits["train"], 0))

    def mean_loss(tokens: mx.array, supervised: mx.array) -> mx.array:
        total, count = supervised_loss(model, tokens, supervised)
        return total / count

    _, gradients = nn.value_and_grad(model, mean_loss)(tokens, supervised)
    flat = flatten(gradients)
    squares = [np.square(np.array(g)).sum() for name, g in flat.items() if tiers[name] in due]
    return math.sqrt(sum(squares))


def test_the_norm_is_over_the_adapter_gradients_of_the_due_tiers_alone(every_step) -> None:
    tiers = json.loads(every_step.run.tiers.read_bytes())["tensors"]
    first = every_step.metrics()[1]
    expected = _expected_norm(every_step.config, {0}, tiers)
    assert first["grad_norm"] == pytest.approx(expected, rel=1e-4)
    assert _expected_norm(every_step.config, {0, 1, 2}, tiers) > 1.1 * expected


def test_the_norm_after_clipping_is_at_most_the_bound(every_step: Finished) -> None:
    norms = [(r["grad_norm"], r["clipped_grad_norm"]) for r in every_step.metrics()[1:]]
    assert max(norm for norm, _ in norms) > 1.0
    assert all(clipped == pytest.approx(min(norm, 1.0), rel=1e-5) for norm, clipped in norms)


def test_a_bound_of_0_clips_nothing(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"training": {"max_grad_norm": 0}, "nested": {"frequencies": [1]}}
    done = train_example(tmp_path / "run", iters=2, steps_per_report=1, val_batches=0, **changes)
    for record in done.metrics()[1:]:
        assert record["clipped_grad_norm"] == record["grad_norm"] > 1.0


def test_training_takes_its_iterations_from_epochs_where_they_are_given(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"training": {"epochs": 0.5}, "batch_size": 8}
    done = train_example(tmp_path / "run", val_batches=0, nested={"frequencies": [1]}, **changes)
    assert done.result.step == 3  # half of 40 examples in batches of 8
    assert example_config(**changes).iters == 8
