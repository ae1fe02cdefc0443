"""Adapter directories: read strictly and whole; the digest is what the adapter means."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core import Adapter, ConfigError, DamagedError, read_adapter
from nested_core.storage.adapter import write_adapter
from nested_core.storage.safetensors_files import StoredTensor, load_arrays, read_tensors
from tests.core.hostile import DATA, ENTRY, SECOND, safetensors
from tests.core.limits import largest_file

CONFIG: dict[str, Any] = {
    "fine_tune_type": "lora",
    "num_layers": 2,
    "lora_parameters": {"rank": 4, "scale": 20.0, "dropout": 0.0, "keys": ["b", "a"]},
    "base_fingerprint": "0a" * 32,
}


def folder_of(folder: Path, weights: bytes, config: Any = None) -> Path:
    """An adapter directory with these two files."""
    folder.mkdir(exist_ok=True)
    (folder / "adapters.safetensors").write_bytes(weights)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG if config is None else config))
    return folder


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16, mx.uint32, mx.uint64])
    def test_every_dtype_comes_back_to_the_bit(self, dtype: mx.Dtype, tmp_path: Path) -> None:
        tensors = {"b": (100 * mx.random.uniform(shape=(3, 2))).astype(dtype), "a": mx.ones(())}
        write_adapter(tmp_path, tensors, CONFIG)
        found = load_arrays(tmp_path / "adapters.safetensors")
        assert [(name, a.dtype, a.shape) for name, a in sorted(found.items())] == [
            ("a", mx.float32, ()),
            ("b", dtype, (3, 2)),
        ]
        assert mx.array_equal(found["b"], tensors["b"])

    def test_others_may_read_what_is_written_as_any_other_file_here(self, tmp_path: Path) -> None:
        before = os.umask(0o027)
        try:
            write_adapter(tmp_path, {"a": mx.ones(2)}, CONFIG)
        finally:
            os.umask(before)
        modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
        assert modes == {"adapters.safetensors": 0o640, "adapter_config.json": 0o640}

    def test_a_write_that_fails_is_an_os_error_that_names_the_file(self, tmp_path: Path) -> None:
        with largest_file(1000), pytest.raises(OSError, match="File too large") as caught:
            write_adapter(tmp_path, {"a": mx.ones(1000)}, CONFIG)
        assert caught.value.errno == errno.EFBIG
        assert caught.value.filename == str(tmp_path / "adapters.safetensors")

    def test_equal_adapters_give_equal_files(self, tmp_path: Path) -> None:
        for name, order in (("one", 1), ("two", -1)):
            (tmp_path / name).mkdir()
            tensors = [("a", mx.ones(2)), ("b", mx.zeros(3))][::order]
            write_adapter(tmp_path / name, dict(tensors), dict([*CONFIG.items()][::order]))
        for name in ("adapters.safetensors", "adapter_config.json"):
            assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()

    def test_bfloat16_widens_to_float32_exactly(self) -> None:
        values = mx.array([1.0, -2.5, 1 / 3, 3e38, 0.0], mx.bfloat16)
        tensor = StoredTensor("BF16", (5,), np.array(values.view(mx.uint16)).tobytes())
        assert tensor.to_numpy().tolist() == values.astype(mx.float32).tolist()

    def test_tensors_without_elements_and_without_dimensions(self, tmp_path: Path) -> None:
        empty = {"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
        scalar = {"dtype": "F32", "shape": [], "data_offsets": [0, 4]}
        path = tmp_path / "x.safetensors"
        path.write_bytes(safetensors({"empty": empty, "scalar": scalar}, DATA[:4]))
        found = {name: tensor.to_numpy() for name, tensor in read_tensors(path).items()}
        assert (found["empty"].shape, found["scalar"].tolist()) == ((0, 3), 1.0)


class TestDigest:
    def digest(self, config: dict[str, Any] | None = None, **tensors: StoredTensor) -> str:
        both = {"a": StoredTensor("F32", (2,), DATA[:8]), "b": StoredTensor("F32", (2,), DATA[8:])}
        return Adapter(Path(), CONFIG if config is None else config, both | tensors).digest()

    def test_it_does_not_depend_on_the_order_of_bytes_in_the_file(self, tmp_path: Path) -> None:
        straight = safetensors({"a": ENTRY, "b": SECOND}, DATA)
        turned = safetensors(
            {"__metadata__": {"by": "another"}, "b": ENTRY, "a": SECOND}, DATA[8:] + DATA[:8]
        )
        assert straight != turned
        digests = {
            read_adapter(folder_of(tmp_path / str(i), weights)).digest()
            for i, weights in enumerate((straight, turned))
        }
        assert digests == {self.digest()}

    @pytest.mark.parametrize(
        "change",
        [
            {"fine_tune_type": "dora"},
            {"num_layers": 3},
            {"base_fingerprint": "0b" * 32},
            {"lora_parameters": CONFIG["lora_parameters"] | {"rank": 8}},
            {"lora_parameters": CONFIG["lora_parameters"] | {"scale": 10.0}},
            {"lora_parameters": CONFIG["lora_parameters"] | {"keys": ["a"]}},
        ],
    )
    def test_it_changes_with_what_the_tensors_mean(self, change: dict[str, Any]) -> None:
        assert self.digest(CONFIG | change) != self.digest()

    @pytest.mark.parametrize(
        "change",
        [
            {"data": "elsewhere", "iters": 3, "model": "another/path"},
            {"lora_parameters": CONFIG["lora_parameters"] | {"dropout": 0.1}},
            {"lora_parameters": CONFIG["lora_parameters"] | {"keys": ["a", "b"]}},
        ],
    )
    def test_it_does_not_change_with_what_they_do_not(self, change: dict[str, Any]) -> None:
        assert self.digest(CONFIG | change) == self.digest()

    def test_it_changes_with_every_name_dtype_shape_and_byte(self) -> None:
        changed = [
            self.digest(c=StoredTensor("F32", (2,), DATA[8:])),
            self.digest(b=StoredTensor("U32", (2,), DATA[8:])),
            self.digest(b=StoredTensor("F32", (2, 1), DATA[8:])),
            self.digest(b=StoredTensor("F32", (2,), DATA[:8])),
        ]
        assert len({self.digest(), *changed}) == 5


class TestDamage:
    def test_every_truncation_is_refused(self, tmp_path: Path) -> None:
        sound = safetensors({"a": ENTRY, "b": SECOND}, DATA)
        path = tmp_path / "adapters.safetensors"
        for length in range(len(sound)):
            path.write_bytes(sound[:length])
            with pytest.raises(DamagedError, match="is not a sound safetensors file"):
                read_tensors(path)

    @given(
        place=st.integers(0, 150), replacement=st.binary(min_size=1, max_size=9), cut=st.booleans()
    )
    def test_any_damage_is_either_refused_or_still_whole_tensors(
        self, tmp_path_factory: pytest.TempPathFactory, place: int, replacement: bytes, cut: bool
    ) -> None:
        sound = safetensors({"a": ENTRY, "b": SECOND}, DATA)
        after = b"" if cut else sound[place + len(replacement) :]
        path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
        path.write_bytes(sound[:place] + replacement + after)
        with suppress(DamagedError):
            for tensor in read_tensors(path).values():
                assert tensor.to_numpy().shape == tensor.shape

    def test_a_dtype_that_no_adapter_has_is_refused_when_it_is_used(self) -> None:
        with pytest.raises(DamagedError, match="A tensor has dtype I8, which is not read here"):
            StoredTensor("I8", (8,), DATA[:8]).to_numpy()

    def test_what_is_no_directory_is_a_mistake_and_no_damage(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="is not a directory. Expected an adapter directory"):
            read_adapter(tmp_path / "missing")
