"""Our CUDA sources and their launches: names, arguments and macros that agree, and what is said.

The kernels themselves need a GPU; that a launch gives what its source takes can be read.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from nested_core.kernels.device_operations import RANKS_PER_TILE
from nested_core.kernels.self_check import CheckedKernel
from nested_core.rooms.cuda import (
    concatenate,
    gated_delta_kernels,
    gated_mlp,
    kernel_launch,
    lora_add,
    lora_matmuls,
    padded_attention,
    rms_norm,
    rope,
    swiglu,
)

FOLDER = Path(kernel_launch.__file__).parent
SOURCES = {path.stem: path.read_text() for path in sorted((FOLDER).glob("*.cu"))}
COMMON, EXPAND = ((FOLDER / name).read_text() for name in ("common.cuh", "low_rank_sum.cuh"))
LAUNCHES = re.compile(r'\b(?:launch_kernel|_launch_gated_kernel|_launch_elementwise)\(\s*"(\w+)"')
KERNEL = re.compile(r"^KERNEL(?:_BESIDE\([^)]*\))? (\w+)\((.*?)\) \{", re.MULTILINE | re.DOTALL)
TYPE = mx.bfloat16


def of(*shape: int, dtype: mx.Dtype = TYPE) -> mx.array:
    return mx.ones(shape, dtype)


def parameters(name: str) -> list[str]:
    """The types of a kernel's parameters: array, out, int or float."""
    (found,) = KERNEL.findall(SOURCES[name])
    text = re.sub(r"EACH\(ARRAY\)", "const uint4* a, " * 31, found[1])
    text = re.sub(r"EACH\(END\)", "int end, " * 31, text)
    kinds = []
    for each in text.split(","):
        pointer = "array" if "const" in each else "out"
        kinds.append(pointer if "*" in each else each.split()[0])
    return kinds


def test_each_kernel_that_is_launched_has_a_file_and_each_file_is_launched() -> None:
    launched = {
        n for path in FOLDER.parent.rglob("*.py") for n in LAUNCHES.findall(path.read_text())
    }
    assert launched == SOURCES.keys()
    assert len(launched) == 14


@pytest.mark.parametrize("name", SOURCES)
def test_a_files_one_kernel_has_its_name(name: str) -> None:
    assert [found for found, _ in KERNEL.findall(SOURCES[name])] == [name]
    assert SOURCES[name].count("KERNEL") == 1


@pytest.mark.parametrize("name", SOURCES)
def test_a_source_is_compiled_with_what_it_includes_before_it_once(name: str) -> None:
    first, own = SOURCES[name].split("\n", 1)
    sums = EXPAND.removeprefix('#include "common.cuh"\n')
    shared = {'#include "common.cuh"': COMMON, '#include "low_rank_sum.cuh"': COMMON + sums}
    assert kernel_launch.read_source_with_includes(f"{name}.cu") == shared[first] + own
    assert "#include" not in kernel_launch.read_source_with_includes(f"{name}.cu")


def test_widths_and_counts_are_those_of_the_sources() -> None:
    assert f"constexpr int W = {kernel_launch.ELEMENTS_PER_LOAD};" in COMMON
    assert kernel_launch.MAX_THREADS_PER_BLOCK == 32 * 8
    assert "constexpr int WARPS = 8;" in COMMON
    assert mx.bfloat16 == kernel_launch.KERNEL_DTYPE
    assert "cvt.rn.bf16.f32" in COMMON
    assert ".bf16.bf16.f32" in COMMON
    assert f"threadIdx.x / 32) * {lora_add.WARP_COLUMNS};" in EXPAND
    assert f"({RANKS_PER_TILE} * min(i, n - 1)" in EXPAND
    for name in ("low_rank_sums", "gated_product", "gated_gradients"):
        assert f"first = blockIdx.y * steps * {lora_add.WARP_ROWS};" in SOURCES[name]
        assert (
            f"first + steps * {lora_add.WARP_ROWS}); row += {lora_add.WARP_ROWS})" in SOURCES[name]
        )


def macros_of(name: str) -> set[str]:
    """What has to be defined for a kernel."""
    return set(
        re.findall(
            r"\b(?:MOST|PACKS|SIZE)\b", kernel_launch.read_source_with_includes(f"{name}.cu")
        )
    )


PAIRS = [(of(8, 64), of(40, 64)), (of(24, 128), of(40, 128))]
PRODUCTS = [(of(8, 300), of(300, 64)), (of(24, 300), of(300, 128))]
SPLIT_PRODUCTS = [(of(8, 1500), of(1500, 64)), (of(24, 1500), of(1500, 128))]
SUMS = [lora_add.LowRankSumTerms(of(40, 64), of(8, 40), of(8, 64))] * 3
CALLS: dict[str, tuple[Any, Callable[[], Any]]] = {
    "low_rank_sums": (lora_add, lambda: lora_add.low_rank_sums_on_cuda(SUMS)),
    "gated_product": (gated_mlp, lambda: gated_mlp.gated_product_on_cuda(SUMS[0], SUMS[1])),
    "gated_gradients": (
        gated_mlp,
        lambda: gated_mlp.gated_gradients_on_cuda(SUMS[0], SUMS[1], SUMS[2]),
    ),
    "concatenate": (concatenate, lambda: concatenate.concatenate_on_cuda([of(8), of(16), of(8)])),
    "project_to_rank": (lora_matmuls, lambda: lora_matmuls.project_to_rank_on_cuda(PAIRS, 2)),
    "factor_gradients": (lora_matmuls, lambda: lora_matmuls.factor_gradients_on_cuda(PRODUCTS)),
    "sum_of_splits": (lora_matmuls, lambda: lora_matmuls.factor_gradients_on_cuda(SPLIT_PRODUCTS)),
    "rms_norm_gradient": (
        rms_norm,
        lambda: rms_norm.input_gradient_on_cuda(of(3, 40), of(40), 1e-5, of(3, 40)),
    ),
    "rotate": (
        rope,
        lambda: rope.rotate_on_cuda(of(2, 5, 4, 48), of(5, 48, dtype=mx.float32), True),
    ),
    "change_length": (
        padded_attention,
        lambda: padded_attention.change_length_on_cuda([of(2, 3, 4, 16), of(2, 3, 2, 16)], 128),
    ),
    "carry_state": (
        gated_delta_kernels,
        lambda: gated_delta_kernels.carry_on_cuda(
            of(3, 2, 4, 1, 1, dtype=mx.float32),
            of(3, 2, 4, 64, 64),
            of(3, 2, 4, 64, 96),
            of(2, 4, 64, 96, dtype=mx.float32),
        ),
    ),
    "unit_lower_inverse": (
        gated_delta_kernels,
        lambda: gated_delta_kernels.invert_on_cuda(of(2, 3, 64, 64, dtype=mx.float32)),
    ),
    "swiglu": (swiglu, lambda: swiglu.swiglu_on_cuda(of(4, 8), of(4, 8))),
    "swiglu_gradients": (
        swiglu,
        lambda: swiglu.swiglu_gradients_on_cuda(of(4, 8), of(4, 8), of(4, 8)),
    ),
}


@pytest.mark.parametrize("name", SOURCES)
def test_a_launch_gives_what_the_source_takes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, call = CALLS[name]
    given: dict[str, tuple[list[str], set[str]]] = {}

    def note(
        kernel: str,
        inputs: Sequence[mx.array],
        outputs: Sequence[kernel_launch.ArraySpec],
        numbers: Sequence[int | float],
        *,
        blocks: Sequence[int],
        threads: int = kernel_launch.MAX_THREADS_PER_BLOCK,
        dtypes: Sequence[mx.Dtype] = (TYPE,),
        **macros: int,
    ) -> list[mx.array]:
        expected = [*dtypes, *[dtypes[-1]] * (len(inputs) - len(dtypes))]
        assert [array.dtype for array in inputs] == expected
        assert min(blocks) > 0
        assert len(blocks) in (2, 3)
        assert threads % 32 == 0
        assert threads <= 256
        kinds = ["array"] * len(inputs) + ["out"] * len(outputs)
        given[kernel] = kinds + [type(each).__name__ for each in numbers], set(macros)
        return [mx.zeros(shape, kind) for shape, kind in outputs]

    monkeypatch.setattr(module, "launch_kernel", note)
    call()
    kinds, macros = given[name]
    assert kinds == parameters(name)
    assert macros == macros_of(name)


@pytest.mark.parametrize(
    ("blocks", "grid"), [((3, 5), (3 * 256, 5, 1)), ((3, 5, 4), (3 * 256, 5, 4))]
)
def test_a_grid_is_of_threads_across_and_of_blocks_down_and_deep(blocks, grid, monkeypatch) -> None:
    given: dict[str, Any] = {}

    def note(**arguments: Any) -> list[mx.array]:
        given.update(arguments)
        return []

    monkeypatch.setattr(kernel_launch, "compile_kernel", lambda name, **macros: (name, macros))
    monkeypatch.setattr(mx.fast, "precompiled_cuda_kernel", note)
    kernel_launch.launch_kernel(
        "low_rank_sums", [], [((2, 3), TYPE)], [7, 0.1], blocks=blocks, MOST=2
    )
    assert given["grid"] == grid
    assert given["threadgroup"] == (256, 1, 1)
    assert given["compiled_source"] == ("low_rank_sums", {"MOST": 2})
    assert given["output_shapes"] == [(2, 3)]
    assert given["output_dtypes"] == [TYPE]
    assert given["scalars"] == [7, kernel_launch.round_to_float32(0.1)]
    assert given["ensure_row_contiguous"] is True


@pytest.mark.parametrize(
    "call",
    [
        lambda x: rms_norm.input_gradient_on_cuda(of(3, 40), of(40), 1e-5, x(3, 40)),
        lambda x: swiglu.swiglu_gradients_on_cuda(of(4, 8), of(4, 8), x(4, 8)),
        lambda x: rope.rotate_on_cuda(x(2, 5, 4, 48), of(5, 48, dtype=mx.float32), True),
        lambda x: rope.rotate_on_cuda(of(2, 5, 4, 48), of(5, 48), True),
        lambda x: padded_attention.change_length_on_cuda([of(2, 3, 4, 16), x(2, 3, 2, 16)], 128),
        lambda x: concatenate.concatenate_on_cuda([of(8), x(16)]),
    ],
)
def test_an_array_of_another_dtype_than_a_kernel_reads_is_refused(call: Any) -> None:
    with pytest.raises(TypeError, match=r"the CUDA kernel \w+ reads .*bfloat16.*, and was given"):
        call(lambda *shape: of(*shape, dtype=mx.float32))


@pytest.mark.parametrize("number", [1e-5, 1e-6, 2.0, 1 / 3, -1.0])
def test_a_number_is_given_as_the_float32_that_is_nearest(number: float) -> None:
    found = kernel_launch.round_to_float32(number)
    assert type(found) is float
    assert float(np.float32(found)) == found
    assert found == pytest.approx(number, rel=2**-24)


def test_without_cuda_core_a_person_is_told_what_to_install(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    with pytest.raises(RuntimeError, match=r": install nested-tune\[cuda\]$"):
        kernel_launch.compile_kernel("concatenate")


def test_a_kernel_without_cuda_core_is_found_to_fail_not_raised(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.core", None)
    monkeypatch.setattr(kernel_launch, "compile_kernel", kernel_launch.compile_kernel.__wrapped__)
    kernels: list[tuple[CheckedKernel[Any, Any], tuple[int, ...]]] = [
        (lora_matmuls.project_to_rank_on_cuda, (3,)),
        (lora_matmuls.factor_gradients_on_cuda, (3,)),
        (lora_add.low_rank_sums_on_cuda, (3,)),
        (gated_mlp.gated_product_on_cuda, (3,)),
        (gated_mlp.gated_gradients_on_cuda, (3,)),
        (swiglu.swiglu_on_cuda, ()),
        (swiglu.swiglu_gradients_on_cuda, ()),
        (rope.rotate_on_cuda, ()),
        (rms_norm.input_gradient_on_cuda, (2600,)),
        (concatenate.concatenate_on_cuda, ()),
        (padded_attention.change_length_on_cuda, ()),
    ]
    for kernel, variant in kernels:
        trouble = str(kernel.describe_disagreement(*variant))
        assert trouble.startswith("it failed: ")
        assert trouble.endswith(": install nested-tune[cuda]")
