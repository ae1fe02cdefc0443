"""Rotations from a table: mlx-lm's outputs and gradients, and which are left to mlx-lm."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models.rope_utils import Llama3RoPE, SuScaledRoPE, YarnRoPE

from nested_core import backend
from nested_core.rooms.cuda import rope
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import batch, build, kinds_of, outcome, require_near
from tests.arrays import is_near, normal
from tests.left_out import slow_except

WIDTH = 48
ROTATIONS: dict[str, Callable[[], Any]] = {
    "rope": lambda: nn.RoPE(WIDTH),
    "scaled rope": lambda: nn.RoPE(WIDTH, base=5e5, scale=0.25),
    "llama 3": lambda: Llama3RoPE(
        WIDTH, base=5e5, scaling_config={"factor": 8.0, "original_max_position_embeddings": 16}
    ),
    "su": lambda: SuScaledRoPE(
        WIDTH, original_max_position_embeddings=4096, long_factor=[1.5] * (WIDTH // 2)
    ),
    "yarn": lambda: YarnRoPE(WIDTH, scaling_factor=4.0, original_max_position_embeddings=32),
}


def forbidden(x: mx.array, table: mx.array, back: bool) -> mx.array:
    raise AssertionError("the kernel was asked")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(
    "dtype", slow_except([mx.bfloat16, mx.float16], mx.bfloat16, reason="compiles other kernels")
)
@pytest.mark.parametrize("name", ROTATIONS)
def test_a_rotation_from_its_table_gives_its_output_and_gradient(name, dtype, compiled) -> None:
    module = ROTATIONS[name]()
    x, g = normal(2, 4, 37, WIDTH, dtype=dtype), normal(2, 4, 37, WIDTH, dtype=dtype, seed=1)
    exact, slope = x.astype(mx.float32), g.astype(mx.float32)
    (expected,), (gradient,) = mx.vjp(lambda x: module(x), [exact], [slope])
    turned = rope.make_rotation_call(module, rope.rotate_in_mlx, {})

    def both(x: mx.array, g: mx.array) -> Any:
        outputs, gradients = mx.vjp(turned, [x], [g])
        return outputs + gradients

    found, back = (mx.compile(both) if compiled else both)(x, g)
    assert found.dtype == back.dtype == dtype
    rounding = 2**-8 if dtype == mx.bfloat16 else 2**-10
    assert is_near(found, expected, rounding)
    assert is_near(back, gradient, rounding)


@pytest.mark.parametrize("name", ROTATIONS)
def test_positions_dtypes_and_heads_that_the_kernel_does_not_take_go_to_the_module(name) -> None:
    module = ROTATIONS[name]()
    call = rope.make_rotation_call(module, forbidden, {})
    x = normal(1, 4, 5, WIDTH)
    for count in (1, 3, 4):
        with pytest.raises(AssertionError, match="was asked"):
            call(x[:, :count])
    assert mx.array_equal(call(x, offset=3), module(x, offset=3)).item()
    assert mx.array_equal(call(x, 3), module(x, 3)).item()
    others = [x.astype(mx.float32), x[0], normal(1, 4, 5, WIDTH + 16)]
    for other in others:
        assert mx.array_equal(call(other), module(other)).item()


def test_a_table_is_made_again_only_for_more_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    made, seen, table_of = [], [], rope.make_rotation_table

    def noting(turning: Any, length: int, width: int) -> mx.array:
        made.append(length)
        return table_of(turning, length, width)

    def turn(x: mx.array, table: mx.array, back: bool) -> mx.array:
        seen.append(table)
        return rope.rotate_in_mlx(x, table, back)

    monkeypatch.setattr(rope, "make_rotation_table", noting)
    call = rope.make_rotation_call(nn.RoPE(WIDTH), turn, {})
    for length in (5, 9, 5, 16):
        mx.eval(call(normal(1, 4, length, WIDTH)))
    assert made == [rope.PROBE_LENGTH, 16]
    assert [table.shape for table in seen] == [(n, WIDTH) for n in (5, 9, 5, 16)]
    assert {table.dtype for table in seen} == {mx.float32}


@pytest.mark.parametrize("name", ROTATIONS)
def test_mlx_lms_rotations_pair_elements_half_a_head_apart(name: str) -> None:
    assert rope.rotates_halves(ROTATIONS[name]()) is True


class PartialRoPE(nn.RoPE):
    """Rotates half of what it says."""

    def __call__(self, x: mx.array, offset: int = 0) -> mx.array:
        half = self.dims // 2
        return mx.concatenate([nn.RoPE(half)(x[..., :half]), x[..., half:]], axis=-1)


@pytest.mark.parametrize(
    "module",
    [
        nn.RoPE(WIDTH, traditional=True),
        Llama3RoPE(WIDTH, traditional=True, scaling_config={"factor": 8.0}),
        YarnRoPE(WIDTH, traditional=True),
        PartialRoPE(WIDTH),
        nn.RoPE(24),
        nn.RoPE(40),
        nn.SinusoidalPositionalEncoding(WIDTH),
        nn.Linear(WIDTH, WIDTH),
    ],
    ids=str,
)
def test_neighbours_parts_odd_widths_and_other_modules_are_no_such_rotation(module: Any) -> None:
    assert rope.rotates_halves(module) is False


def test_a_rotation_of_a_part_of_each_head_goes_to_the_module() -> None:
    module = nn.RoPE(16)
    x = normal(1, 4, 5, WIDTH)
    assert mx.array_equal(rope.make_rotation_call(module, forbidden, {})(x), module(x)).item()


def test_without_cuda_a_models_rotations_stay_what_they_are(monkeypatch) -> None:
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: False)
    model = build("llama")
    with rope.using_rope_tables(model):
        assert type(model.layers[0].self_attn.rope) is nn.RoPE


@pytest.mark.parametrize(
    "name", slow_except(["llama", "phi3", "gemma2"], "llama", reason="compiles another model")
)
def test_a_model_with_its_rotations_from_tables_gives_the_same_gradients(name, monkeypatch) -> None:
    asked = []

    def turn(x: mx.array, table: mx.array, back: bool) -> mx.array:
        asked.append(back)
        return rope.rotate_in_mlx(x, table, back)

    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    monkeypatch.setattr(rope.rotate_on_cuda, "agrees_with_reference", lambda: True)
    monkeypatch.setattr(rope.rotate_on_cuda, "launch", turn)
    model = build(name)
    model.set_dtype(mx.bfloat16)
    expected = outcome(model, SUPERVISED_LOSS, batch())
    kinds = kinds_of(model)
    with rope.using_rope_tables(model):
        assert type(model.layers[0].self_attn.rope) is not nn.RoPE
        found = outcome(model, SUPERVISED_LOSS, batch())
    assert {True, False} == set(asked)
    require_near(found, expected, loss=2e-3, gradients=0.08)
    assert kinds_of(model) == kinds


def test_rotations_that_turn_alike_share_a_table_of_the_longest_length_so_far() -> None:
    known: dict[bytes, rope.RotationTable] = {}
    alike = nn.RoPE(32), nn.RoPE(32)
    other = nn.RoPE(32, base=500.0)
    for module in (*alike, other):
        rope.make_rotation_call(module, rope.rotate_in_mlx, known)
    assert len(known) == 2
    angles = next(iter(known.values()))
    for length in (3, 40, 7):
        expected = rope.make_rotation_table(alike[0], length, 32)
        assert mx.array_equal(angles.cosines_and_sines(length), expected).item()
