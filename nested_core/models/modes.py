"""Evaluation mode while a block runs, and each module's own mode back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Have a whole model in evaluation mode: no dropout is drawn."""
    modes = [(module, module.training) for _, module in model.named_modules()]
    model.eval()
    try:
        yield
    finally:
        for module, was_training in modes:
            module._set_training_mode(was_training)
