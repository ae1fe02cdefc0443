"""The validation loss of an adapter, the same computation for every arm: mlx-lm's own forward pass.

It has a model of its own, so that a measured loop keeps what it compiled.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from benchmarks.time_to_loss.corpus import PROMPT_LENGTH, Corpus, value_positions
from benchmarks.time_to_loss.models import digest_of, load_with_lora

ROWS = 48  # examples at once


class Judge:
    """Looks at adapters of one base model on the validation tables."""

    def __init__(self, folder: Path) -> None:
        self.base = digest_of(folder)
        self._model = load_with_lora(folder, seed=0)
        flat: Any = tree_flatten(self._model.trainable_parameters())
        self._start = dict(flat)  # lora_b is 0: tensors that are not given change nothing
        self._batches = np.split(tables := Corpus().tables("valid"), len(tables) // ROWS)
        self._compiled = mx.compile(self._look)

    def look(self, params: Mapping[str, mx.array]) -> tuple[float, float]:
        """Mean loss a supervised token, in nats, and the share of values that are right."""
        given = self._start | dict(params)
        looks = [self._compiled(given, mx.array(batch)) for batch in self._batches]
        numbers = np.array([[value.item() for value in look] for look in looks])
        loss, right = numbers.mean(axis=0).tolist()
        return loss, right

    def _look(self, params: Any, tokens: mx.array) -> tuple[mx.array, mx.array]:
        self._model.update(tree_unflatten(list(params.items())))
        logits = self._model(tokens[:, :-1]).astype(mx.float32)
        targets, values = tokens[:, 1:], mx.array(value_positions() - 1)
        losses = nn.losses.cross_entropy(logits, targets)[:, PROMPT_LENGTH - 1 :]
        right = logits[:, values].argmax(axis=-1) == targets[:, values]
        return losses.mean(), right.mean()
