"""How much each parameter matters: its mean squared gradient norm over a few batches.

The probe changes nothing: weights, optimizer and random state are what they were.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from nested_core.backend import to_float
from nested_core.config.schema import FineTuneConfig
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.models.parameters import (
    assign_parameters,
    evaluation_mode,
    read_parameters,
    restoring_parameters,
    trainable_refs,
)
from nested_core.optim.gradients import Flat
from nested_core.training.batching import plan_batches
from nested_core.training.loss.supervised import supervised_loss


def parameter_importance(
    config: FineTuneConfig, model: nn.Module, split: TokenizedSplit
) -> dict[str, float]:
    """Mean over `nested.probe_batches` batches of the squared L2 norm of each leaf's gradient."""
    refs = trainable_refs(model)
    params = read_parameters(refs)
    plan = plan_batches(config, split)

    def mean_loss(values: Flat, tokens: mx.array, mask: mx.array) -> mx.array:
        assign_parameters(refs, values)
        loss, count = supervised_loss(model, tokens, mask)
        return loss / count

    totals = {name: 0.0 for name in params}
    with evaluation_mode(model), restoring_parameters(refs):
        for index in range(config.nested.probe_batches):
            tokens, mask = plan.arrays(split, index)
            gradients = mx.grad(mean_loss)(params, mx.array(tokens), mx.array(mask))
            for name, gradient in gradients.items():
                totals[name] += to_float(mx.square(gradient).sum())
    return {name: total / config.nested.probe_batches for name, total in totals.items()}
