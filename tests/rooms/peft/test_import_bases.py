"""Bases of other kinds: quantised, and with an output layer of its own."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.convert import convert
from mlx_lm.tuner.utils import load_adapters
from mlx_lm.utils import load_model

from nested_core.rooms.peft import export_peft, import_peft
from nested_core.storage.adapter import read_adapter
from nested_core.storage.safetensors_files import load_arrays
from tests.builders.adapter_folders import base_copy
from tests.example import MODEL
from tests.rooms.peft.adapters import PREFIX, Arrays, peft_copy, same_bytes
from tests.rooms.peft.make_golden import GOLDEN, TOKENS


@pytest.fixture
def untied(tmp_path: Path) -> Path:
    """The example model with an output layer of its own, a copy of the embedding."""

    def add_head(weights: Arrays) -> None:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]

    return base_copy(tmp_path / "untied", add_head, tie_word_embeddings=False)


def logits(model: Path, adapter: Path | None = None) -> np.ndarray:
    network, _ = load_model(model)
    if adapter is not None:
        load_adapters(network, str(adapter))
    network.eval()
    return np.array(network(mx.array([TOKENS]))[0].astype(mx.float32))


def test_a_quantised_base_takes_the_same_tensors(tmp_path: Path) -> None:
    quantised = tmp_path / "q"
    convert(str(MODEL), str(quantised), quantize=True, q_group_size=64, q_bits=4)
    for name, base in (("on-quantised", quantised), ("on-plain", MODEL)):
        import_peft(GOLDEN / "lora", tmp_path / name, str(base))
    found, expected = read_adapter(tmp_path / "on-quantised"), read_adapter(tmp_path / "on-plain")
    assert found.tensors == expected.tensors
    assert found.config["lora_parameters"] == expected.config["lora_parameters"]
    assert found.config["base_fingerprint"] != expected.config["base_fingerprint"]
    assert np.abs(logits(quantised, tmp_path / "on-quantised") - logits(quantised)).max() > 3


def test_an_output_layer_of_its_own_goes_in_and_out(untied: Path, tmp_path: Path) -> None:
    def add_head(tensors: Arrays) -> None:
        tensors[f"{PREFIX}lm_head.lora_A.weight"] = 0.1 * mx.random.normal((4, 64))
        tensors[f"{PREFIX}lm_head.lora_B.weight"] = 0.1 * mx.random.normal((1588, 4))

    targets = ["q_proj", "v_proj", "lm_head"]
    peft = peft_copy(tmp_path / "peft", change=add_head, target_modules=targets)
    done = import_peft(peft, tmp_path / "mlx", str(untied))
    keys = done.config["lora_parameters"]["keys"]
    assert (len(keys), keys[0]) == (13, "lm_head")
    without = peft_copy(tmp_path / "without")
    import_peft(without, tmp_path / "mlx-without", str(untied))
    change = logits(untied, tmp_path / "mlx") - logits(untied, tmp_path / "mlx-without")
    assert np.abs(change).max() > 0.1
    back = export_peft(tmp_path / "mlx", tmp_path / "back")
    assert back.config["target_modules"] == keys
    name = "adapter_model.safetensors"
    assert same_bytes(load_arrays(tmp_path / "back" / name), load_arrays(peft / name))
