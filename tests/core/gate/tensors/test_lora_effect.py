"""The effect of a module, scale * A B, against its dense product; DoRA, experts, narrow dtypes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_core.gate.judge import verify_adapters
from nested_core.gate.tensors.lora_effect import product_difference
from tests.core.gate.pairs import (
    A2,
    B2,
    CONFIG,
    MODULES,
    A,
    B,
    Tensors,
    codes,
    fresh_tensors,
    judge_pair,
    learned,
    trained_tensors,
)

EXPERTS = "model.layers.0.mlp.switch_mlp.up_proj"


@st.composite
def factors(draw: st.DrawFn) -> tuple[np.ndarray, ...]:
    """New and old factors (experts, in, rank) and (experts, rank, out) over many magnitudes."""
    experts, rows, columns = (draw(st.integers(1, n)) for n in (3, 20, 20))
    rank, old_rank = draw(st.integers(1, 8)), draw(st.integers(1, 8))
    values = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    nearness = draw(st.sampled_from([0.0, 1e-6, 1e-3, 1.0]))
    magnitude = draw(st.sampled_from([1e-8, 1.0, 1e6]))
    old_a = magnitude * values.normal(size=(experts, rows, old_rank))
    old_b = values.normal(size=(experts, old_rank, columns))
    if rank == old_rank:
        new_a = old_a + nearness * magnitude * values.normal(size=old_a.shape)
        return new_a, old_b + nearness * values.normal(size=old_b.shape), old_a, old_b
    new_a = magnitude * values.normal(size=(experts, rows, rank))
    return new_a, values.normal(size=(experts, rank, columns)), old_a, old_b


@given(factors())
@settings(max_examples=200)
def test_the_difference_of_products_is_the_dense_one(parts: tuple[np.ndarray, ...]) -> None:
    new_a, new_b, old_a, old_b = parts
    expected = float(np.linalg.norm(new_a @ new_b - old_a @ old_b))
    size = np.linalg.norm(new_a) * np.linalg.norm(new_b) + np.linalg.norm(old_a) * np.linalg.norm(
        old_b
    )
    assert abs(product_difference(*parts) - expected) <= 1e-13 * size


def test_a_change_far_below_the_products_own_size_is_measured() -> None:
    values = np.random.default_rng(1)
    a, b = values.normal(size=(1, 4096, 8)), values.normal(size=(1, 8, 4096))
    moved = b.copy()
    moved[0, 3, 7] += 1e-6
    expected = 1e-6 * np.linalg.norm(a[0, :, 3])
    assert product_difference(a, moved, a, b) == pytest.approx(expected, rel=1e-5)


def only_lora_a(t: Tensors) -> None:
    for name in (A, A2):
        t[name] = t[name] * np.float32(1.5)


def only_lora_b(t: Tensors) -> None:
    for name in (B, B2):
        t[name] = t[name] + np.float32(1e-3)


def zeros_turned_negative(t: Tensors) -> None:
    for name in (B, B2):
        t[name] = -t[name]


def smallest_numbers(t: Tensors) -> None:
    for name in (B, B2):
        t[name] = t[name] + np.float32(1e-30)


def dora(magnitude: float = 1.0) -> Tensors:
    tensors = trained_tensors()
    for module in MODULES:
        tensors[f"{module}.m"] = np.full(16, magnitude, np.float32)
    return tensors


def rounded_up(tensors: Tensors) -> Tensors:
    for module in MODULES:
        tensors[f"{module}.m"] = np.nextafter(tensors[f"{module}.m"], np.float32(np.inf))
    return tensors


def rescaled(tensors: Tensors) -> Tensors:
    for a, b in ((A, B), (A2, B2)):
        tensors[a], tensors[b] = tensors[a] * 2, tensors[b] / 2
    return tensors


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        (dora(1.5), []),
        (rescaled(dora(1.5)), []),
        (rescaled(dora(1.0)), ["no_effect"]),
        (dora(1.0 + 1e-6), []),
        (rounded_up(dora(1.0)), ["no_effect"]),
        (dora(1.0), ["unchanged"]),
        (dora(float("nan")), ["non_finite"]),
    ],
    ids=[
        "magnitude",
        "magnitude and rescaled",
        "rescaled alone",
        "a little",
        "rounding",
        "nothing",
        "NaN magnitude",
    ],
)
def test_a_dora_magnitude_that_moved_is_an_effect(tmp_path, after, expected) -> None:
    configs = (CONFIG | {"fine_tune_type": "dora"},) * 2
    assert codes(judge_pair(tmp_path, dora(), after, configs)) == expected


def experts() -> Tensors:
    """A switch layer as mlx-lm stores it: (experts, rank, in) and (experts, out, rank)."""
    values = np.random.default_rng(3)
    shapes = {"lora_a": (3, 4, 10), "lora_b": (3, 14, 4)}
    return {f"{EXPERTS}.{k}": values.normal(size=s).astype("f4") for k, s in shapes.items()}


def all_rescaled(t: Tensors) -> None:
    a, b = f"{EXPERTS}.lora_a", f"{EXPERTS}.lora_b"
    t[a], t[b] = t[a] * np.float32(5), t[b] / np.float32(5)


def ranks_permuted(t: Tensors) -> None:
    order = [3, 1, 0, 2]
    t[f"{EXPERTS}.lora_a"] = t[f"{EXPERTS}.lora_a"][:, order]
    t[f"{EXPERTS}.lora_b"] = t[f"{EXPERTS}.lora_b"][:, :, order]


def experts_swapped(t: Tensors) -> None:
    for name in t:
        t[name] = t[name][[1, 0, 2]]


def one_expert_learned(t: Tensors) -> None:
    t[f"{EXPERTS}.lora_b"][2] += np.float32(0.01)


@pytest.mark.parametrize(
    ("make", "change", "expected"),
    [
        (fresh_tensors, only_lora_a, ["no_effect"]),
        (fresh_tensors, zeros_turned_negative, ["no_effect"]),
        (fresh_tensors, only_lora_b, []),
        (fresh_tensors, smallest_numbers, []),
        (experts, all_rescaled, ["no_effect"]),
        (experts, ranks_permuted, ["no_effect"]),
        (experts, experts_swapped, []),
        (experts, one_expert_learned, []),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_change_of_factors_is_judged_by_their_products(tmp_path, make, change, expected) -> None:
    """From lora_b of zero; those of experts, expert by expert."""
    after = make()
    change(after)
    assert codes(judge_pair(tmp_path, make(), after)) == expected


def write_mlx(folder: Path, tensors: Mapping[str, Any], dtype: Any) -> Path:
    folder.mkdir()
    arrays = {name: mx.array(value).astype(dtype) for name, value in tensors.items()}
    mx.save_safetensors(str(folder / "adapters.safetensors"), arrays)
    (folder / "adapter_config.json").write_text('{"model": "base", "lora_parameters": {}}')
    return folder


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("is_learned", [False, True])
def test_rounding_is_that_of_the_dtype(tmp_path: Path, dtype: Any, is_learned: bool) -> None:
    after = trained_tensors()
    if is_learned:
        for _ in range(20):
            learned(after)
    else:
        for a, b in ((A, B), (A2, B2)):
            after[a], after[b] = after[a] * np.float32(3), after[b] / np.float32(3)
    initial = write_mlx(tmp_path / "initial", trained_tensors(), dtype)
    verdict = verify_adapters(initial, write_mlx(tmp_path / "trained", after, dtype))
    assert codes(verdict) == ([] if is_learned else ["no_effect"])
    assert all(tensor.changed for tensor in verdict.tensors)


def test_a_bfloat16_adapter_against_itself_is_unchanged(tmp_path: Path) -> None:
    one, other = (write_mlx(tmp_path / side, trained_tensors(), mx.bfloat16) for side in "ab")
    assert codes(verify_adapters(one, other)) == ["unchanged"]


@pytest.mark.parametrize("size", [1e-5, 1e-3])
def test_a_small_but_real_float32_change_is_seen(tmp_path: Path, size: float) -> None:
    after = trained_tensors()
    values = np.random.default_rng(4)
    for name, value in after.items():
        after[name] = value * (1 + size * values.normal(size=value.shape)).astype("f4")
    assert codes(judge_pair(tmp_path, trained_tensors(), after)) == []


def factor_pair(rng: np.random.Generator, rank: int, dtype: Any) -> tuple[mx.array, mx.array]:
    a = rng.normal(size=(64, rank)) / 8
    b = rng.normal(size=(rank, 96)) * 0.02
    if rng.integers(2):  # of low effective rank, as training makes them: rounding errors agree
        a, b = np.repeat(a[:, :1], rank, axis=1), np.repeat(b[:1], rank, axis=0)
    return mx.array(a).astype(dtype), mx.array(b).astype(dtype)


def rescaled_and_permuted(
    a: mx.array, b: mx.array, rng: np.random.Generator
) -> tuple[mx.array, mx.array]:
    order = mx.array(rng.permutation(a.shape[1]))
    factor = mx.array(rng.choice([-1.0, 1.0]) * np.exp(rng.normal())).astype(a.dtype)
    return (a * factor)[:, order], (b * (1 / factor))[order]


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16, mx.float32], ids=str)
@pytest.mark.parametrize("rank", [1, 8, 64, 256])
def test_a_product_moved_by_three_percent_is_told_from_one_that_was_written_otherwise(
    tmp_path: Path, rank: int, dtype: Any
) -> None:
    rng = np.random.default_rng(rank)
    for draw in range(3):
        a, b = factor_pair(rng, rank, dtype)
        moved = (b.astype(mx.float32) * 1.03).astype(dtype)
        written = [(a, b), rescaled_and_permuted(a, b, rng), (a, moved)]
        same, otherwise, changed = (
            write_mlx(tmp_path / f"{draw}-{number}", {A: a, B: b}, dtype)
            for number, (a, b) in enumerate(written)
        )
        assert codes(verify_adapters(same, otherwise)) == ["no_effect"]
        assert codes(verify_adapters(same, changed)) == []
