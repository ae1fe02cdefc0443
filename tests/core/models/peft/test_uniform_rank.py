"""One rank and one scale for all modules: every product stays what it was, or it is refused."""

from __future__ import annotations

import numpy as np
import pytest

from nested_core.errors import ConfigError
from nested_core.models.peft.lora_factors import ModuleFactors, make_rank_and_scale_uniform
from nested_core.storage.safetensors_files import StoredTensor

STORED = {"F32": np.float32, "F16": np.float16}


def factors(rank: int, dtype: str = "F32", *, size: float = 1.0) -> ModuleFactors:
    values = np.random.default_rng(rank)

    def tensor(*shape: int) -> StoredTensor:
        drawn = (size * values.normal(size=shape)).astype(np.float32)
        if dtype == "BF16":
            return StoredTensor(
                dtype, shape, (drawn.view(np.uint32) >> 16).astype(np.uint16).tobytes()
            )
        return StoredTensor(dtype, shape, drawn.astype(STORED[dtype]).tobytes())

    return ModuleFactors(tensor(6, rank), tensor(rank, 5))


def product(one: ModuleFactors, scale: float) -> np.ndarray:
    a, b = (t.to_numpy().astype(np.float64) for t in (one.lora_a, one.lora_b))
    return scale * (a @ b)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_products_are_the_same_to_the_last_bit(dtype: str) -> None:
    modules = {"a": factors(4, dtype), "b": factors(2, dtype), "c": factors(4, dtype)}
    scales = {"a": 2.0, "b": 0.5, "c": 2.0}
    done = make_rank_and_scale_uniform(modules, scales)
    assert (done.rank, done.scale) == (4, 2.0)
    for name, before in modules.items():
        after = done.modules[name]
        assert (after.lora_a.shape, after.lora_b.shape) == ((6, 4), (4, 5))
        assert after.lora_a.dtype == after.lora_b.dtype == dtype
        assert np.array_equal(product(after, 2.0), product(before, scales[name]))
    assert done.modules["a"] is modules["a"]
    assert [note.split(":")[0] for note in done.notes] == [
        "1 of 3 modules have a rank below 4",
        "1 of 3 modules have another scale than 2",
    ]


def test_nothing_is_done_where_all_are_alike() -> None:
    modules = {"a": factors(3), "b": factors(3)}
    done = make_rank_and_scale_uniform(modules, {"a": 0.3, "b": 0.3})
    assert (done.modules, done.rank, done.scale, done.notes) == (modules, 3, 0.3, ())


@pytest.mark.parametrize(
    ("scale", "dtype", "size"),
    [(3.0, "F32", 1.0), (2.0**-40, "F16", 1.0), (2.0**20, "F16", 1.0), (2.0**-30, "F32", 1e-38)],
    ids=["no power of two", "underflow", "overflow", "subnormal"],
)
def test_a_scale_that_would_round_is_refused(scale: float, dtype: str, size: float) -> None:
    modules = {"a": factors(2), "b": factors(2), "odd": factors(2, dtype, size=size)}
    with pytest.raises(ConfigError) as error:
        make_rank_and_scale_uniform(modules, {"a": 1.0, "b": 1.0, "odd": scale})
    assert str(error.value).startswith(f"odd has the scale {scale:g} and most modules have 1 ")
    assert "cannot be put into lora_b without rounding" in str(error.value)
