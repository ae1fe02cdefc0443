"""Recomputed layers with dropout: masks, losses and gradients as without recomputation."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from nested_core.backend import to_float
from nested_core.kernels.optimized_model import checkpointing_layers
from nested_core.models.parameters import (
    assign_parameters,
    read_parameters,
    reference_trainable_parameters,
    restoring_parameters,
)
from nested_core.optim.gradients import Flat
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
from tests.architectures import batch, build, largest_difference

SEED = 7


def gradients_of(
    model: nn.Module, *, recomputed: slice, keep_masks: bool = True, compiled: bool = True
) -> tuple[float, Flat, list[int]]:
    """Loss, gradients and random state after one micro-batch, as a train step computes them."""
    refs = reference_trainable_parameters(model)
    params = read_parameters(refs)
    loss = SUPERVISED_LOSS.for_model(model, refs)
    state: Any = mx.random.state

    def value_of(params: Flat, *arrays: mx.array) -> mx.array:
        assign_parameters(refs, params)
        return loss.function(model, *arrays)[0]

    gradient: Any = mx.value_and_grad(value_of)
    if compiled:
        gradient = mx.compile(gradient, inputs=[state], outputs=[state])
    layers = model.layers[recomputed]
    with checkpointing_layers(layers, keep_dropout_masks=keep_masks), restoring_parameters(refs):
        mx.random.seed(SEED)
        value, gradients = gradient(params, *loss.prepare_batch(batch()))
        mx.eval(value, gradients, state)
    return to_float(value), gradients, list(np.array(state[0]))


NONE, FIRST, ALL = slice(0, 0), slice(0, 1), slice(None)


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("recomputed", [FIRST, ALL], ids=["first", "all"])
def test_dropout_has_the_masks_and_gradients_that_it_has_without_recomputation(
    recomputed: slice, compiled: bool
) -> None:
    model = build("llama", dropout=0.4)
    model.train()
    value, expected, state = gradients_of(model, recomputed=NONE, compiled=compiled)
    again, found, state_after = gradients_of(model, recomputed=recomputed, compiled=compiled)
    assert again == pytest.approx(value, rel=1e-6)
    assert largest_difference(found, expected) < 1e-4
    assert state_after == state  # and what is drawn next is the same


def test_without_their_masks_recomputed_layers_draw_new_ones_as_in_mlx_lm() -> None:
    """`training.reference: mlx_lm` asks for it; and the check above can fail."""
    model = build("llama", dropout=0.4)
    model.train()
    _, expected, _ = gradients_of(model, recomputed=NONE, keep_masks=False)
    _, found, _ = gradients_of(model, recomputed=ALL, keep_masks=False)
    assert largest_difference(found, expected) > 0.1


def test_the_gradient_of_recomputed_layers_with_dropout_agrees_with_finite_differences() -> None:
    model = build("llama", dropout=0.4)
    model.train()
    refs = reference_trainable_parameters(model)
    params = read_parameters(refs)
    loss = SUPERVISED_LOSS.for_model(model, refs)
    arrays = loss.prepare_batch(batch())
    mx.random.seed(1)
    direction = {name: mx.random.normal(value.shape) for name, value in params.items()}

    def value_at(params: Flat) -> mx.array:
        mx.random.seed(SEED)
        assign_parameters(refs, params)
        return loss.function(model, *arrays)[0]

    with checkpointing_layers(model.layers), restoring_parameters(refs):
        gradients = mx.grad(value_at)(params)
        slope = sum(to_float((gradients[name] * direction[name]).sum()) for name in params)
        step = 1e-3
        ahead, behind = (
            to_float(
                value_at({name: params[name] + sign * step * direction[name] for name in params})
            )
            for sign in (1, -1)
        )
    assert (ahead - behind) / (2 * step) == pytest.approx(slope, rel=1e-2)


def test_layers_without_dropout_in_training_draw_nothing() -> None:
    model = build("llama", dropout=0.4)
    model.eval()
    state: Any = mx.random.state
    mx.random.seed(SEED)
    before = list(np.array(state[0]))
    with checkpointing_layers(model.layers):
        mx.eval(model(mx.array([[1, 2, 3]])))
    assert list(np.array(state[0])) == before
