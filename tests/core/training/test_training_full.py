"""Full fine-tuning: the model's own weights, trained as float32 masters, published in its dtype."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm import load
from mlx_lm.utils import quantize_model, save

from nested_core.errors import ConfigError, SilentUpdateWarning, TrainingStopped
from nested_core.optim.named_updates import flatten
from nested_core.pipeline import steps
from nested_core.storage.checkpoint import MASTERS_PREFIX, OPTIMIZER_NAME
from nested_core.storage.checkpoint_verification import checkpoint_path
from nested_core.storage.safetensors_files import load_arrays, read_tensors
from tests.example import (
    MODEL,
    SPEEDS,
    Finished,
    example_config,
    prepare,
    stop_after,
    train,
    train_example,
)
from tests.left_out import slow_except

pytestmark = pytest.mark.slow("trains all weights")

FULL: dict[str, Any] = {
    "fine_tune_type": "full",
    "num_layers": 3,
    "iters": 8,
    "learning_rate": 5e-4,
    "val_batches": 2,
    "steps_per_eval": 4,
    "steps_per_report": 3,
    "optimizer": "adamw",
}


@pytest.fixture(
    scope="module",
    params=slow_except(["skip", "accumulate"], "skip", reason="trains the whole model once more"),
)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A run that nobody stops, in each mode; under accumulate with a chunk left open."""
    nested = {"frequencies": [1, 2, 3], "slow_gradients": request.param}
    return train_example(tmp_path_factory.mktemp("full") / "run", **FULL, nested=nested)


def test_a_quantised_base_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    model, tokenizer = load(str(MODEL))[:2]
    known = json.loads((MODEL / "config.json").read_bytes())
    model, config = quantize_model(model, known, group_size=32, bits=4)
    save(tmp_path / "base", MODEL, model, tokenizer, config)
    changes = FULL | {"model": str(tmp_path / "base")}
    with pytest.raises(
        ConfigError, match=r"full: 21 weights .*layers.3.self_attn.q_proj.weight .*lora"
    ):
        prepare(example_config(**changes), tmp_path / "run")
    assert not (tmp_path / "run" / "initial").exists()


def test_a_rate_whose_steps_are_lost_in_bfloat16_raises_a_red_flag(tmp_path: Path) -> None:
    with pytest.warns(
        SilentUpdateWarning, match=r"updates_rounded_away: of 158,\d{3} .*, 158,\d{3} are saved as"
    ):
        done = train_example(tmp_path / "run", **FULL | {"learning_rate": 1e-8, "val_batches": 0})
    assert [flag.split(":")[0] for flag in done.result.red_flags] == ["updates_rounded_away"]


def last(done: Finished) -> Path:
    return checkpoint_path(done.run.checkpoints, 8)


def test_the_last_layers_alone_are_trained_and_every_tensor_moves(whole: Finished) -> None:
    tensors = whole.at(8).tensors
    assert {name.split(".")[2] for name in tensors} == {"3", "4", "5"}
    assert whole.result.red_flags == ()
    masters = load_arrays(last(whole) / OPTIMIZER_NAME)
    for name, start in load_arrays(whole.run.initial / "adapters.safetensors").items():
        assert not mx.array_equal(masters[MASTERS_PREFIX + name], start.astype(mx.float32))


def test_what_is_published_has_the_models_dtype_and_is_the_rounded_master(whole: Finished) -> None:
    base = load_arrays(MODEL / "model.safetensors")
    published = load_arrays(last(whole) / "adapters.safetensors")
    held = load_arrays(last(whole) / OPTIMIZER_NAME)
    offered = read_tensors(whole.run.adapter / "adapters.safetensors")
    for name, array in published.items():
        assert array.dtype == base[name].dtype == mx.bfloat16
        assert offered[name].dtype == "BF16"
        master = held[MASTERS_PREFIX + name]
        assert master.dtype == held[f"{name}.m"].dtype == held[f"{name}.v"].dtype == mx.float32
        assert mx.array_equal(master.astype(mx.bfloat16), array)
    wider = [n for n, a in published.items() if not mx.array_equal(held[MASTERS_PREFIX + n], a)]
    assert len(wider) == len(published)


@pytest.mark.slow("trains the whole model three times")
@pytest.mark.parametrize("step", slow_except([1, 5], 5, reason="trains, stops and resumes a run"))
def test_a_stopped_and_resumed_run_is_bit_identical(whole, tmp_path, step) -> None:
    run = prepare(whole.config, tmp_path / "run")
    with pytest.raises(TrainingStopped):
        train(whole.config, run, on_start=stop_after(step))
    steps.write_run_config(whole.config, run, resume=True)
    done = train(whole.config, run)
    for name in ("adapters.safetensors", OPTIMIZER_NAME):
        assert read_tensors(last(done) / name) == read_tensors(last(whole) / name)
    assert done.metrics(without=SPEEDS) == whole.metrics(without=SPEEDS)


def test_the_gate_passes_and_mlx_lm_loads_what_was_trained(whole: Finished) -> None:
    assert steps.judge(whole.config, whole.run).has_passed
    tokens = mx.array([[5, 6, 7, 8, 9]])
    model = load(str(MODEL), adapter_path=str(whole.run.adapter))[0]
    published = load_arrays(whole.run.adapter / "adapters.safetensors")
    held = flatten(model)
    assert all(mx.array_equal(held[name], array) for name, array in published.items())
    logits = np.array(model(tokens).astype(mx.float32))
    before = np.array(load(str(MODEL))[0](tokens).astype(mx.float32))
    assert np.abs(logits - before).max() > 0.1
