"""MLPs of experts with one product over all of them: mlx-lm's loss and gradients."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchGLU

from nested_core import backend
from nested_core.rooms.cuda import expert_mlps
from nested_core.rooms.cuda.expert_mlps import (
    FEWEST_SORTED_ROWS,
    find_expert_layers,
    multiplies_all_experts,
    take_rows,
    using_expert_mlps,
)
from nested_core.rooms.cuda.operations import CUDA_OPERATIONS
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import batch, build, leave_by_error, outcome, require_near
from tests.arrays import normal

pytestmark = pytest.mark.slow("compares layers and models for CUDA with mlx-lm's")

# MLX multiplies sorted rows of float32 in TF32 on CUDA.
LOSS, GRADIENTS, ROUNDING = (1e-3, 5e-3, 5e-3) if backend.computes_on_cuda() else (2e-6, 5e-5, 1e-5)
COMPILES = pytest.mark.slow("compiles another model")


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)


@pytest.mark.parametrize(  # on CUDA MLX has no product for Kimi's quantized projections
    ("name", "quantized"),
    [
        ("olmoe", False),
        ("olmoe", True),
        pytest.param("qwen3_next", False, marks=COMPILES),
        pytest.param("qwen3_next", True, marks=COMPILES),
        pytest.param("kimi_linear", False, marks=COMPILES),
    ],
)
def test_loss_and_gradients_are_those_of_mlx_lm(name, quantized, monkeypatch) -> None:
    model = build(name, quantized=quantized)
    expected = outcome(model, SUPERVISED_LOSS, batch())
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    assert len(find_expert_layers(model)) > 0
    with using_expert_mlps(model):
        found = outcome(model, SUPERVISED_LOSS, batch())
    require_near(found, expected, loss=LOSS, gradients=GRADIENTS)


@pytest.mark.parametrize("tokens", [9, 33])
def test_output_and_gradients_for_tokens_of_any_shape_with_few_and_with_many_rows(
    tokens: int, on_cuda: None
) -> None:
    model = build("olmoe", num_experts=8, num_experts_per_tok=3)
    mlp = model.layers[0].mlp.switch_mlp
    x = normal(1, tokens, 64, dtype=mx.float32)
    g = normal(1, tokens, 3, 64, dtype=mx.float32)
    chosen = mx.argsort(mx.random.uniform(shape=(1, tokens, 8)), axis=-1)[..., :3]
    assert (chosen.size < FEWEST_SORTED_ROWS) == (tokens == 9)

    def compute() -> list[mx.array]:
        outputs, gradients = mx.vjp(lambda x: mlp(x, chosen), [x], [g])
        return [*outputs, *gradients]

    expected = compute()
    mx.eval(expected)
    with using_expert_mlps(model):
        for found, wanted in zip(compute(), expected, strict=True):
            assert mx.allclose(found, wanted, rtol=ROUNDING, atol=ROUNDING)


def test_an_expert_that_no_token_uses_gets_no_gradient(on_cuda: None) -> None:
    model = build("olmoe", num_experts=8, num_experts_per_tok=2)
    mlp = model.layers[0].mlp.switch_mlp
    x, chosen = normal(64, 64, dtype=mx.float32), mx.arange(128).reshape(64, 2) % 3
    parameters = mlp.trainable_parameters()

    def total(values: Any) -> mx.array:
        mlp.update(values)
        total: mx.array = mlp(x, chosen).square().sum()
        return total

    with using_expert_mlps(model):
        gradients = mx.grad(total)(parameters)
    factors = dict(tree_flatten(gradients))
    assert len(factors) == 6
    for factor in factors.values():
        norms = factor.square().sum(axis=(1, 2))
        assert all(norms[:3].tolist())
        assert norms[3:].tolist() == [0.0] * 5


def test_repeated_rows_gather_their_gradients() -> None:
    x, g = normal(5, 3, dtype=mx.float32), normal(10, 3, dtype=mx.float32)
    order = mx.argsort(mx.array([2, 0, 1, 1, 0, 2, 2, 1, 0, 0]))
    expected = mx.vjp(lambda x: x[order // 2], [x], [g])
    found = mx.vjp(lambda x: take_rows(x, order, mx.argsort(order)), [x], [g])
    for one, other in zip(found, expected, strict=True):
        assert mx.allclose(one[0], other[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("limit", "options"),
    [(15, {}), (16, {"keys": ["mlp.switch_mlp.up_proj"]}), (16, {"keys": ["self_attn.q_proj"]})],
)
def test_layers_that_are_not_for_one_product_are_mlx_lm_s_within(
    limit: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """More columns than the limit, and layers without an adapter."""
    monkeypatch.setattr(expert_mlps, "MOST_COLUMNS", limit)
    model = build("olmoe", **options)
    expected = outcome(model, SUPERVISED_LOSS, batch())
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: True)
    count = len(find_expert_layers(model))
    assert count == (2 if "mlp.switch_mlp.up_proj" in str(options) else 0)
    with using_expert_mlps(model):
        found = outcome(model, SUPERVISED_LOSS, batch())
    require_near(found, expected, loss=LOSS, gradients=GRADIENTS)


def test_one_product_needs_one_dtype_and_no_dropout(on_cuda: None) -> None:
    layer = build("olmoe").layers[0].mlp.switch_mlp.up_proj
    assert multiplies_all_experts(layer, mx.float32)
    assert not multiplies_all_experts(layer, mx.bfloat16)
    assert find_expert_layers(build("olmoe", dropout=0.1)) == []


def test_nothing_changes_on_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: False)
    model = build("olmoe")
    with using_expert_mlps(model):
        assert type(model.layers[0].mlp.switch_mlp) is SwitchGLU


def test_modules_are_given_back_after_an_error(on_cuda: None) -> None:
    model = build("olmoe")
    mlp = model.layers[0].mlp.switch_mlp

    def check() -> None:
        assert type(mlp) is not SwitchGLU

    leave_by_error(using_expert_mlps(model), check)
    assert type(mlp) is SwitchGLU


def test_the_line_about_layers_counts_those_of_experts(on_cuda: None) -> None:
    model = build("olmoe")
    count = sum("lora_a" in module for _, module in model.named_modules())
    assert (
        f"{count} of {count} with an adapter use nested-tune's code"
        in CUDA_OPERATIONS.describe_layers(model)
    )
    assert "LoRASwitchLinear is mlx-lm's" in CUDA_OPERATIONS.describe_layers(
        build("olmoe", dropout=0.1)
    )
