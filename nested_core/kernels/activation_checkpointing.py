"""Gradient checkpointing: a layer's activations are recomputed in the backward pass, not kept.

The classes of the layers are changed only while the block runs; mlx-lm changes them for good, and
recomputes every layer of theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn


@contextmanager
def recomputed(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Recompute the given layers in the backward pass, and no others of their classes."""
    kinds: set[Any] = {type(layer) for layer in layers}
    originals = {kind: kind.__call__ for kind in kinds}
    chosen = frozenset(map(id, layers))
    try:
        for kind, call in originals.items():
            kind.__call__ = _checkpointed(call, chosen)
        yield
    finally:
        for kind, call in originals.items():
            kind.__call__ = call


def _checkpointed(call: Callable[..., Any], chosen: frozenset[int]) -> Callable[..., Any]:
    def wrapped(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """A chosen layer's call, of which the inputs alone are kept for the backward pass."""
        if id(layer) not in chosen:
            return call(layer, *args, **kwargs)

        def inner(params: Any, *args: Any, **kwargs: Any) -> Any:
            layer.update(params)
            return call(layer, *args, **kwargs)

        return mx.checkpoint(inner)(layer.trainable_parameters(), *args, **kwargs)

    return wrapped
