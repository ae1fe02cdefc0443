"""What import-peft does not convert: each thing by its name, with the reason and the exit code."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core.errors import ConfigError, DamagedError, NestedTuneError
from nested_core.rooms.peft import import_peft
from nested_core.storage.adapter import read_adapter
from tests.example import MODEL
from tests.left_out import slow_except
from tests.rooms.peft.adapters import PREFIX, Arrays, peft_copy
from tests.rooms.peft.make_golden import GOLDEN

Q0 = f"{PREFIX}model.layers.0.self_attn.q_proj"
WEIGHTS = "adapter_model.safetensors"
UNKNOWN_SETTINGS: dict[str, Any] = {
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "fan_in_fan_out": True,
    "trainable_token_indices": [3],
    "layer_replication": [[0, 4]],
    "target_parameters": ["experts"],
    "alora_invocation_tokens": [1],
    "megatron_config": {"a": 1},
    "ensure_weight_tying": True,
    "use_qalora": True,
    "use_dora": True,
    "rank_pattern": {"q_proj": 2},
    "alpha_pattern": {"a": 16},
    "warp": 3,
}
CONFIG_CASES: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, "peft_type: 'IA3', expected 'LORA'"),
    ({"task_type": "SEQ_CLS"}, "task_type: 'SEQ_CLS', expected 'CAUSAL_LM'"),
    ({"init_lora_weights": "pissa_niter_4"}, "'pissa_niter_4' changes the base model"),
    ({"init_lora_weights": "olora"}, "init_lora_weights: 'olora' changes the base"),
    *(({key: value}, f"{key}: {value!r}, and plain") for key, value in UNKNOWN_SETTINGS.items()),
]


def refused(folder: Path, out: Path, kind: type[NestedTuneError], model: Path = MODEL) -> str:
    """The message that an import ends with; nothing is left where it would have been written."""
    before = sorted(out.parent.iterdir())
    with pytest.raises(kind) as error:
        import_peft(folder, out, str(model))
    assert sorted(out.parent.iterdir()) == before
    assert len(str(error.value).splitlines()) <= 14
    return str(error.value)


@pytest.mark.parametrize(("change", "message"), CONFIG_CASES)
def test_a_key_that_mlx_lm_cannot_carry_out(change, message, tmp_path) -> None:
    text = refused(peft_copy(tmp_path / "peft", **change), tmp_path / "out", ConfigError)
    assert "describes an adapter that mlx-lm cannot carry out" in text
    assert message in text


def test_all_such_keys_are_named_at_once(tmp_path: Path) -> None:
    folder = peft_copy(tmp_path / "peft", bias="all", lora_bias=True, warp=1)
    lines = refused(folder, tmp_path / "out", ConfigError).splitlines()
    assert [line.split(":")[0].strip() for line in lines[1:]] == ["bias", "lora_bias", "warp"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 0}, "r: Input should be greater than 0"),
        ({"r": "4"}, "r: Input should be a valid integer"),
        ({"lora_alpha": -1}, "lora_alpha: Input should be greater than 0"),
        ({"lora_alpha": None}, "lora_alpha: Input should be a valid number"),
        ({"use_rslora": "yes"}, "use_rslora: Input should be a valid boolean"),
        ({"target_modules": [1]}, "target_modules.list[str].0: Input should be a valid string"),
    ],
)
def test_a_malformed_value_is_damage(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    text = refused(peft_copy(tmp_path / "peft", **change), tmp_path / "out", DamagedError)
    assert f"adapter_config.json: {message}" in text


def add(name: str, *shape: int, dtype: mx.Dtype = mx.float32) -> Callable[[Arrays], object]:
    return lambda tensors: tensors.update({name: mx.ones(shape, dtype)})


def remove(name: str) -> Callable[[Arrays], object]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.lora_embedding_A",
        "model.layers.0.self_attn.q_proj.lora_B.bias",
        "lm_head.base_layer.weight",
        "lm_head.modules_to_save.weight",
    ],
)
def test_a_tensor_that_mlx_lm_has_no_place_for(name: str, tmp_path: Path) -> None:
    folder = peft_copy(tmp_path / "peft", change=add(f"{PREFIX}{name}", 9, 4))
    text = refused(folder, tmp_path / "out", ConfigError)
    assert "holds tensors that an mlx-lm adapter has no place for" in text
    assert f"\n  {PREFIX}{name}" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (remove(f"{Q0}.lora_B.weight"), "layers.0.self_attn.q_proj.lora_b: missing"),
        (add("strange", 2), "'strange': no tensor of a LoRA module"),
        (add(f"{Q0}.lora_A.default.weight", 4, 64), "no tensor of a LoRA module"),
        (add("model.layers.0.lora_A.weight", 4, 64), "no tensor of a LoRA module"),
        (add(f"{Q0}.lora_magnitude_vector", 64), "_magnitude_vector': no tensor of a LoRA module"),
        (
            add(f"{Q0}.lora_A.weight", 3, 64),
            "q_proj.lora_a: rank 3, but adapter_config.json says 4",
        ),
        (add(f"{Q0}.lora_A.weight", 4, 64, 1), "lora_a: a shape of 3 dimensions"),
        (add(f"{Q0}.lora_B.weight", 64, 0), "lora_b: a shape of 2 dimensions, (0, 64)"),
        (add(f"{Q0}.lora_A.weight", 4, 64, dtype=mx.uint32), "lora_a: dtype U32, expected"),
        (lambda t: t.update({f"{Q0}.lora_A.weight": mx.full((4, 64), mx.nan)}), "not finite"),
        (lambda t: t.clear(), "no tensor at all"),
    ],
)
def test_tensors_that_are_no_whole_adapter(change, message, tmp_path) -> None:
    folder = peft_copy(tmp_path / "peft", change=change)
    text = refused(folder, tmp_path / "out", DamagedError)
    assert "does not hold a whole adapter as its configuration describes it" in text
    assert message in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"r": 8}, "layers.0.self_attn.q_proj.lora_a: rank 4, but adapter_config.json says 8"),
        ({"target_modules": ["q_proj"]}, "v_proj: has tensors, which PEFT would ignore"),
        ({"target_modules": ["q_proj", "v_proj", "k_proj"]}, "k_proj: has no tensors"),
        ({"layers_to_transform": [1, 2]}, "layers.0.self_attn.q_proj: has tensors, which PEFT"),
        ({"exclude_modules": ["layers.3.self_attn.v_proj"]}, "layers.3.self_attn.v_proj: has"),
    ],
)
def test_tensors_and_configuration_that_disagree(change, message, tmp_path) -> None:
    text = refused(peft_copy(tmp_path / "peft", **change), tmp_path / "out", DamagedError)
    assert message in text


def test_a_name_from_a_file_does_not_steer_the_terminal(tmp_path: Path) -> None:
    folder = peft_copy(tmp_path / "peft", change=add("a\x1b[31m\n", 2), bias="\x1b[31m")
    assert "\x1b" not in refused(folder, tmp_path / "out", ConfigError)
    folder = peft_copy(tmp_path / "other", change=add("a\x1b[31m\n", 2))
    assert "\x1b" not in refused(folder, tmp_path / "out", DamagedError)


class TestFiles:
    @pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
    def test_a_pickle_is_not_opened(self, name: str, tmp_path: Path) -> None:
        folder = peft_copy(tmp_path / "peft")
        (folder / WEIGHTS).rename(folder / name)
        text = refused(folder, tmp_path / "out", DamagedError)
        assert f"{folder}/{name} is a pickle, and reading one can run code" in text

    @pytest.mark.parametrize("name", [WEIGHTS, "adapter_config.json"])
    def test_a_missing_file_is_named(self, name: str, tmp_path: Path) -> None:
        folder = peft_copy(tmp_path / "peft")
        (folder / name).unlink()
        assert f"{folder}/{name} is missing" in refused(folder, tmp_path / "out", DamagedError)

    @pytest.mark.parametrize("length", [0, 7, 100, 5000])
    def test_truncated_weights_are_damage(self, length: int, tmp_path: Path) -> None:
        folder = peft_copy(tmp_path / "peft")
        (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:length])
        text = refused(folder, tmp_path / "out", DamagedError)
        assert f"{folder}/{WEIGHTS} is not a sound safetensors file" in text

    def test_an_mlx_lm_adapter_is_not_taken_for_peft(self, tmp_path: Path) -> None:
        import_peft(GOLDEN / "lora", tmp_path / "mlx", str(MODEL))
        text = refused(tmp_path / "mlx", tmp_path / "out", ConfigError)
        assert "has no peft_type: it is not a PEFT adapter's configuration" in text

    def test_what_is_no_folder_is_a_mistake(self, tmp_path: Path) -> None:
        text = refused(tmp_path / "nowhere", tmp_path / "out", ConfigError)
        assert "is not a directory. Expected a local folder with adapter_model.safetensors" in text
        text = refused(tmp_path, tmp_path / "out", ConfigError)
        assert f"{tmp_path} holds no PEFT adapter. Expected a local folder with" in text


class TestOut:
    def test_a_folder_with_anything_in_it_is_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        text = refused(GOLDEN / "lora", tmp_path / "out", ConfigError)
        assert "exists already. Nothing is written over" in text
        assert [path.name for path in (tmp_path / "out").iterdir()] == ["notes.txt"]

    def test_a_link_and_a_file_are_left_alone(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("mine")
        (tmp_path / "link").symlink_to(tmp_path / "gone")
        for name in ("file", "link"):
            text = refused(GOLDEN / "lora", tmp_path / name, ConfigError)
            assert "exists already" in text

    def test_an_empty_folder_is_filled_and_a_missing_parent_made(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        for out in (tmp_path / "empty", tmp_path / "a" / "b"):
            import_peft(GOLDEN / "lora", out, str(MODEL))
            names = {path.name for path in out.iterdir()}
            assert names == {"adapter_config.json", "adapters.safetensors"}


class TestBase:
    def test_modules_that_the_base_does_not_have(self, tmp_path: Path) -> None:
        def rename(tensors: Arrays) -> None:
            for name in list(tensors):
                tensors[name.replace("model.layers", "transformer.h")] = tensors.pop(name)

        folder = peft_copy(tmp_path / "peft", change=rename)
        text = refused(folder, tmp_path / "out", ConfigError)
        assert "12 of 12 modules that the adapter changes are no linear modules of" in text
        assert "transformer.h.0.self_attn.q_proj" in text

    def test_an_output_layer_that_is_tied_to_the_embedding(self, tmp_path: Path) -> None:
        def add_head(tensors: Arrays) -> None:
            tensors[f"{PREFIX}lm_head.lora_A.weight"] = mx.ones((4, 64))
            tensors[f"{PREFIX}lm_head.lora_B.weight"] = mx.ones((1588, 4))

        targets = ["q_proj", "v_proj", "lm_head"]
        folder = peft_copy(tmp_path / "peft", change=add_head, target_modules=targets)
        text = refused(folder, tmp_path / "out", ConfigError)
        assert "1 of 13 modules" in text
        assert "  lm_head" in text

    def test_a_base_of_other_sizes(self, tmp_path: Path) -> None:
        def widen(tensors: Arrays) -> None:
            tensors[f"{Q0}.lora_A.weight"] = mx.ones((4, 80))

        folder = peft_copy(tmp_path / "peft", change=widen)
        text = refused(folder, tmp_path / "out", ConfigError)
        assert "q_proj.lora_a: shape (80, 4), expected (64, 4)" in text

    def test_a_base_that_is_not_there(self, tmp_path: Path) -> None:
        text = refused(GOLDEN / "lora", tmp_path / "out", ConfigError, tmp_path / "nowhere")
        assert f"is no local directory: {tmp_path / 'nowhere'} does not exist" in text


ODD: list[Any] = [None, True, -1, 0, 2.5, 10**400, "x", "", [], ["q_proj"], [[1]], {}, {"a": 1}]


@pytest.mark.parametrize(
    "odd",
    slow_except(ODD, {"a": 1}, reason="a folder for each of many keys"),
    ids=[f"{value!r:.12}" for value in ODD],
)
def test_no_value_of_any_key_makes_a_crash(odd: Any, tmp_path: Path) -> None:
    """Each key in turn gets a value that it may not have: an error of ours, or a conversion."""
    folder = peft_copy(tmp_path / "peft")
    path = folder / "adapter_config.json"
    config = json.loads(path.read_bytes())
    for key in config:
        path.write_text(json.dumps(config | {key: odd}))
        with suppress(ConfigError, DamagedError):
            import_peft(folder, tmp_path / "out", str(MODEL))
            shutil.rmtree(tmp_path / "out")


@pytest.mark.slow("imports a hundred damaged adapters")
@given(
    place=st.integers(0, 27_600), flips=st.binary(min_size=1, max_size=6), is_config=st.booleans()
)
def test_any_damage_is_refused_or_still_an_adapter(
    tmp_path_factory: pytest.TempPathFactory, place: int, flips: bytes, is_config: bool
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    peft = peft_copy(folder / "peft")
    path = peft / ("adapter_config.json" if is_config else WEIGHTS)
    content = bytearray(path.read_bytes())
    start = place % len(content)
    content[start : start + len(flips)] = flips
    path.write_bytes(content)
    with suppress(ConfigError, DamagedError):
        import_peft(peft, folder / "out", str(MODEL))
        assert len(read_adapter(folder / "out").tensors) == 24
    shutil.rmtree(folder)
