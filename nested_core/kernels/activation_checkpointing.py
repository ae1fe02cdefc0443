"""Gradient checkpointing: a layer's activations are recomputed in the backward pass, not kept.

The layers' classes are changed only while a block runs; mlx-lm changes them for good, and
recomputes every layer of a class.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@contextmanager
def checkpointing_layers(layers: Sequence[nn.Module]) -> Iterator[None]:
    """In the block, recompute these layers in the backward pass, and no others of their classes."""
    classes: set[Any] = {type(layer) for layer in layers}
    originals = {layer_class: layer_class.__call__ for layer_class in classes}
    chosen = frozenset(map(id, layers))
    try:
        for layer_class, call in originals.items():
            layer_class.__call__ = _checkpoint_call_of_layers(call, chosen)
        yield
    finally:
        for layer_class, call in originals.items():
            layer_class.__call__ = call


def _checkpoint_call_of_layers(
    call: Callable[..., Any], chosen: frozenset[int]
) -> Callable[..., Any]:
    def checkpointed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The layer's own call; of a chosen layer only the inputs are kept."""
        if id(layer) not in chosen:
            return call(layer, *args, **kwargs)

        def with_parameters(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            layer.update(parameters)
            return call(layer, *args, **kwargs)

        return mx.checkpoint(with_parameters)(layer.trainable_parameters(), *args, **kwargs)

    return checkpointed
