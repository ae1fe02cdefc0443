"""Options of the loop: importance probe, gradient checkpointing, export under mlx-lm's names."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm import load

from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import TrainingStopped
from nested_core.kernels.optimized_model import checkpointing_layers
from nested_core.models.base_model import load_base_model
from nested_core.models.lora_attachment import attach_adapter
from nested_core.optim.named_updates import flatten
from nested_core.pipeline import steps
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from nested_core.storage.safetensors_files import read_tensors
from nested_core.training.parameter_importance import measure_parameter_importance
from nested_core.training.trainer import Trainer
from tests.core.training.conftest import EVERY_STEP
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

pytestmark = pytest.mark.slow("trains with each option")

IMPORTANCE = {"strategy": "parameter_importance", "probe_batches": 2}


OWN_CODE = """
from mlx_lm.models import llama
from mlx_lm.models.activations import swiglu
from mlx_lm.models.llama import ModelArgs

class MLP(llama.MLP):
    def __call__(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x)))

class Model(llama.Model):
    def __init__(self, args):
        super().__init__(args)
        for layer in self.layers:
            layer.mlp = MLP(args)
"""


def weights_of(model: Any) -> dict[str, bytes]:
    return {name: np.array(leaf).tobytes() for name, leaf in flatten(model).items()}


def random_state() -> list[int]:
    state: Any = mx.random.state
    return list(np.array(state[0]))


def test_the_importance_probe_changes_no_weight_no_random_state_and_no_mode() -> None:
    config = example_config(nested=IMPORTANCE, lora_parameters={"dropout": 0.3})
    model, _ = load_base_model(config)
    attach_adapter(model, config)
    tokenizer = TokenizerSource.from_config(config)
    split = load_dataset(DataSettings.from_config(config), tokenizer)[1]["train"]
    model.train()
    weights, random = weights_of(model), random_state()
    first = measure_parameter_importance(config, model, split)
    assert weights_of(model) == weights
    assert random_state() == random
    assert model.training is True
    assert measure_parameter_importance(config, model, split) == first
    assert all(first[name] == 0 for name in first if name.endswith("lora_a"))
    assert all(first[name] > 0 for name in first if name.endswith("lora_b"))


def test_importance_puts_whole_layers_into_tiers_the_most_important_fastest(tmp_path: Path) -> None:
    config = example_config(nested=IMPORTANCE)
    run = prepare(config, tmp_path / "run")
    tiers = json.loads(run.tiers.read_bytes())["tensors"]
    model, _ = load_base_model(config)
    attach_adapter(model, config)
    tokenizer = TokenizerSource.from_config(config)
    split = load_dataset(DataSettings.from_config(config), tokenizer)[1]["train"]
    importance = measure_parameter_importance(config, model, split)
    by_layer: dict[int, float] = dict.fromkeys(range(3, 6), 0.0)
    for name, value in importance.items():
        by_layer[int(name.split(".")[2])] += value
    ranked = sorted(by_layer, key=lambda layer: -by_layer[layer])
    expected = {layer: rank for rank, layer in enumerate(ranked)}
    assert {(int(name.split(".")[2]), tier) for name, tier in tiers.items()} == set(
        expected.items()
    )


def test_the_probe_of_a_run_does_not_change_what_it_starts_from(tmp_path: Path) -> None:
    probed = prepare(example_config(nested=IMPORTANCE), tmp_path / "probed")
    plain = prepare(example_config(), tmp_path / "plain")
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        assert (probed.initial / name).read_bytes() == (plain.initial / name).read_bytes()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    return train_example(tmp_path_factory.mktemp("plain") / "run", **LOSSES)


LOSSES: dict[str, Any] = {"num_layers": -1, "iters": 4, "steps_per_report": 1, "val_batches": 2}


@pytest.mark.slow("trains two runs")
def test_gradient_checkpointing_gives_the_same_losses_and_leaves_the_classes_alone(
    plain: Finished, tmp_path: Path
) -> None:
    kinds = {type(layer) for layer in plain.trainer.model.layers}
    calls = {kind: kind.__call__ for kind in kinds}
    done = train_example(tmp_path / "run", grad_checkpoint=True, **LOSSES)
    for key in ("loss", "grad_norm"):
        expected = [record[key] for record in plain.metrics()[1:]]
        assert [record[key] for record in done.metrics()[1:]] == pytest.approx(expected, rel=1e-4)
    assert {type(layer) for layer in done.trainer.model.layers} == kinds
    assert all(kind.__call__ is call for kind, call in calls.items())


@pytest.mark.parametrize("recomputed", slow_except([1, 4, 6], 4, reason="trains another run"))
def test_recomputing_any_number_of_layers_gives_the_same_bits(plain, tmp_path, recomputed) -> None:
    def choose(trainer: Trainer) -> None:
        assert (trainer.memory.recomputed, trainer.memory.layers) == (6, 6)
        trainer.memory = replace(trainer.memory, recomputed=recomputed)
        assert len(trainer.memory.layers_to_recompute(trainer.model)) == recomputed

    config = example_config(grad_checkpoint=True, **LOSSES)
    done = train(config, prepare(config, tmp_path / "run"), on_start=choose)
    speeds = {"without": SPEEDS}
    assert done.metrics(**speeds) == plain.metrics(**speeds)
    assert weights_of(done.trainer.model) == weights_of(plain.trainer.model)


def test_only_the_given_layers_are_computed_again(plain: Finished) -> None:
    model = plain.trainer.model
    (kind,) = {type(layer) for layer in model.layers}
    place = {id(layer): index for index, layer in enumerate(model.layers)}
    times, call = [0] * len(model.layers), kind.__call__

    def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        times[place[id(layer)]] += 1
        return call(layer, *args, **kwargs)

    kind.__call__ = counted
    try:
        with checkpointing_layers(model.layers[1:3]):
            gradients = nn.value_and_grad(model, lambda tokens: model(tokens).sum())
            mx.eval(gradients(mx.array([[1, 2, 3]])))
    finally:
        kind.__call__ = call
    assert times == [1, 2, 2, 1, 1, 1]


def test_the_classes_are_given_back_after_an_error(plain: Finished) -> None:
    (kind,) = {type(layer) for layer in plain.trainer.model.layers}
    call = kind.__call__

    def fail_inside() -> None:
        with checkpointing_layers(plain.trainer.model.layers):
            assert kind.__call__ is not call
            raise RuntimeError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        fail_inside()
    assert kind.__call__ is call


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Finished, Path]:
    folder = tmp_path_factory.mktemp("exported")
    target = folder / "adapters"
    done = train_example(folder / "run", save_every=3, val_batches=0, adapter_path=str(target))
    return done, target


def test_an_export_has_the_file_names_of_mlx_lm_and_says_what_it_was_trained_on(
    exported: tuple[Finished, Path],
) -> None:
    names = {path.name for path in exported[1].iterdir()}
    snapshots = {f"{iteration:07d}_adapters.safetensors" for iteration in (3, 6)}
    ours = "training-examples.json"
    assert names == {"adapters.safetensors", "adapter_config.json", ours, *snapshots}


def test_an_export_is_the_runs_adapter_and_its_snapshots_the_checkpoints(exported) -> None:
    done, target = exported
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        assert (target / name).read_bytes() == (done.run.adapter / name).read_bytes()
    for step in (3, 6):
        weights = done.run.checkpoints / f"step-{step:07d}" / WEIGHTS_NAME
        assert (target / f"{step:07d}_{WEIGHTS_NAME}").read_bytes() == weights.read_bytes()


@pytest.mark.slow("trains two runs")
def test_checkpoints_by_the_clock_have_the_bytes_of_those_by_iterations(
    every_step: Finished, tmp_path: Path
) -> None:
    def tensors(finished: Finished) -> dict[str, bytes]:
        folder = finished.run.checkpoints
        return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.safetensors")}

    by_clock: dict[str, Any] = EVERY_STEP | {"iters": 9, "adapter_path": str(tmp_path / "out")}
    finished = train_example(tmp_path / "run", **by_clock | {"save_every": "0.00001m"})
    assert tensors(finished) == tensors(every_step)
    assert (tmp_path / "out" / "0000004_adapters.safetensors").exists()
    long = train_example(tmp_path / "long", **by_clock | {"save_every": "60m"})
    assert set(tensors(long)) < set(tensors(every_step))


def test_a_snapshot_within_an_update_has_the_weights_before_it(tmp_path: Path) -> None:
    target = tmp_path / "adapters"
    options: dict[str, Any] = {"grad_accumulation_steps": 2, "save_every": 3, "val_batches": 0}
    options["nested"] = {"frequencies": [1]}
    done = train_example(tmp_path / "run", iters=6, adapter_path=str(target), **options)
    names = ["0000003_adapters.safetensors", "0000006_adapters.safetensors"]
    assert sorted(path.name for path in target.glob("0*")) == names
    first, last = (read_tensors(target / name) for name in names)
    assert last == read_tensors(done.run.checkpoints / "step-0000003" / WEIGHTS_NAME)
    assert first != read_tensors(done.run.checkpoints / "step-0000002" / WEIGHTS_NAME)
    one_update = train_example(tmp_path / "one", iters=2, **options)
    assert first == read_tensors(one_update.run.adapter / WEIGHTS_NAME)


@pytest.mark.slow("trains two runs")
def test_a_snapshot_that_a_killed_process_did_not_write_is_written_on_resume(tmp_path) -> None:
    target = tmp_path / "adapters"
    config = example_config(iters=6, save_every=2, adapter_path=str(target), val_batches=0)
    run = prepare(config, tmp_path / "run")
    with pytest.raises(TrainingStopped):
        train(config, run, on_start=stop_after(2))
    snapshot = target / "0000002_adapters.safetensors"
    content = snapshot.read_bytes()
    snapshot.unlink()
    train(config, run)
    assert snapshot.read_bytes() == content


def test_mlx_lm_loads_an_export_and_computes_what_the_trainer_computes(exported) -> None:
    done, target = exported
    tokens = mx.array([[5, 6, 7, 8, 9]])
    base = load(str(MODEL))[0]
    loaded = load(str(MODEL), adapter_path=str(target))[0]
    for model in (base, loaded):
        model.set_dtype(mx.float32)
        model.eval()
    done.trainer.model.eval()
    logits, trained = np.array(loaded(tokens)), np.array(done.trainer.model(tokens))
    np.testing.assert_allclose(logits, trained, rtol=1e-4, atol=1e-4)
    assert np.abs(logits - np.array(base(tokens))).max() > 0.1


def test_an_exported_configuration_says_what_mlx_lm_needs(exported: tuple[Finished, Path]) -> None:
    config = read_adapter(exported[1]).config
    assert config["fine_tune_type"] == "lora"
    assert config["num_layers"] == 3
    assert config["lora_parameters"] == {"rank": 8, "scale": 2.0, "dropout": 0.0}
    rule, _, digest = config["base_fingerprint"].partition(":")
    assert (rule, len(digest)) == ("sha256", 64)


@pytest.mark.slow("trains in a process of its own")
def test_a_base_model_with_code_of_its_own_trains_to_the_loss_of_mlx_lms(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(MODEL, folder)
    (folder / "own.py").write_text(OWN_CODE)
    known = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(known | {"model_file": "own.py"}))
    own = train_example(tmp_path / "own", model=str(folder), trust_remote_code=True, iters=4)
    expected = train_example(tmp_path / "run", iters=4)
    assert own.trainer.state.train_loss == pytest.approx(expected.trainer.state.train_loss)
    assert steps.judge(own.config, own.run).has_passed
