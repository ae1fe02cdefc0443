"""The base is loaded once in a run, and only while each frozen bit is the one that was loaded."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest

from nested_core.models import session
from nested_core.models.parameters import trainable_parameters
from nested_core.models.session import Session, checksum_frozen_tensors, load_base_with_adapter
from tests.example import example_config


@pytest.fixture
def config(tmp_path: Path) -> Any:
    return example_config()


def flip_bit(array: mx.array, index: int | list[int], bit: int) -> mx.array:
    unsigned = {1: mx.uint8, 2: mx.uint16, 4: mx.uint32}[array.dtype.size]
    words = array.reshape(-1).view(unsigned)
    mask = mx.zeros_like(words)
    mask[mx.array(index)] = 1 << bit
    return (words ^ mask).view(array.dtype).reshape(array.shape)


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint8, mx.uint32])
@pytest.mark.parametrize("shape", [(7,), (3, 5), (64, 64)])
def test_any_bit_of_a_tensor_changes_its_checksum(dtype: mx.Dtype, shape: tuple[int, ...]) -> None:
    model = nn.Module()
    model.weight = (mx.random.uniform(shape=shape) * 100).astype(dtype)
    model.freeze()
    before = checksum_frozen_tensors(model)
    original = model.weight
    for index in (0, original.size // 2, original.size - 1):
        for bit in range(8 * dtype.size):
            model.weight = flip_bit(original, index, bit)
            assert checksum_frozen_tensors(model)["weight"] != before["weight"]
    model.weight = original[::-1]
    assert checksum_frozen_tensors(model) != before


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.uint8, mx.uint32])
@pytest.mark.parametrize(
    "places", [(3, 60), (1, 99), (0, 1), (4, 5, 6, 7), range(64 * 64)], ids=str
)
@pytest.mark.parametrize("from_top", [0, 1, 15])
def test_an_even_number_of_flipped_bits_changes_the_checksum(dtype, places, from_top) -> None:
    model = nn.Module()
    model.weight = (mx.random.uniform(shape=(64, 64)) * 100).astype(dtype)
    model.freeze()
    before = checksum_frozen_tensors(model)
    bit = (-1 - from_top) % (8 * dtype.size)
    model.weight = flip_bit(model.weight, list(places), bit)
    assert checksum_frozen_tensors(model) != before


def test_the_checksum_of_a_tensor_in_parts_depends_on_where_in_all_a_word_is(monkeypatch) -> None:
    model = nn.Module()
    model.weight = mx.arange(100, dtype=mx.uint32)
    model.freeze()
    whole = checksum_frozen_tensors(model)
    monkeypatch.setattr(session, "_MAX_WORDS_AT_ONCE", 16)
    assert checksum_frozen_tensors(model) == whole
    model.weight = mx.concatenate([model.weight[16:32], model.weight[:16], model.weight[32:]])
    assert checksum_frozen_tensors(model) != whole


def test_the_base_is_kept_and_comes_back_as_it_was_loaded(config: Any) -> None:
    with Session() as session:
        first = session.load_base(config)
        fresh = {name: mx.array(array) for name, array in first.parameters.items()}
        state: Any = mx.random.state
        key = state[0].tolist()
        first.model.train()
        mx.random.normal((3,))
        first.model.load_weights([(n, a + 1) for n, a in fresh.items()], strict=False)
        again = session.load_base(config)
        assert again.model is first.model
        found = trainable_parameters(again.model)
        assert all(mx.array_equal(found[name], array).item() for name, array in fresh.items())
        assert state[0].tolist() == key
        other = session.load_base(config.model_copy(update={"seed": 7}))
        assert other.model is not first.model
        assert session.base is other
        assert load_base_with_adapter(config).model is not other.model
    assert session.base is None


def test_one_bit_of_one_frozen_tensor_that_moved_is_caught(config: Any) -> None:
    with Session() as session:
        first = session.load_base(config)
        norm = first.model.model.norm
        norm["weight"] = flip_bit(norm["weight"], 3, 0)
        with pytest.warns(RuntimeWarning, match="is no longer what was loaded"):
            again = session.load_base(config)
        assert again.model is not first.model
        assert not mx.array_equal(again.model.model.norm["weight"], norm["weight"]).item()


def test_a_base_whose_files_changed_is_loaded_anew(config: Any, tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(config.model, folder)
    changed = config.model_copy(update={"model": str(folder)})
    with Session() as session:
        first = session.load_base(changed)
        text = (folder / "config.json").read_text()
        (folder / "config.json").write_text(text + "\n")
        assert session.load_base(changed).model is not first.model


def test_a_base_that_training_changes_is_never_kept(config: Any) -> None:
    full = config.model_copy(update={"fine_tune_type": "full"})
    with Session() as session:
        assert session.load_base(full).model is not session.load_base(full).model
        assert session.base is None
