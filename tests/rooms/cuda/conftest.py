"""A machine whose CUDA kernels for LoRA layers are MLX's operations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nested_core import backend
from nested_core.kernels.self_check import CheckedKernel
from nested_core.rooms.cuda import concatenate, gated_mlp, lora_add, lora_matmuls, padded_attention
from nested_core.seams import is_there

# Kernels of gated delta nets are read and compared where the room with their formulas is.
collect_ignore = [] if is_there("delta_nets") else ["test_kernel_launch.py", "test_self_check.py"]


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine whose kernels for LoRA layers agree, MLX in their place. The calls of each."""
    calls: list[str] = []

    def recorded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        return call

    kernels: dict[str, CheckedKernel[Any, Any]] = {
        "low_rank_sums": lora_add.low_rank_sums_on_cuda,
        "forward": gated_mlp.gated_product_on_cuda,
        "backward": gated_mlp.gated_gradients_on_cuda,
        "project_to_rank": lora_matmuls.project_to_rank_on_cuda,
        "factor_gradients": lora_matmuls.factor_gradients_on_cuda,
        "concatenate": concatenate.concatenate_on_cuda,
    }
    for name, kernel in kernels.items():
        monkeypatch.setattr(kernel, "launch", recorded(name, kernel.reference))
        monkeypatch.setattr(kernel, "agrees_with_reference", lambda *variant: True)
    attention = padded_attention.change_length_on_cuda  # no layer of LoRA: MLX's is used
    monkeypatch.setattr(attention, "agrees_with_reference", lambda *variant: False)
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    return calls
