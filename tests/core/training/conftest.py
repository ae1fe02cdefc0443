"""Runs of the example that several tests look at, and a machine whose CUDA kernels are MLX's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from nested_core import backend
from nested_core.kernels import expand, joining, low_rank, mlp
from nested_core.training import gated_mlp
from nested_core.training import low_rank as layers
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
        "expand": (expand, "expand_on_cuda", expand.plain_expand),
        "forward": (mlp, "forward_on_cuda", mlp.plain_forward),
        "backward": (mlp, "backward_on_cuda", mlp.plain_backward),
        "narrow": (low_rank, "narrow_on_cuda", low_rank.plain_narrow),
        "outer": (low_rank, "outer_on_cuda", low_rank.plain_outer),
        "join": (joining, "join_on_cuda", joining.plain_join),
    }
    for name, (module, replaced, function) in plain.items():
        monkeypatch.setattr(module, replaced, noting(name, function))
    monkeypatch.setattr(backend, "has_cuda", lambda: True)
    monkeypatch.setattr(joining, "join_agrees", lambda: True)
    for module, name in (
        (expand, "kernel_agrees"),
        (low_rank, "kernels_agree"),
        (layers, "kernel_agrees"),
        (layers, "kernels_agree"),
        (gated_mlp, "kernels_agree"),
    ):
        monkeypatch.setattr(module, name, lambda most: True)
    return calls
