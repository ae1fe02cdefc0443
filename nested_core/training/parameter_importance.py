"""Measure parameter importance: the mean squared gradient norm over a few batches.

Weights, optimizer and random state do not change.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from nested_core.backend import to_float
from nested_core.config.schema import FineTuneConfig
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.models.parameters import (
    assign_parameters,
    in_evaluation_mode,
    read_parameters,
    reference_trainable_parameters,
    restoring_parameters,
)
from nested_core.optim.gradients import Flat
from nested_core.training.loss.cross_entropy import supervised_loss
from nested_core.training.schedule.step_schedule import make_batch_order


def measure_parameter_importance(
    config: FineTuneConfig, model: nn.Module, split: TokenizedSplit
) -> dict[str, float]:
    """Return each parameter's squared L2 gradient norm, averaged over batches.

    The gradient is that of the mean loss of a batch; `nested.probe_batches` is the number of
    batches. Nothing is trained. Parameters with larger gradients get a faster tier.
    """
    parameters = reference_trainable_parameters(model)
    values = read_parameters(parameters)
    batch_order = make_batch_order(config, split)

    def mean_loss(values: Flat, tokens: mx.array, target_mask: mx.array) -> mx.array:
        """Return the mean loss per supervised token with the given parameter values."""
        assign_parameters(parameters, values)
        loss, count = supervised_loss(model, tokens, target_mask)
        return loss / count

    totals = dict.fromkeys(values, 0.0)
    with in_evaluation_mode(model), restoring_parameters(parameters):
        for index in range(config.nested.probe_batches):
            tokens, target_mask = batch_order.arrays(split, index)
            gradients = mx.grad(mean_loss)(values, mx.array(tokens), mx.array(target_mask))
            for name, gradient in gradients.items():
                totals[name] += to_float(mx.square(gradient).sum())
    return {name: total / config.nested.probe_batches for name, total in totals.items()}
