"""Runs of the example that several tests look at, and a machine whose CUDA kernels are MLX's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nested_core import backend
from nested_core.kernels import fused_mlp
from nested_core.kernels import lora_linear as layers
from nested_core.kernels.cuda import concatenate, lora_add, lora_matmuls, mlp
from tests.example import Finished, train_example

EVERY_STEP = {"save_every": 1, "steps_per_report": 1, "training": {"keep_checkpoints": 99}}


@pytest.fixture(scope="session")
def every_step(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Nine steps of tiers [1, 2, 4], with a checkpoint and a report at each."""
    return train_example(tmp_path_factory.mktemp("every") / "run", iters=9, **EVERY_STEP)


@pytest.fixture(scope="session")
def accumulated(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The same where slow tiers gather their gradients; the last chunks are flushed."""
    nested: dict[str, Any] = {"frequencies": [1, 2, 4], "slow_gradients": "accumulate"}
    path = tmp_path_factory.mktemp("accumulated") / "run"
    return train_example(path, iters=9, nested=nested, **EVERY_STEP)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine whose kernels for LoRA layers agree, MLX in their place; which were asked for."""
    calls: list[str] = []

    def noting(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            calls.append(name)
            return function(*args)

        return call

    plain: dict[str, tuple[Any, str, Callable[..., Any]]] = {
        "expand": (lora_add, "expand_on_cuda", lora_add.plain_expand),
        "forward": (mlp, "forward_on_cuda", mlp.plain_forward),
        "backward": (mlp, "backward_on_cuda", mlp.plain_backward),
        "narrow": (lora_matmuls, "narrow_on_cuda", lora_matmuls.plain_narrow),
        "outer": (lora_matmuls, "outer_on_cuda", lora_matmuls.plain_outer),
        "join": (concatenate, "join_on_cuda", concatenate.plain_join),
    }
    for name, (module, replaced, function) in plain.items():
        monkeypatch.setattr(module, replaced, noting(name, function))
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    monkeypatch.setattr(concatenate, "join_agrees", lambda: True)
    for module, name in (
        (lora_add, "kernel_agrees"),
        (lora_matmuls, "kernels_agree"),
        (layers, "kernel_agrees"),
        (layers, "kernels_agree"),
        (fused_mlp, "kernels_agree"),
    ):
        monkeypatch.setattr(module, name, lambda most: True)
    return calls
