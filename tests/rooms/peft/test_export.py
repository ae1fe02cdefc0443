"""export-peft: what it writes, from where, and what it refuses."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from safetensors import safe_open

from nested_core.errors import ConfigError, DamagedError, NestedTuneError
from nested_core.rooms.peft import export_peft, import_peft
from nested_core.storage.adapter import write_adapter
from nested_core.storage.manifest import write_manifest
from nested_core.storage.safetensors_files import load_arrays, save_arrays
from tests.builders.adapter_folders import random_adapter
from tests.example import MODEL

Q5 = "model.layers.5.self_attn.q_proj"


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "adapter_config.json").read_bytes())
    return found


def refused(adapter: Path, kind: type[NestedTuneError]) -> str:
    out = adapter.parent / "out"
    with pytest.raises(kind) as error:
        export_peft(adapter, out)
    assert not out.exists()
    assert not list(adapter.parent.glob(".tmp-*"))
    return str(error.value)


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("/proc/out", "nothing can be written in /proc"),
        ("{folder}/adapter/adapter_config.json/out", r"\(Not a directory\)"),
        ("{folder}/{long}", "File name too long"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_read(
    tmp_path: Path, place: str, problem: str
) -> None:
    adapter = random_adapter(tmp_path / "adapter")
    out = Path(place.format(folder=tmp_path, long="a" * 300))
    for convert in (export_peft, partial(import_peft, model=str(MODEL))):
        with pytest.raises(ConfigError, match=problem) as error:
            convert(adapter, out)
        assert "give another --out" in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_names_matrices_and_configuration(tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter", rank=4, scale=2.5)
    done = export_peft(adapter, tmp_path / "out")
    ours = load_arrays(adapter / "adapters.safetensors")
    theirs = load_arrays(tmp_path / "out" / "adapter_model.safetensors")
    assert len(ours) == len(theirs) == done.tensors == 8
    for name in ("model.layers.4.mlp.up_proj", Q5):
        for leaf, other in (("lora_a", "lora_A"), ("lora_b", "lora_B")):
            found = theirs[f"base_model.model.{name}.{other}.weight"]
            assert mx.array_equal(found, ours[f"{name}.{leaf}"].T)
    assert config_of(tmp_path / "out") == done.config
    assert done.config["base_model_name_or_path"] == str(MODEL)
    expected = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 10}
    modules = ("mlp.up_proj", "self_attn.q_proj")
    expected |= {"target_modules": [f"model.layers.{n}.{own}" for n in (4, 5) for own in modules]}
    assert expected.items() <= done.config.items()
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "numpy") as file:
        assert file.metadata() == {"format": "pt"}


def test_another_name_for_the_base_which_is_not_here_to_be_compared(tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter")
    assert export_peft(adapter, tmp_path / "compared").notes == ()
    done = export_peft(adapter, tmp_path / "out", "org/base")
    assert done.config["base_model_name_or_path"] == "org/base"
    (note,) = done.notes
    assert note.startswith("org/base is not on this machine: whether PEFT finds the adapter's")


def test_modules_that_the_base_has_under_other_names_are_refused(tmp_path: Path) -> None:
    """As mlx-lm's model.h of GPT-2 is transformer.h in transformers."""
    base = tmp_path / "base"
    base.mkdir()
    weights = load_arrays(MODEL / "model.safetensors")
    renamed = {name.replace("model.layers", "transformer.h"): w for name, w in weights.items()}
    save_arrays(base / "model.safetensors", renamed)
    adapter = random_adapter(tmp_path / "adapter", model=str(base))
    text = refused(adapter, ConfigError)
    assert text.startswith("4 of 4 modules that the adapter changes are called otherwise in the")
    assert f"\n  {Q5}" in text


@pytest.mark.parametrize(
    ("config", "kind", "message"),
    [
        ({"fine_tune_type": "full"}, ConfigError, "fine_tune_type 'full'"),
        ({"fine_tune_type": "dora"}, ConfigError, "fine_tune_type 'dora'"),
        ({"model": None}, ConfigError, "names no model. Give --model"),
        (
            {"lora_parameters": None},
            DamagedError,
            "lora_a: rank 4, but adapter_config.json says None",
        ),
        (
            {"lora_parameters": {"rank": 8, "scale": 1.0}},
            DamagedError,
            "lora_b: rank 4, but adapter_config.json says 8",
        ),
        ({"lora_parameters": {"rank": 4}}, ConfigError, "has scale None; lora_alpha would be"),
    ],
)
def test_a_configuration_without_a_like_in_peft(config, kind, message, tmp_path) -> None:
    assert message in refused(random_adapter(tmp_path / "adapter", **config), kind)


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("model.embed_tokens", (9, 4)),
        ("transformer.wte", (9, 4)),
        ("model.layers.0.mlp.switch_mlp.up_proj", (2, 4, 9)),
    ],
)
def test_modules_without_a_like_in_peft(name, shape, tmp_path) -> None:
    parameters = {"rank": 4, "scale": 1.0, "dropout": 0.0}
    (tmp_path / "adapter").mkdir()
    tensors = {f"{name}.lora_a": mx.ones(shape), f"{name}.lora_b": mx.ones((4, 9))}
    write_adapter(tmp_path / "adapter", tensors, {"model": "m", "lora_parameters": parameters})
    text = refused(tmp_path / "adapter", ConfigError)
    assert f"{name}.lora_a: LoRA on an embedding or on expert layers" in text


def test_tensors_that_are_not_finite_are_damage(tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter")
    tensors = load_arrays(adapter / "adapters.safetensors")
    tensors[f"{Q5}.lora_b"] = mx.full((4, 64), mx.inf)
    write_adapter(adapter, tensors, config_of(adapter))
    text = refused(adapter, DamagedError)
    assert f"{Q5}.lora_b: holds values that are not finite" in text


def test_a_version_that_has_changed_since_it_was_registered_is_damage(tmp_path: Path) -> None:
    adapter = random_adapter(tmp_path / "adapter")
    write_manifest(adapter, {})
    content = (adapter / "adapters.safetensors").read_bytes()
    (adapter / "adapters.safetensors").write_bytes(content[:-1] + b"\x01")
    assert "adapters.safetensors has changed since it was written" in refused(adapter, DamagedError)
