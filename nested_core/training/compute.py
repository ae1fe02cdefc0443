"""How a model is computed while it trains or is evaluated: everything that is swapped, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn

from nested_core.config import FineTuneConfig
from nested_core.kernels.swiglu import fused_swiglu
from nested_core.training.low_rank import low_rank, shared_inputs
from nested_core.training.recompute import recomputed


@contextmanager
def prepared(config: FineTuneConfig, model: nn.Module) -> Iterator[None]:
    """Have a model computed our way; under `training.reference`, as mlx_lm.lora computes it."""
    with recomputed(model.layers if config.grad_checkpoint else []):
        if config.training.reference is not None:
            yield
            return
        with low_rank(model, shared_inputs(model)), fused_swiglu(model):
            yield
