"""Models with gated delta nets beside attention: LoRA on both, as mlx-lm computes them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from nested_core.backend import to_float
from nested_core.kernels.optimized_model import using_optimized_layers
from nested_core.models.parameters import (
    assign_parameters,
    read_parameters,
    reference_trainable_parameters,
    restoring_parameters,
)
from nested_core.rooms.delta_nets import gated_delta
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import HYBRIDS, batch, build, largest_difference, outcome
from tests.left_out import slow_except

DELTA_NET_KEYS = {  # linear layers of a delta net, all of which mlx-lm's default keys take
    "qwen3_next": {"in_proj_qkvz", "in_proj_ba", "out_proj"},
    "qwen3_5": {"in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj"},
    "olmo_hybrid": {"q_proj", "k_proj", "v_proj", "a_proj", "b_proj", "g_proj", "o_proj"},
    "kimi_linear": {"q_proj", "k_proj", "v_proj", "f_a_proj", "f_b_proj", "b_proj", "g_a_proj"}
    | {"g_b_proj", "o_proj"},
    "kimi_k3": {"qkv_proj", "f_a_proj", "f_b_proj", "b_proj", "g_a_proj", "g_b_proj", "o_proj"},
    "bailing_moe_v3": {"q_proj", "k_proj", "v_proj", "f_proj", "b_proj", "g_proj", "o_proj"},
}
FAMILIES = slow_except(sorted(HYBRIDS), "qwen3_next", reason="computes another model")


def uncompiled(function: Any) -> Any:
    """mlx-lm's loop over tokens takes g++ a minute to compile."""
    return function


@pytest.mark.parametrize("name", sorted(HYBRIDS))
def test_mlx_lms_default_keys_train_every_linear_layer_of_a_delta_net(name: str) -> None:
    names: list[str] = list(dict(tree_flatten(build(name).trainable_parameters())))
    first = [each.rpartition("layers.0.")[2].split(".") for each in names if "layers.0." in each]
    found = {parts[1] for parts in first if parts[0] in ("linear_attn", "self_attn", "attention")}
    assert found == DELTA_NET_KEYS[name]


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_and_gradients_are_those_of_mlx_lms_loop(name: str) -> None:
    model = build(name)
    model.train()
    given = batch(rows=2, width=37)
    code = [import_module(type(layer).__module__) for layer in model.layers]
    expected = outcome(model, SUPERVISED_LOSS, given, compiled=uncompiled)
    with using_optimized_layers(model):
        assert any(
            getattr(each, gated_delta.PATCHED_FUNCTION_NAME) is gated_delta.gated_delta_update
            for each in code
        )
        found = outcome(model, SUPERVISED_LOSS, given)
    assert found.loss == pytest.approx(expected.loss, rel=2e-6)
    assert largest_difference(found.gradients, expected.gradients) < 3e-5


@pytest.mark.parametrize("name", ["qwen3_5", "qwen3_next"])
def test_gradients_are_the_slopes_of_the_loss(name: str) -> None:
    """Along random directions of all factors, those of the delta net alone, and attention's.

    Each token has all four experts: a choice of experts is where a loss has no slope.
    """
    model = build(name, num_experts_per_tok=4)
    model.train()
    refs = reference_trainable_parameters(model)
    params = read_parameters(refs)
    arrays = SUPERVISED_LOSS.prepare_batch(batch(rows=2, width=37))

    @mx.compile
    def value_and_gradients(params: Any) -> Any:
        def mean_loss(params: Any) -> mx.array:
            assign_parameters(refs, params)
            total, count = SUPERVISED_LOSS.function(model, *arrays)
            return total / count

        return mx.value_and_grad(mean_loss)(params)

    with restoring_parameters(refs), using_optimized_layers(model):
        _, gradients = value_and_gradients(params)
        for part in ("", ".linear_attn.", ".self_attn."):
            mx.random.seed(0)
            direction = {
                key: mx.random.normal(value.shape) * (part in key) for key, value in params.items()
            }
            step = 2e-3
            ends = [
                to_float(
                    value_and_gradients(
                        {k: v + sign * step * direction[k] for k, v in params.items()}
                    )[0]
                )
                for sign in (1, -1)
            ]
            slope = sum(to_float((gradients[k] * direction[k]).sum()) for k in params)
            assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=0.02)


@pytest.mark.parametrize("name", FAMILIES)
def test_padding_at_a_rows_end_changes_neither_loss_nor_gradients(name: str) -> None:
    """The longer rows reach into another chunk; the padding is another token in each."""
    model = build(name)
    model.train()
    tokens, target_mask = batch(rows=2, width=23)
    with using_optimized_layers(model):
        expected = outcome(model, SUPERVISED_LOSS, (tokens, target_mask), compiled=uncompiled)
        for padding in (0, 7):
            longer = (
                np.pad(tokens, ((0, 0), (0, 30)), constant_values=padding),
                np.pad(target_mask, ((0, 0), (0, 30))),
            )
            found = outcome(model, SUPERVISED_LOSS, longer, compiled=uncompiled)
            assert found.count == expected.count
            assert found.loss == pytest.approx(expected.loss, rel=2e-6)
            assert largest_difference(found.gradients, expected.gradients) < 3e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_the_loss_at_supervised_positions_is_that_of_full_logits(name: str) -> None:
    model = build(name)
    given = batch(rows=2, width=21)
    chunked = SUPERVISED_LOSS.for_model(model, reference_trainable_parameters(model))
    with using_optimized_layers(model):
        expected, found = (
            outcome(model, loss, given, compiled=uncompiled) for loss in (SUPERVISED_LOSS, chunked)
        )
    assert found.loss == pytest.approx(expected.loss, rel=2e-6)
    assert largest_difference(found.gradients, expected.gradients) < 3e-5


@contextmanager
def counting_chunked_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    lengths: list[int] = []
    own = gated_delta.compute_on_this_device

    def counted(q: mx.array, *arrays: mx.array) -> Any:
        lengths.append(q.shape[1])
        return own(q, *arrays)

    with monkeypatch.context() as patch:
        patch.setattr(gated_delta, "compute_on_this_device", counted)
        yield lengths


def test_generation_goes_on_by_mlx_lms_own_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a model in training its first pass over a prompt is in chunks, and no other."""
    model: nn.Module = build("qwen3_5")
    model.eval()
    tokens = mx.array(batch(rows=1, width=20)[0])

    def answer() -> mx.array:
        cache = model.make_cache()
        logits = [model(tokens, cache=cache)[:, -1]]
        for token in (3, 5, 7):
            logits.append(model(mx.array([[token]]), cache=cache)[:, -1])
        return mx.stack(logits)

    expected = answer()
    with counting_chunked_calls(monkeypatch) as lengths, using_optimized_layers(model):
        found = answer()
    assert lengths == [21]
    assert mx.allclose(found, expected, rtol=1e-4, atol=1e-4).item()
    assert mx.array_equal(answer(), expected).item()
