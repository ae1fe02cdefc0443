"""bfloat16 factors under float32 masters: what is cast, what is not, how near the loss stays."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.models.base_model import load_base_model
from nested_core.models.lora_attachment import adapter_compute_dtype, attach_adapter
from nested_core.models.parameters import read_parameters, reference_trainable_parameters
from nested_core.storage.adapter import read_adapter
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import batch, build, outcome
from tests.example import example_config, train_example


def dtype_of(**changes: Any) -> mx.Dtype | None:
    config: FineTuneConfig = example_config(**changes)
    model, _ = load_base_model(config)
    attach_adapter(model, config)
    return adapter_compute_dtype(config, model)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"training": {"precision": "bfloat16"}}, mx.bfloat16),
        ({"training": {"precision": "float32"}}, None),
        ({"training": {"precision": "bfloat16"}, "fine_tune_type": "dora"}, None),
        ({"training": {"precision": "bfloat16"}, "fine_tune_type": "full"}, None),
    ],
)
def test_the_factors_are_cast_where_the_model_computes_in_bfloat16(changes, expected) -> None:
    assert dtype_of(**changes) == expected


def test_a_reference_run_casts_nothing() -> None:
    reference = {"reference": "mlx_lm", "max_grad_norm": 0}
    assert dtype_of(training=reference, nested={"frequencies": [1]}) is None


def test_gradients_of_cast_factors_arrive_in_the_masters_float32() -> None:
    model = build("llama")
    model.set_dtype(mx.bfloat16)
    for _, module in model.named_modules():
        if "lora_a" in module:
            module.lora_a = module.lora_a.astype(mx.float32)
            module.lora_b = module.lora_b.astype(mx.float32)
    refs = reference_trainable_parameters(model, dtype=mx.bfloat16)
    found = outcome(model, SUPERVISED_LOSS, batch(), refs=refs)
    assert {gradient.dtype for gradient in found.gradients.values()} == {mx.float32}
    assert {value.dtype for value in read_parameters(refs).values()} == {mx.float32}


@pytest.mark.slow("trains in bfloat16, which is slow on a CPU")
def test_a_bfloat16_run_stays_near_the_float32_run_and_keeps_float32_tensors(tmp_path) -> None:
    runs = {}
    for precision in ("float32", "bfloat16"):
        changes = {"training": {"precision": precision}, "iters": 12, "steps_per_report": 12}
        done = train_example(tmp_path / precision, **changes)
        runs[precision] = done.metrics()[-1]["loss"]
        tensors = read_adapter(done.run.adapter).tensors
        assert {tensor.dtype for tensor in tensors.values()} == {"F32"}
    assert runs["bfloat16"] == pytest.approx(runs["float32"], rel=0.02)
