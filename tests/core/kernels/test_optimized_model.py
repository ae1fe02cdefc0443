"""A model on a CPU, and what is said of its layers."""

from __future__ import annotations

import numpy as np
import pytest

from nested_core import backend
from nested_core.kernels.device_operations import device_operations
from nested_core.kernels.optimized_model import using_optimized_layers
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import batch, build, kinds_of, outcome
from tests.left_out import leave_out_room


@pytest.mark.skipif(backend.device() != "cpu", reason="about a CPU")
def test_on_a_cpu_a_model_computes_with_mlx_lms_layers_to_the_bit() -> None:
    model = build("llama")
    expected = outcome(model, SUPERVISED_LOSS, batch())
    kinds = kinds_of(model)
    with using_optimized_layers(model):
        assert kinds_of(model) == kinds
        found = outcome(model, SUPERVISED_LOSS, batch())
    assert found.loss == expected.loss
    for name, gradient in expected.gradients.items():
        assert np.array(gradient).tobytes() == np.array(found.gradients[name]).tobytes()


def test_a_line_says_why_no_layers_are_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: False)
    said = device_operations().describe_layers(model)
    assert said == "layers: mlx-lm's own; ours are for CUDA (nested_core/rooms/cuda)"
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    leave_out_room("cuda", monkeypatch)
    said = device_operations().describe_layers(model)
    assert said == "layers: mlx-lm's own; ours are not installed (nested_core/rooms/cuda)"
