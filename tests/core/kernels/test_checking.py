"""What becomes of a kernel that is wrong in a small way, and what is said of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest

from nested_core import backend
from nested_core.kernels import rms_norm, rope, swiglu
from nested_core.kernels.cuda import concatenate, lora_add, lora_matmuls, mlp, self_check, tiles

Spoil = Callable[[mx.array], mx.array]


@pytest.fixture
def narrower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of fewer columns: only a kernel needs so many, and MLX takes seconds for them."""
    example = lora_add.example
    for module in (lora_add, mlp):
        monkeypatch.setattr(module, "example", lambda rank, width: example(rank, min(width, 160)))


def of_low_rank(z: Spoil, first: Spoil, second: Spoil) -> str | None:
    def outer(pairs: lora_matmuls.Pairs) -> list[mx.array]:
        one, two = lora_matmuls.plain_outer(pairs)
        return [first(one), second(two)]

    return lora_matmuls.trouble_with(lambda pairs, s: z(lora_matmuls.plain_narrow(pairs, s)), outer)


def of_expand(first: Spoil, second: Spoil) -> str | None:
    def ours(sums: lora_add.Sums) -> list[mx.array]:
        one, two = lora_add.plain_expand(sums)
        return [first(one), second(two)]

    return lora_add.trouble_with(ours)


def of_mlp(output: Spoil, d_gate: Spoil, d_up: Spoil, again: Spoil) -> str | None:
    def backward(*sums: lora_add.LowRankSum) -> mlp.Three:
        one, two, three = mlp.plain_backward(*sums)
        return d_gate(one), d_up(two), again(three)

    return mlp.trouble_with(lambda gate, up: output(mlp.plain_forward(gate, up)), backward)


def of_swiglu(output: Spoil, d_gate: Spoil, d_x: Spoil) -> str | None:
    def backward(*arrays: mx.array) -> tuple[mx.array, mx.array]:
        one, two = swiglu.plain_backward(*arrays)
        return d_gate(one), d_x(two)

    return swiglu.trouble_with(lambda gate, x: output(swiglu.plain_swiglu(gate, x)), backward)


def of_rope(there: Spoil, back: Spoil) -> str | None:
    return rope.trouble_with(
        lambda x, table, is_back: (back if is_back else there)(rope.plain_turn(x, table, is_back))
    )


def of_norm(dx: Spoil) -> str | None:
    return rms_norm.trouble_with(lambda *given: dx(rms_norm.plain_backward(*given)))


def of_joining(vector: Spoil) -> str | None:
    return concatenate.trouble_with(lambda arrays: vector(concatenate.plain_join(arrays)))


CHECKS: dict[str, tuple[Callable[..., str | None], int]] = {
    "low_rank": (of_low_rank, 3),
    "expand": (of_expand, 2),
    "mlp": (of_mlp, 4),
    "swiglu": (of_swiglu, 3),
    "rope": (of_rope, 2),
    "norm": (of_norm, 1),
    "joining": (of_joining, 1),
}
OUTPUTS = [(name, place) for name, (_, count) in CHECKS.items() for place in range(count)]


def as_it_is(array: mx.array) -> mx.array:
    return array


def failing(array: mx.array) -> mx.array:
    raise RuntimeError("nvrtc: no such\n  compiler")


FAULTS: dict[str, tuple[Spoil, str]] = {
    "five per cent": (lambda a: 1.05 * a, "it differs by "),
    "its end left out": (lambda a: a.at[..., -8:].multiply(0), "it differs by "),
    "its beginning left out": (lambda a: a.at[..., :8].multiply(0), "it differs by "),
    "not a number": (lambda a: a.at[..., -1].multiply(float("nan")), "it differs by nan where"),
    "shortened": (lambda a: a[..., :-1], "it gives the shape ("),
    "failing": (failing, "it failed: nvrtc: no such compiler"),
}


@pytest.mark.usefixtures("narrower")
@pytest.mark.parametrize("name", CHECKS)
def test_the_check_accepts_mlxs_own_operations(name: str) -> None:
    check, count = CHECKS[name]
    assert check(*[as_it_is] * count) is None


@pytest.mark.usefixtures("narrower")
@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize(("name", "place"), OUTPUTS)
def test_the_check_finds_a_fault_in_each_output(name: str, place: int, fault: str) -> None:
    check, count = CHECKS[name]
    spoils: list[Spoil] = [as_it_is] * count
    spoils[place], says = FAULTS[fault]
    assert str(check(*spoils)).startswith(says)


@pytest.mark.usefixtures("narrower")
@pytest.mark.parametrize("name", ["low_rank", "expand", "mlp", "swiglu", "rope", "norm"])
def test_the_check_finds_a_result_that_is_transposed(name: str) -> None:
    check, count = CHECKS[name]
    assert "it gives the shape (" in str(check(lambda a: a.T, *[as_it_is] * (count - 1)))


def test_the_checks_find_an_argument_that_is_not_looked_at() -> None:
    def of_norms(x: mx.array, weight: mx.array, eps: float, g: mx.array) -> mx.array:
        return rms_norm.plain_backward(x, mx.ones_like(weight), eps, g)

    found = [
        lora_matmuls.trouble_with(
            lambda p, s: lora_matmuls.plain_narrow(p, 1.0), lora_matmuls.plain_outer
        ),
        rope.trouble_with(lambda x, table, back: rope.plain_turn(x, table, False)),
        rms_norm.trouble_with(of_norms),
        concatenate.trouble_with(lambda arrays: concatenate.plain_join(arrays[::-1])),
    ]
    assert ["it differs by" in str(each) for each in found] == [True] * 4


@pytest.mark.usefixtures("narrower")
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_checks_find_a_part_of_a_sum_that_is_not_looked_at(place: int, part: int) -> None:
    def without(sums: lora_add.Sums) -> list[lora_add.LowRankSum]:
        lost = sums[place]._replace(
            **{lora_add.LowRankSum._fields[part]: mx.zeros_like(sums[place][part])}
        )
        return [lost if i == place else each for i, each in enumerate(sums)]

    def forward(*sums: lora_add.LowRankSum) -> mx.array:
        return mlp.plain_forward(*without(sums))

    def backward(*sums: lora_add.LowRankSum) -> mlp.Three:
        return mlp.plain_backward(*without(sums))

    found = [mlp.trouble_with(mlp.plain_forward, backward)]
    if place < 2:
        found.append(mlp.trouble_with(forward, mlp.plain_backward))
        found.append(lora_add.trouble_with(lambda sums: lora_add.plain_expand(without(sums))))
    assert all("it differs by" in str(each) for each in found)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_the_check_of_joining_finds_each_array_that_is_lost(lost: int) -> None:
    def join(arrays: Any) -> mx.array:
        kept = [mx.zeros_like(a) if i == lost else a for i, a in enumerate(arrays)]
        return concatenate.plain_join(kept)

    assert "it differs by" in str(concatenate.trouble_with(join))


def test_a_disagreement_is_measured_by_the_largest_element() -> None:
    expected = [mx.array([0.0, 100.0]), mx.array([[1.0]])]

    def found(*arrays: Any) -> str | None:
        return self_check.disagreement(lambda: [mx.array(each) for each in arrays], expected)

    assert found([1.9, 98.1], [[1.01]]) is None
    assert found([2.5, 100.0], [[1.0]]) == "it differs by 2.5 where elements are up to 100"
    assert found([0.0, 100.0], [[1.25]]) == "it differs by 0.25 where elements are up to 1"
    assert found([0.0, 100.0], [1.0]) == "it gives the shape (1,), not (1, 1)"
    assert found([float("inf"), 100.0], [[1.0]]) == "it differs by inf where elements are up to 100"


def test_a_failure_is_told_in_one_line_of_at_most_200_characters() -> None:
    def fail() -> list[mx.array]:
        raise RuntimeError("line one\n\n   " + 300 * "x")

    assert self_check.disagreement(fail, []) == "it failed: line one " + 191 * "x"


def test_a_kernel_that_is_not_sound_is_told_of_in_a_warning() -> None:
    message = (
        "Our CUDA kernel for norms is not used: it failed: no compiler. MLX's own operations are."
    )
    with pytest.warns(UserWarning, match="^Our CUDA kernel") as caught:
        assert self_check.is_sound("norms", "it failed: no compiler") is False
    assert [str(each.message) for each in caught] == [message]


def test_a_sound_kernel_is_used_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert self_check.is_sound("norms", None) is True


@pytest.mark.skipif(not backend.has_cuda(), reason="needs a CUDA device")
def test_on_cuda_the_kernels_agree_with_mlx() -> None:
    assert (
        lora_matmuls.trouble_with(lora_matmuls.narrow_on_cuda, lora_matmuls.outer_on_cuda) is None
    )
    for most in tiles.TILES:
        assert lora_add.trouble_with(lora_add.expand_on_cuda, most) is None
        assert mlp.trouble_with(mlp.forward_on_cuda, mlp.backward_on_cuda, most) is None
    assert swiglu.trouble_with(swiglu.forward_on_cuda, swiglu.backward_on_cuda) is None
    assert rope.trouble_with(rope.turn_on_cuda) is None
    assert rms_norm.trouble_with(rms_norm.backward_on_cuda) is None
    assert concatenate.trouble_with(concatenate.join_on_cuda) is None
