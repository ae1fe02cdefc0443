"""Which kernels are checked before a step is traced, and what is said of a model's layers."""

from __future__ import annotations

from typing import Any

import pytest

from nested_core import backend
from nested_core.kernels.self_check import CheckedKernel
from nested_core.rooms.cuda import lora_add, lora_matmuls
from nested_core.rooms.cuda.operations import CUDA_OPERATIONS
from tests.architectures import build


@pytest.mark.parametrize("has_cuda", [True, False])
def test_kernels_are_checked_ahead_for_ranks_that_one_takes_and_on_cuda_alone(
    has_cuda: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels: list[CheckedKernel[Any, Any]] = [
        lora_add.low_rank_sums_on_cuda,
        lora_matmuls.project_to_rank_on_cuda,
        lora_matmuls.factor_gradients_on_cuda,
    ]
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: has_cuda)
    for kernel in kernels:
        checked: list[int] = []
        with monkeypatch.context() as patch:
            for other in kernels:
                patch.setattr(other, "agrees_with_reference", lambda tiles: True)
            patch.setattr(kernel, "agrees_with_reference", checked.append)
            lora_matmuls.check_lora_kernels([0, 4, 12, 72])
            assert checked == []
            lora_matmuls.check_lora_kernels([24, 8, 40, 24])
        assert checked == ([1, 3, 6] if has_cuda else [])


def test_a_line_says_which_layers_the_kernels_take(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "device", lambda: "gpu")
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    monkeypatch.setattr(CheckedKernel, "is_usable", lambda self, *variant: True)
    said = CUDA_OPERATIONS.describe_layers(build("llama", rank=12))
    assert "0 gated MLPs" in said
    assert "no kernel takes rank 12" in said
    assert "2 gated MLPs are one function each" in CUDA_OPERATIONS.describe_layers(
        build("llama", rank=8)
    )
