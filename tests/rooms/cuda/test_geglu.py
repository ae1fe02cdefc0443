"""Gemma's MLPs with a recomputed product: mlx-lm's loss and gradients, in less memory."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.models import gemma3_text

from nested_core import backend
from nested_core.rooms.cuda.geglu import using_recomputed_geglu
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import batch, build, leave_by_error, outcome, require_near
from tests.arrays import normal
from tests.left_out import slow_except


@pytest.mark.parametrize(
    "name", slow_except(["gemma2", "gemma3_text"], "gemma3_text", reason="compiles another model")
)
def test_loss_and_gradients_are_those_of_mlx_lm(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    expected = outcome(model, SUPERVISED_LOSS, batch())
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    with using_recomputed_geglu(model):
        assert type(model.layers[0].mlp) is not type(build(name).layers[0].mlp)
        found = outcome(model, SUPERVISED_LOSS, batch())
    require_near(found, expected, loss=2e-6, gradients=3e-5)


@pytest.mark.slow("measures the memory of sixteen wide layers")
def test_gate_and_up_alone_are_kept_for_the_backward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    mx.random.seed(0)
    mlps = nn.Sequential(*[gemma3_text.MLP(8, 4096) for _ in range(16)])
    x = normal(256, 8, dtype=mx.float32)
    mx.eval(mlps.parameters(), x)

    def arrays_kept() -> float:
        """Of the inner width, of each MLP, at the peak."""
        step = mx.compile(mx.grad(lambda x: mlps(x).square().sum()))
        mx.eval(step(x))
        held = mx.get_active_memory()
        mx.reset_peak_memory()
        mx.eval(step(x))
        return (mx.get_peak_memory() - held) / (16 * 256 * 4096 * 4)

    plain = arrays_kept()
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    with using_recomputed_geglu(mlps):
        assert arrays_kept() < plain - 1.5


def test_modules_are_given_back_after_an_error_and_left_alone_on_a_cpu(monkeypatch) -> None:
    model = build("gemma2")
    own = type(model.layers[0].mlp)
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: False)
    with using_recomputed_geglu(model):
        assert type(model.layers[0].mlp) is own
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    leave_by_error(using_recomputed_geglu(model), lambda: None)
    assert type(model.layers[0].mlp) is own
