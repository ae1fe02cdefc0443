"""What is trained: adapter leaves only, whatever the LoRA configuration; the base stays."""

from __future__ import annotations

import hashlib
import json
import shutil
import textwrap
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from safetensors.numpy import save_file

from nested_core.errors import ConfigError, DamagedError
from nested_core.models.base_model import FINGERPRINT_PREFIX, load_base_model
from nested_core.models.lora_attachment import attach_adapter, is_adapter_parameter
from nested_core.models.parameters import trainable_parameters
from nested_core.optim.named_updates import flatten
from nested_core.pipeline import steps
from nested_core.pipeline.preflight import check_before_start
from nested_core.storage.adapter import read_adapter
from nested_core.storage.run_directory import RunDirectory
from tests.example import MODEL, Finished, example_config, prepare, train_example
from tests.left_out import slow_except

LAYERS, MODULES = 3, 7  # that are trained: q, k, v, o, gate, up and down in each layer


def test_the_base_holds_the_bytes_it_was_loaded_with_after_training(every_step: Finished) -> None:
    fresh, _ = load_base_model(every_step.config)
    held = flatten(every_step.trainer.model)
    for name, leaf in flatten(fresh).items():
        module, _, leaf_name = name.rpartition(".")
        now = held.get(name, held.get(f"{module}.linear.{leaf_name}"))
        assert now is not None, name
        assert np.array(now).tobytes() == np.array(leaf).tobytes(), name
    assert len(flatten(fresh)) + len(trainable_parameters(every_step.trainer.model)) == len(held)


def test_the_files_of_the_base_are_not_touched(tmp_path: Path) -> None:
    def hashes() -> dict[str, str]:
        files = sorted(path for path in MODEL.iterdir() if path.is_file())
        return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = hashes()
    train_example(tmp_path / "run", iters=1, nested={"frequencies": [1]}, val_batches=0)
    assert hashes() == before


def test_only_adapter_leaves_are_trainable(every_step: Finished) -> None:
    names = list(trainable_parameters(every_step.trainer.model))
    assert len(names) == 2 * LAYERS * MODULES
    assert {name.rpartition(".")[2] for name in names} == {"lora_a", "lora_b"}
    assert all(is_adapter_parameter(name) for name in names)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("layers.0.self_attn.q_proj.lora_a", True),
        ("layers.0.self_attn.q_proj.LORA_B", True),
        ("layers.0.mlp.Lora_A.weight", True),
        ("layers.0.Adapter.up.weight", True),
        ("layers.0.ADAPTERS.0.scale", True),
        ("layers.0.self_attn.q_proj.m", True),
        ("layers.0.self_attn.q_proj.M", True),
        ("layers.0.self_attn.q_proj.weight", False),
        ("layers.0.self_attn.q_proj.linear.weight", False),
        ("layers.0.mlp.weight", False),
        ("lora.embed_tokens.weight", False),
        ("norm.m.weight", False),
    ],
)
def test_an_adapter_parameter_is_known_by_its_name_in_any_case(name: str, expected: bool) -> None:
    assert is_adapter_parameter(name) is expected


LORA: dict[str, tuple[dict[str, Any], int]] = {
    "rank 1": ({"lora_parameters": {"rank": 1}}, 42),
    "rank 16, scale 0.5": ({"lora_parameters": {"rank": 16, "scale": 0.5}}, 42),
    "last layer": ({"num_layers": 1, "nested": {"frequencies": [1]}}, 14),
    "last 2 layers": ({"num_layers": 2}, 28),
    "0 layers are all": ({"num_layers": 0}, 84),
    "keys": ({"lora_parameters": {"keys": ["self_attn.q_proj", "mlp.up_proj"]}}, 12),
    "dropout": ({"lora_parameters": {"dropout": 0.2}}, 42),
    "dora": ({"fine_tune_type": "dora", "lora_parameters": {"scale": 1.0}}, 63),
}


@pytest.mark.slow("trains and judges")
@pytest.mark.parametrize(
    "case", slow_except(LORA, "last layer", "keys", reason="trains and judges a run")
)
def test_each_lora_configuration_trains_and_passes_the_gate(tmp_path: Path, case: str) -> None:
    changes, tensors = LORA[case]
    settings = {"iters": 4, "val_batches": 2, "nested": {"frequencies": [1, 2]}} | changes
    done = train_example(tmp_path / "run", **settings)
    verdict = steps.judge(done.config, done.run)
    assert len(verdict.tensors) == tensors
    assert all(tensor.changed for tensor in verdict.tensors)
    rank = done.config.lora_parameters.rank
    for name, tensor in read_adapter(done.run.adapter).tensors.items():
        assert tensor.dtype == "F32"
        assert name.endswith(".m") or rank in tensor.shape


@pytest.mark.parametrize("fine_tune_type", ["lora", "dora"])
def test_adapter_tensors_are_float32_where_the_base_computes_in_bfloat16(fine_tune_type) -> None:
    config = example_config(fine_tune_type=fine_tune_type, training={"precision": "bfloat16"})
    model, _ = load_base_model(config)
    leaves = attach_adapter(model, config)
    assert {leaf.dtype for leaf in leaves.values()} == {mx.float32}
    frozen = {leaf.dtype for name, leaf in flatten(model).items() if name not in leaves}
    assert frozen == {mx.bfloat16}


def test_a_key_that_matches_nothing_beside_one_that_does_is_warned_of(tmp_path: Path) -> None:
    config = example_config(lora_parameters={"keys": ["self_attn.q_proj", "mlp.gate"]})
    with pytest.warns(
        UserWarning, match=r"No module is named mlp.gate; did you mean mlp.gate_proj\?"
    ):
        run = prepare(config, tmp_path / "run")
    assert len(read_adapter(run.initial).tensors) == 2 * LAYERS


def test_more_layers_than_the_model_has_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_layers: 7 layers .* but the model has 6"):
        prepare(example_config(num_layers=7), tmp_path / "run")


def test_a_run_starts_from_an_existing_adapter_byte_for_byte(every_step, tmp_path) -> None:
    existing = every_step.run.adapter / "adapters.safetensors"
    config = example_config(resume_adapter_file=str(existing))
    run = prepare(config, tmp_path / "run")
    given, initial = read_adapter(every_step.run.adapter), read_adapter(run.initial)
    assert initial.tensors == given.tensors


def _damaged(every_step: Finished, path: Path) -> Path:
    tensors = read_adapter(every_step.run.adapter).tensors
    arrays = {name: tensor.to_numpy() for name, tensor in tensors.items()}
    names = sorted(arrays)
    arrays["model.layers.3.stray.lora_a"] = arrays.pop(names[0])
    arrays[names[1]] = arrays[names[1]].T.copy()
    save_file(arrays, path)
    return path


def test_an_adapter_that_does_not_fit_is_refused_with_every_problem_at_once(
    every_step: Finished, tmp_path: Path
) -> None:
    file = _damaged(every_step, tmp_path / "adapters.safetensors")
    with pytest.raises(ConfigError) as caught:
        prepare(example_config(resume_adapter_file=str(file)), tmp_path / "run")
    message = str(caught.value)
    assert "model.layers.3.mlp.down_proj.lora_a: missing" in message
    assert "model.layers.3.mlp.down_proj.lora_b: shape (64, 8), expected (8, 64)" in message
    assert "model.layers.3.stray.lora_a: nothing that these settings train" in message
    assert not (tmp_path / "run" / "initial").exists()


def test_an_adapter_of_another_rank_is_refused_with_both_shapes(every_step, tmp_path) -> None:
    existing = every_step.run.adapter / "adapters.safetensors"
    config = example_config(resume_adapter_file=str(existing), lora_parameters={"rank": 4})
    with pytest.raises(ConfigError, match=r"shape \(192, 8\), expected \(192, 4\)") as caught:
        prepare(config, tmp_path / "run")
    assert str(caught.value).splitlines()[-2:] == [
        "  and 36 more",
        "Keep the settings and the base that it was made with, or train a new adapter.",
    ]


def write_not_finite(path: Path, adapter: Path) -> None:
    tensors = read_adapter(adapter).tensors
    arrays = {name: tensor.to_numpy().copy() for name, tensor in tensors.items()}
    arrays[sorted(arrays)[3]][0, 0] = float("nan")
    save_file(arrays, path)


def write_cut_short(path: Path, adapter: Path) -> None:
    path.write_bytes((adapter / "adapters.safetensors").read_bytes()[:-7])


@pytest.mark.parametrize(
    ("write", "kind", "message"),
    [
        (write_not_finite, ConfigError, r"1 of the tensors of .* hold NaN or infinity, model\."),
        (write_cut_short, DamagedError, r"file\.safetensors is not a sound .*take it again"),
        (lambda *_: None, ConfigError, r"resume_adapter_file: .*file.safetensors does not exist"),
        (lambda path, _: path.mkdir(), ConfigError, "is a folder; give .*/adapters.safetensors"),
    ],
)
def test_no_run_starts_from_a_file_that_is_no_adapter(
    write, kind, message, every_step, tmp_path
) -> None:
    write(tmp_path / "file.safetensors", every_step.run.adapter)
    with pytest.raises(kind, match=message):
        prepare(
            example_config(resume_adapter_file=str(tmp_path / "file.safetensors")), tmp_path / "run"
        )


def copy_adapter(source: Path, place: Path, **changes: Any) -> str:
    """A copy with these values in adapter_config.json; the path of its tensors."""
    shutil.copytree(source, place)
    described = json.loads((place / "adapter_config.json").read_bytes())
    (place / "adapter_config.json").write_text(json.dumps(described | changes))
    return str(place / "adapters.safetensors")


@pytest.mark.parametrize(
    ("recorded", "settings", "named"),
    [
        (
            {"base_fingerprint": f"{FINGERPRINT_PREFIX}{'0a' * 32}"},
            {},
            "base_fingerprint: made for the base sha256:0a0a0a0a0a0a, and .* holds sha256:",
        ),
        ({}, {"lora_parameters": {"scale": 8.0}}, r"scale: 2\.0, now 8\.0"),
        ({}, {"lora_parameters": {"rank": 4}}, "rank: 8, now 4"),
        ({}, {"num_layers": 2}, "num_layers: 3, now 2"),
    ],
    ids=str,
)
def test_an_adapter_file_of_other_settings_is_refused_with_both_values(
    every_step: Finished, tmp_path: Path, recorded: Any, settings: Any, named: str
) -> None:
    file = copy_adapter(every_step.run.adapter, tmp_path / "adapter", **recorded)
    with pytest.raises(ConfigError, match=named):
        prepare(example_config(resume_adapter_file=file, **settings), tmp_path / "run")
    assert not (tmp_path / "run" / "initial").exists()


def test_an_adapter_of_another_model_is_refused_in_at_most_14_lines(
    every_step: Finished, tmp_path: Path
) -> None:
    recorded = {"base_fingerprint": f"{FINGERPRINT_PREFIX}{'0a' * 32}", "num_layers": 9}
    file = copy_adapter(every_step.run.adapter, tmp_path / "adapter", **recorded)
    other = {"lora_parameters": {"rank": 4, "scale": 8.0}}
    with pytest.raises(ConfigError) as error:
        prepare(example_config(resume_adapter_file=file, **other), tmp_path / "run")
    message = str(error.value).replace(str(tmp_path), "")
    assert sum(len(textwrap.wrap(line, 80)) for line in message.splitlines()) <= 14
    assert "rank: 8, now 4" in message


def test_an_adapter_file_whose_layers_are_named_otherwise_is_the_same_adapter(
    every_step: Finished, tmp_path: Path
) -> None:
    file = copy_adapter(every_step.run.adapter, tmp_path / "adapter", num_layers=16)
    run = prepare(example_config(resume_adapter_file=file), tmp_path / "run")
    assert read_adapter(run.initial).tensors == read_adapter(every_step.run.adapter).tensors


def test_what_a_file_without_a_configuration_leaves_unknown_is_said(every_step, tmp_path) -> None:
    file = shutil.copy(every_step.run.adapter / "adapters.safetensors", tmp_path)
    with pytest.warns(UserWarning, match="scale and the base .* not known. .* scale 2 on"):
        prepare(example_config(resume_adapter_file=str(file)), tmp_path / "run")


def test_a_file_in_place_of_adapter_path_is_refused_before_anything_is_done(tmp_path: Path) -> None:
    (tmp_path / "adapters").touch()
    config = example_config(adapter_path=str(tmp_path / "adapters"))
    with pytest.raises(ConfigError, match="adapters is a file. Give a folder"):
        check_before_start(config, RunDirectory(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
