"""What becomes of a kernel that is wrong in a small way, and what is said of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import pytest

from nested_core import backend
from nested_core.kernels.device_operations import concatenate_in_mlx
from nested_core.kernels.self_check import CheckedKernel
from nested_core.rooms.cuda import (
    concatenate,
    gated_delta_kernels,
    gated_mlp,
    kernel_launch,
    lora_add,
    lora_matmuls,
    rms_norm,
    rope,
    swiglu,
)
from nested_core.rooms.cuda.call_tracing import plain_swiglu
from nested_core.rooms.delta_nets import gated_delta
from tests.left_out import slow_except

pytestmark = pytest.mark.slow("compares layers and models for CUDA with mlx-lm's")

Fault = Callable[[mx.array], mx.array]


@pytest.fixture
def narrower(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums of fewer columns: only a kernel needs so many, and MLX takes seconds for them."""
    example = lora_add.random_low_rank_sum_terms
    for module in (lora_add, gated_mlp):
        monkeypatch.setattr(
            module, "random_low_rank_sum_terms", lambda rank, width: example(rank, min(width, 160))
        )


@dataclass(frozen=True)
class Check:
    """A kernel, a formula to stand in for it, the outputs of that, and the variant to compare."""

    kernel: CheckedKernel[Any, Any]
    formula: Callable[..., Any]
    outputs: int
    variant: tuple[int, ...] = ()

    def with_formula(self, formula: Callable[..., Any]) -> str | None:
        """What the check says of another formula in the kernel's place."""
        return replace(self.kernel, launch=formula).describe_disagreement(*self.variant)

    def with_faults(self, *faults: Fault) -> str | None:
        """What the check says of the formula with a fault in each output."""

        def launch(*arguments: Any) -> Any:
            outputs = self.formula(*arguments)
            if isinstance(outputs, mx.array):
                # A rotation's two faults are of its two directions.
                return faults[arguments[-1] if len(faults) == 2 else 0](outputs)
            return [fault(each) for fault, each in zip(faults, outputs, strict=True)]

        return self.with_formula(launch)


CHECKS = {
    "project": Check(
        lora_matmuls.project_to_rank_on_cuda, lora_matmuls.project_to_rank_in_mlx, 1, (3,)
    ),
    "factor gradients": Check(
        lora_matmuls.factor_gradients_on_cuda, lora_matmuls.factor_gradients_in_mlx, 2, (3,)
    ),
    "low-rank sums": Check(lora_add.low_rank_sums_on_cuda, lora_add.low_rank_sums_in_mlx, 2, (3,)),
    "mlp": Check(gated_mlp.gated_product_on_cuda, gated_mlp.gated_product_in_mlx, 1, (3,)),
    "mlp gradients": Check(
        gated_mlp.gated_gradients_on_cuda, gated_mlp.gated_gradients_in_mlx, 3, (3,)
    ),
    "swiglu": Check(swiglu.swiglu_on_cuda, plain_swiglu, 1),
    "swiglu gradients": Check(swiglu.swiglu_gradients_on_cuda, swiglu.swiglu_gradients_in_mlx, 2),
    "rope": Check(rope.rotate_on_cuda, rope.rotate_in_mlx, 2),
    "norm": Check(rms_norm.input_gradient_on_cuda, rms_norm.input_gradient_in_mlx, 1, (2600,)),
    "concatenate": Check(concatenate.concatenate_on_cuda, concatenate_in_mlx, 1),
    "carried states": Check(gated_delta_kernels.carry_on_cuda, gated_delta.carry_in_mlx, 2, (64,)),
    "inverse": Check(gated_delta_kernels.invert_on_cuda, gated_delta.invert_in_mlx, 1),
    "gated delta nets": Check(gated_delta.compute_on_this_device, gated_delta.compute_by_tokens, 2),
}
OUTPUTS = [(name, place) for name, check in CHECKS.items() for place in range(check.outputs)]


def as_it_is(array: mx.array) -> mx.array:
    return array


def failing(array: mx.array) -> mx.array:
    raise RuntimeError("nvrtc: no such\n  compiler")


FAULTS: dict[str, tuple[Fault, str]] = {
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
    check = CHECKS[name]
    assert check.with_faults(*[as_it_is] * check.outputs) is None


@pytest.mark.usefixtures("narrower")
@pytest.mark.parametrize(
    "fault", slow_except(FAULTS, *list(FAULTS)[:1], reason="each fault of each output")
)
@pytest.mark.parametrize(("name", "place"), OUTPUTS)
def test_the_check_finds_a_fault_in_each_output(name: str, place: int, fault: str) -> None:
    faults: list[Fault] = [as_it_is] * CHECKS[name].outputs
    faults[place], message = FAULTS[fault]
    assert str(CHECKS[name].with_faults(*faults)).startswith(message)


@pytest.mark.usefixtures("narrower")
@pytest.mark.parametrize("name", [name for name in CHECKS if name != "concatenate"])
def test_the_check_finds_a_result_that_is_transposed(name: str) -> None:
    others: list[Fault] = [as_it_is] * (CHECKS[name].outputs - 1)
    assert "it gives the shape (" in str(CHECKS[name].with_faults(lambda a: a.T, *others))


def test_the_checks_find_an_argument_that_is_not_looked_at() -> None:
    formulas: dict[str, Callable[..., Any]] = {
        "project": lambda pairs, scale: lora_matmuls.project_to_rank_in_mlx(pairs, 1.0),
        "rope": lambda x, table, inverse: rope.rotate_in_mlx(x, table, False),
        "norm": lambda x, weight, eps, g: rms_norm.input_gradient_in_mlx(
            x, mx.ones_like(weight), eps, g
        ),
        "concatenate": lambda arrays: concatenate_in_mlx(arrays[::-1]),
    }
    for name, formula in formulas.items():
        assert "it differs by" in str(CHECKS[name].with_formula(formula))


@pytest.mark.usefixtures("narrower")
@pytest.mark.parametrize("part", [0, 1, 2])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_the_checks_find_a_part_of_a_sum_that_is_not_looked_at(place: int, part: int) -> None:
    def without(sums: lora_add.Sums) -> list[lora_add.LowRankSumTerms]:
        lost = sums[place]._replace(
            **{lora_add.LowRankSumTerms._fields[part]: mx.zeros_like(sums[place][part])}
        )
        return [lost if i == place else each for i, each in enumerate(sums)]

    def gradients(*sums: lora_add.LowRankSumTerms) -> gated_mlp.GatedGradients:
        return gated_mlp.gated_gradients_in_mlx(*without(sums))

    found = [CHECKS["mlp gradients"].with_formula(gradients)]
    if place < 2:
        found.append(
            CHECKS["mlp"].with_formula(lambda *sums: gated_mlp.gated_product_in_mlx(*without(sums)))
        )
        found.append(
            CHECKS["low-rank sums"].with_formula(
                lambda sums: lora_add.low_rank_sums_in_mlx(without(sums))
            )
        )
    assert all("it differs by" in str(each) for each in found)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_the_check_of_concatenation_finds_each_array_that_is_lost(lost: int) -> None:
    def concatenate_others(arrays: Any) -> mx.array:
        kept = [mx.zeros_like(a) if i == lost else a for i, a in enumerate(arrays)]
        return concatenate_in_mlx(kept)

    assert "it differs by" in str(CHECKS["concatenate"].with_formula(concatenate_others))


def kernel_of(
    launch: Callable[[], Sequence[mx.array]], expected: Sequence[mx.array] = ()
) -> CheckedKernel[[], Sequence[mx.array]]:
    """A kernel for norms without arguments."""
    return CheckedKernel("norms", launch, lambda: expected, lambda: [()])


def fail() -> list[mx.array]:
    raise RuntimeError("line one\n\n   " + 300 * "x")


def test_a_disagreement_is_measured_by_the_largest_element() -> None:
    expected = [mx.array([0.0, 100.0]), mx.array([[1.0]])]

    def found(*arrays: Any) -> str | None:
        return kernel_of(
            lambda: [mx.array(each) for each in arrays], expected
        ).describe_disagreement()

    assert found([1.9, 98.1], [[1.01]]) is None
    assert found([2.5, 100.0], [[1.0]]) == "it differs by 2.5 where elements are up to 100"
    assert found([0.0, 100.0], [[1.25]]) == "it differs by 0.25 where elements are up to 1"
    assert found([0.0, 100.0], [1.0]) == "it gives the shape (1,), not (1, 1)"
    assert found([float("inf"), 100.0], [[1.0]]) == "it differs by inf where elements are up to 100"


def test_every_example_is_compared() -> None:
    doubled = CheckedKernel(
        "norms", lambda n: mx.array(2.0 * n), lambda n: mx.array(1.0 * n), lambda: [(0,), (3,)]
    )
    assert doubled.describe_disagreement() == "it differs by 3 where elements are up to 3"


def test_a_failure_is_told_in_one_line_of_at_most_200_characters() -> None:
    assert kernel_of(fail).describe_disagreement() == "it failed: line one " + 191 * "x"


def test_a_kernel_that_disagrees_is_told_of_in_one_warning_a_process() -> None:
    def fail_at_once() -> list[mx.array]:
        launches.append(1)
        raise RuntimeError("no compiler")

    launches: list[int] = []
    message = (
        "Our CUDA kernel for norms is not used: it failed: no compiler. MLX's own operations are."
    )
    kernel = kernel_of(fail_at_once)
    with pytest.warns(UserWarning, match="^Our CUDA kernel") as caught:
        assert [kernel.agrees_with_reference(), kernel.agrees_with_reference()] == [False, False]
    assert [str(each.message) for each in caught] == [message]
    assert launches == [1]


def test_a_sound_kernel_is_used_without_a_word() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernel_of(lambda: []).agrees_with_reference() is True


def test_each_variant_is_compared_for_itself_and_once() -> None:
    compared: list[int] = []

    def examples(variant: int) -> list[tuple[int]]:
        compared.append(variant)
        return [(variant,)]

    kernel = CheckedKernel(
        "norms", lambda n: mx.array(float(n > 1)), lambda n: mx.array(1.0), examples
    )
    with pytest.warns(UserWarning, match="it differs by 1"):
        assert [kernel.agrees_with_reference(n) for n in (1, 2, 1, 2)] == [False, True, False, True]
    assert compared == [1, 2]


def test_without_cuda_a_kernel_is_not_usable_and_not_launched(monkeypatch) -> None:
    kernel = kernel_of(fail)
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: False)
    assert kernel.is_usable() is False
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    assert kernel_of(lambda: []).is_usable() is True


@pytest.mark.skipif(not backend.computes_on_cuda(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", CHECKS)
def test_on_cuda_the_kernels_agree_with_mlx(name: str) -> None:
    kernel, variant = CHECKS[name].kernel, CHECKS[name].variant
    of_tiles = [(number,) for number in kernel_launch.COMPILED_TILE_COUNTS]
    for each in of_tiles if variant == (3,) else [variant]:
        assert kernel.describe_disagreement(*each) is None
