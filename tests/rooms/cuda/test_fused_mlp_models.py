"""Models whose gated MLPs are one function: how they are optimized, and given back."""

from __future__ import annotations

import gc
from typing import Any

import mlx.core as mx
import pytest

from nested_core import backend
from nested_core.kernels.optimized_model import checkpointing_layers, using_optimized_layers
from nested_core.kernels.patching import replacing_call
from nested_core.models.parameters import reference_trainable_parameters
from nested_core.rooms.cuda import fused_mlp, gated_mlp, lora_add, rms_norm, rope, swiglu
from nested_core.rooms.cuda.call_tracing import CallTrace, find_gated_mlps, trace_calls
from nested_core.rooms.cuda.fused_mlp import find_fusable_mlps, using_fused_mlps
from nested_core.rooms.cuda.lora_linear import GROUP_ATTRIBUTE, OptimizedLoRALinear
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import (
    batch,
    build,
    compiled_as_written,
    kinds_of,
    largest_difference,
    leave_by_error,
    outcome,
    require_near,
    uncompiled,
)
from tests.left_out import slow_except

pytestmark = pytest.mark.slow("compares layers and models for CUDA with mlx-lm's")

PROJECTIONS = "gate_proj", "up_proj", "down_proj"


def in_bfloat16(name: str, **arguments: Any) -> Any:
    model = build(name, **{"rank": 8} | arguments)
    model.set_dtype(mx.bfloat16)
    return model


@pytest.fixture
def without_norms_and_ropes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine's other kernels disagree, and MLX's own operations are used."""
    monkeypatch.setattr(
        rms_norm.input_gradient_on_cuda, "agrees_with_reference", lambda width: False
    )
    monkeypatch.setattr(rope.rotate_on_cuda, "agrees_with_reference", lambda: False)
    monkeypatch.setattr(swiglu.swiglu_on_cuda, "agrees_with_reference", lambda: False)


def test_gradient_checkpointing_gives_the_same_gradients(kernel_calls: list[str]) -> None:
    model = in_bfloat16("llama")
    with using_fused_mlps(find_fusable_mlps(trace_calls(model))):
        expected = outcome(model, SUPERVISED_LOSS, batch())
        kept = kernel_calls.count("forward")
        kernel_calls.clear()
        with checkpointing_layers(model.layers):
            found = outcome(model, SUPERVISED_LOSS, batch())
    assert found.loss == expected.loss
    assert largest_difference(found.gradients, expected.gradients) == 0
    assert kernel_calls.count("forward") == kept + 2  # each of two layers once more


def test_checkpointed_layers_have_their_gated_mlps_found(kernel_calls: list[str]) -> None:
    model = in_bfloat16("llama")
    with checkpointing_layers(model.layers):
        assert len(find_fusable_mlps(trace_calls(model))) == 2


@pytest.mark.parametrize(
    "name", slow_except(["llama", "cohere"], "llama", reason="compiles a model's kernels")
)
@compiled_as_written
def test_compiled_equals_uncompiled_to_the_bit(name: str, kernel_calls: list[str]) -> None:
    model = in_bfloat16(name)
    with using_fused_mlps(find_fusable_mlps(trace_calls(model))):
        plain = outcome(model, SUPERVISED_LOSS, batch(), compiled=uncompiled)
        compiled = outcome(model, SUPERVISED_LOSS, batch())
    assert "backward" in kernel_calls
    assert compiled.loss == plain.loss
    assert compiled.value == plain.value
    for key, gradient in plain.gradients.items():
        again = compiled.gradients[key]
        assert mx.array_equal(gradient.view(mx.uint16), again.view(mx.uint16)).item()


@pytest.mark.parametrize("chosen", [*PROJECTIONS, "layers.1.", "self_attn", "gate_proj.lora_b"])
def test_gradients_of_some_factors_alone_are_those_among_all(chosen, monkeypatch) -> None:
    monkeypatch.setattr(fused_mlp, "can_use_lora_kernels", lambda x, factors: True)
    model = build("llama")
    everything = reference_trainable_parameters(model)
    refs = {name: ref for name, ref in everything.items() if chosen in name}
    assert 0 < len(refs) < len(everything)
    expected = outcome(model, SUPERVISED_LOSS, batch(), refs=refs)
    with using_fused_mlps(find_gated_mlps(trace_calls(model))):
        found = outcome(model, SUPERVISED_LOSS, batch(), refs=refs)
    assert found.gradients.keys() == refs.keys()
    assert largest_difference(found.gradients, expected.gradients) < 3e-5


def test_an_adapter_on_mlps_alone_is_taken(kernel_calls: list[str]) -> None:
    model = in_bfloat16("llama", keys=[f"mlp.{key}" for key in PROJECTIONS])
    expected = outcome(model, SUPERVISED_LOSS, batch())
    with using_fused_mlps(find_fusable_mlps(trace_calls(model))):
        found = outcome(model, SUPERVISED_LOSS, batch())
    assert kernel_calls.count("backward") == 2
    assert largest_difference(found.gradients, expected.gradients) < 0.05


@pytest.mark.usefixtures("without_norms_and_ropes")
def test_modules_are_given_back_after_an_error(kernel_calls: list[str]) -> None:
    model = in_bfloat16("llama")
    before = kinds_of(model)

    def are_others() -> None:
        assert kinds_of(model).keys() == before.keys()
        assert type(model.layers[0].mlp) is not before["model.layers.0.mlp"][1]
        assert type(model.layers[0].mlp.gate_proj) is OptimizedLoRALinear

    leave_by_error(using_optimized_layers(model), are_others)
    assert kinds_of(model) == before
    assert kernel_calls == []


@pytest.mark.usefixtures("kernel_calls", "without_norms_and_ropes")
def test_a_model_is_traced_once_and_nothing_of_it_is_kept_while_it_is_optimized() -> None:
    model = in_bfloat16("llama")
    calls: list[Any] = []
    own = type(model).__call__

    def counted(*args: Any) -> Any:
        calls.append(args)
        return own(model, *args)

    with replacing_call(model, counted), using_optimized_layers(model):
        assert len(calls) == 1
        assert not any(isinstance(each, CallTrace) for each in gc.get_objects())


@pytest.mark.usefixtures("kernel_calls", "without_norms_and_ropes")
@pytest.mark.parametrize(("name", "together"), [("llama", 3), ("qwen2", 3), ("cohere", 3)])
def test_a_fused_mlps_layers_share_with_no_others_in_an_optimized_model(name, together) -> None:
    model = in_bfloat16(name)
    with using_optimized_layers(model):
        for layer in model.layers:
            groups = [vars(layer.mlp[key]).get(GROUP_ATTRIBUTE) for key in PROJECTIONS]
            gate, up = layer.mlp.gate_proj, layer.mlp.up_proj
            assert groups[0] is groups[1]
            assert groups[0]._layers == [gate, up]
            assert groups[2] is None
            shared = vars(layer.self_attn.q_proj)[GROUP_ATTRIBUTE]
            assert len(shared._layers) == together
    assert not any(GROUP_ATTRIBUTE in vars(module) for _, module in model.named_modules())


@pytest.mark.usefixtures("kernel_calls", "without_norms_and_ropes")
@pytest.mark.parametrize("unlike", ["rank", "dtype"])
def test_the_gate_and_up_of_a_fused_mlp_share_nothing_where_they_are_not_alike(unlike: str) -> None:
    model = in_bfloat16("llama")
    for layer in model.layers:
        up = layer.mlp.up_proj
        if unlike == "rank":
            up.lora_a = mx.zeros((64, 16), mx.bfloat16)
            up.lora_b = mx.zeros((16, 128), mx.bfloat16)
        else:
            up.lora_b = up.lora_b.astype(mx.float32)
    before = kinds_of(model)
    with using_optimized_layers(model):
        assert kinds_of(model)["model.layers.0.mlp"] != before["model.layers.0.mlp"]
        for layer in model.layers:
            assert not any(GROUP_ATTRIBUTE in vars(layer.mlp[key]) for key in PROJECTIONS)


@pytest.mark.usefixtures("kernel_calls", "without_norms_and_ropes")
def test_where_its_kernels_disagree_a_gated_mlp_shares_its_input_as_other_layers_do(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = in_bfloat16("llama")
    before = kinds_of(model)
    monkeypatch.setattr(
        gated_mlp.gated_product_on_cuda, "agrees_with_reference", lambda tiles: False
    )
    with using_optimized_layers(model):
        inside = kinds_of(model)
        assert GROUP_ATTRIBUTE in vars(model.layers[0].mlp.gate_proj)
    assert inside["model.layers.0.mlp"] == before["model.layers.0.mlp"]


@pytest.mark.usefixtures("without_norms_and_ropes")
@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize(
    "name",
    slow_except(
        ["llama", "qwen2", "granite", "cohere"], "llama", "qwen2", reason="compiles kernels"
    ),
)
def test_an_optimized_model_gives_mlx_lms_gradients(name, recomputes, kernel_calls) -> None:
    model = in_bfloat16(name)
    expected = outcome(model, SUPERVISED_LOSS, batch())
    with using_optimized_layers(model, model.layers if recomputes else ()):
        found = outcome(model, SUPERVISED_LOSS, batch())
    assert set(kernel_calls) == {
        *("low_rank_sums", "forward", "backward", "project_to_rank"),
        *("factor_gradients", "concatenate"),
    }
    require_near(found, expected, loss=2e-3, gradients=0.08)


@pytest.mark.parametrize("rank", [4, 12, 72])
def test_mlps_of_ranks_that_no_kernel_takes_are_not_fused(rank, kernel_calls) -> None:
    assert find_fusable_mlps(trace_calls(build("llama", rank=rank))) == []
    assert kernel_calls == []


def test_without_cuda_no_mlp_is_fused(kernel_calls, monkeypatch) -> None:
    model = build("llama", rank=8)
    assert len(find_fusable_mlps(trace_calls(model))) == 2
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: False)
    assert find_fusable_mlps(trace_calls(model)) == []


def test_all_kernels_of_an_mlp_are_checked_before_it_is_fused(kernel_calls, monkeypatch) -> None:
    """Forwards the ranks of gate and up choose a kernel, backwards that of down too."""
    model = build("llama", rank=8, keys=[f"mlp.{key}" for key in PROJECTIONS])
    for layer in model.layers:
        layer.mlp.down_proj.lora_a = mx.zeros((128, 40))
        layer.mlp.down_proj.lora_b = mx.zeros((40, 64))
    for bad, count in ((1, 0), (6, 0), (2, 2), (8, 2)):
        for kernel in (gated_mlp.gated_product_on_cuda, gated_mlp.gated_gradients_on_cuda):
            with monkeypatch.context() as patch:
                patch.setattr(kernel, "agrees_with_reference", lambda tiles, bad=bad: tiles != bad)
                assert len(find_fusable_mlps(trace_calls(model))) == count


def test_kernels_are_compiled_for_the_ranks_of_layers_and_for_gates_and_ups_together(
    kernel_calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[int] = []
    monkeypatch.setattr(lora_add.low_rank_sums_on_cuda, "agrees_with_reference", checked.append)
    find_fusable_mlps(trace_calls(build("llama", rank=16)))
    assert set(checked) == {2, 4}
