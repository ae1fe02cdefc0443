"""Micro-batches that add up: the same update as one big batch, and one optimizer call for all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.models.base_model import load_base_model
from nested_core.models.lora_attachment import attach_adapter
from nested_core.optim.named_updates import flatten
from nested_core.storage.checkpoint import OPTIMIZER_NAME
from nested_core.storage.checkpoint_verification import STATE_NAME, checkpoint_path
from nested_core.storage.safetensors_files import read_tensors
from tests.example import Finished, train_example
from tests.left_out import slow_except

pytestmark = pytest.mark.slow("trains on micro batches and on whole ones")

Moments = dict[str, np.ndarray]
CAPITALS = {"Austria": "Vienna", "China": "Beijing", "Peru": "Lima", "Spain": "Madrid"}
ONE_TIER = {"nested": {"frequencies": [1]}, "training": {"max_grad_norm": 0}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight examples whose answers have from a few to some forty tokens."""
    folder = tmp_path_factory.mktemp("uneven")
    lines = []
    for number, (country, capital) in enumerate((*CAPITALS.items(), *CAPITALS.items())):
        answer = " ".join([f"Go to {capital}, the capital of {country}!"] * (number // 2 + 1))
        asked = {"role": "user", "content": f"{'Tell me. ' * number}Where is {country}?"}
        messages = [asked, {"role": "assistant", "content": answer}]
        lines.append(json.dumps({"messages": messages}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def one_step(path: Path, data: Path, batch_size: int) -> tuple[Finished, Moments]:
    """One optimizer step over all eight examples, and the gradient that it used."""
    parts = 8 // batch_size
    sizes = {"batch_size": batch_size, "grad_accumulation_steps": parts, "iters": parts}
    done = train_example(path, data=str(data), steps_per_report=parts, **ONE_TIER, **sizes)
    moments = read_tensors(checkpoint_path(done.run.checkpoints, 1) / OPTIMIZER_NAME)
    b1 = 0.9  # the first moment after one step is (1 - b1) * gradient
    gradient = {
        name.removesuffix(".m"): moment.to_numpy() / (1 - b1)
        for name, moment in moments.items()
        if name.endswith("lora_b.m")
    }
    return done, gradient


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Moments]:
    return one_step(tmp_path_factory.mktemp("whole") / "run", data, 8)


def distance(left: Moments, right: Moments) -> float:
    """The norm of the difference over the norm, over all tensors together."""
    assert left.keys() == right.keys()
    difference = sum(np.square(left[name] - right[name]).sum() for name in left)
    return float(np.sqrt(difference / sum(np.square(left[name]).sum() for name in left)))


@pytest.mark.parametrize("batch_size", slow_except([4, 1], 1, reason="compiles another step"))
def test_micro_batches_of_unequal_token_counts_give_the_gradient_of_one_big_batch(
    whole: tuple[Finished, Moments], data: Path, tmp_path: Path, batch_size: int
) -> None:
    done, gradient = one_step(tmp_path / "run", data, batch_size)
    assert distance(whole[1], gradient) < 1e-5
    for records in zip(whole[0].metrics()[1:], done.metrics()[1:], strict=True):
        assert records[1]["trained_tokens"] == records[0]["trained_tokens"]
        assert records[1]["loss"] == pytest.approx(records[0]["loss"], rel=1e-6)
        assert records[1]["grad_norm"] == pytest.approx(records[0]["grad_norm"], rel=1e-5)


def gradients_by_example(done: Finished) -> list[tuple[int, Moments]]:
    """Supervised tokens and summed gradient of every example, without any of our training code."""
    model, _ = load_base_model(done.config)
    attach_adapter(model, done.config)
    settings = DataSettings.from_config(done.config)
    tokenizer = TokenizerSource.from_config(done.config)
    split = load_dataset(settings, tokenizer)[1]["train"]

    def loss(tokens: mx.array, learnt: mx.array) -> mx.array:
        losses = nn.losses.cross_entropy(model(tokens[None, :-1])[0], tokens[1:])
        return (losses * learnt[1:]).sum()

    found = []
    for row in range(len(split)):
        learnt = split.example_mask(row)
        _, tree = nn.value_and_grad(model, loss)(mx.array(split.example(row)), mx.array(learnt))
        sums = {n: np.array(g) for n, g in flatten(tree).items() if n.endswith("lora_b")}
        found.append((int(learnt.sum()), sums))
    return found


def test_every_supervised_token_weighs_the_same(whole: tuple[Finished, Moments]) -> None:
    parts = gradients_by_example(whole[0])
    counts = [count for count, _ in parts]
    assert max(counts) > 3 * min(counts)
    by_token, by_example = dict(whole[1]), dict(whole[1])
    for name in whole[1]:
        by_token[name] = np.sum([g[name] for _, g in parts], axis=0) / sum(counts)
        by_example[name] = np.mean([g[name] / n for n, g in parts], axis=0)
    assert distance(by_token, whole[1]) < 1e-4
    assert distance(by_example, whole[1]) > 0.02


def test_a_partial_accumulation_at_the_end_is_one_step_of_its_own(tmp_path: Path) -> None:
    sizes = {"iters": 7, "grad_accumulation_steps": 3, "steps_per_report": 3}
    done = train_example(tmp_path / "run", **sizes, **ONE_TIER)
    assert [(r["step"], r["iteration"]) for r in done.metrics()] == [(0, 0), (1, 3), (2, 6), (3, 7)]
    assert done.metrics()[-1]["updates"] == [3]
    assert int(done.trainer.optimizer.step.item()) == 3
    state = json.loads((checkpoint_path(done.run.checkpoints, 3) / STATE_NAME).read_bytes())
    assert (state["step"], state["iteration"], state["tiers"][0]["updates"]) == (3, 7, 3)


@pytest.mark.slow("trains a run of its own")
def test_the_last_partial_step_moves_the_adapter(tmp_path: Path) -> None:
    sizes: dict[str, Any] = {"iters": 7, "grad_accumulation_steps": 3, "save_every": 6}
    done = train_example(tmp_path / "run", val_batches=0, **sizes, **ONE_TIER)
    before, after = done.at(2).tensors, done.at(3).tensors
    assert all(before[name].data != after[name].data for name in before)
