"""Gradient checkpointing: a layer's activations are recomputed in the backward pass, not kept.

The layers' classes are changed only while a block runs; mlx-lm changes them for good, and
recomputes every layer of a class. A layer with dropout is recomputed with the masks of its forward
pass: its random key is an argument. In mlx-lm it draws new masks, and its gradient is not the
loss's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn

DROPOUT_CLASSES = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


@contextmanager
def checkpointing_layers(
    layers: Sequence[nn.Module], *, keep_dropout_masks: bool = True
) -> Iterator[None]:
    """In the block, recompute these layers in the backward pass, and no others of their classes.

    Args:
        layers: the layers to recompute.
        keep_dropout_masks: whether dropout has the same masks both times; mlx-lm's has not.
    """
    classes: set[Any] = {type(layer) for layer in layers}
    originals = {layer_class: layer_class.__call__ for layer_class in classes}
    chosen = frozenset(map(id, layers))
    try:
        for layer_class, call in originals.items():
            layer_class.__call__ = _checkpoint_call_of_layers(
                call, chosen, keep_dropout_masks=keep_dropout_masks
            )
        yield
    finally:
        for layer_class, call in originals.items():
            layer_class.__call__ = call


def _checkpoint_call_of_layers(
    call: Callable[..., Any], chosen: frozenset[int], *, keep_dropout_masks: bool
) -> Callable[..., Any]:
    def checkpointed(layer: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The layer's own call; of a chosen layer only the inputs are kept."""
        if id(layer) not in chosen:
            return call(layer, *args, **kwargs)

        def with_parameters(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            """The layer's own call; its parameters are an argument, so that they get gradients."""
            layer.update(parameters)
            return call(layer, *args, **kwargs)

        def with_random_key(key: mx.array, parameters: Any, *args: Any, **kwargs: Any) -> Any:
            """The same from a random key, and the next key: recomputed, its masks are the same."""
            before = _read_random_key()
            _set_random_key(key)
            try:
                return with_parameters(parameters, *args, **kwargs), _read_random_key()
            finally:
                _set_random_key(before)

        parameters = layer.trainable_parameters()
        if not (keep_dropout_masks and _applies_dropout(layer)):
            return mx.checkpoint(with_parameters)(parameters, *args, **kwargs)
        key = _read_random_key()
        output, next_key = mx.checkpoint(with_random_key)(key, parameters, *args, **kwargs)
        _set_random_key(next_key)
        return output

    return checkpointed


def _applies_dropout(layer: nn.Module) -> bool:
    return any(
        isinstance(module, DROPOUT_CLASSES) and module.training and module._p_1 < 1
        for module in layer.modules()
    )


def _read_random_key() -> mx.array:
    """The key that MLX draws from next, uint32 [2], which no gradient is taken of."""
    state: Any = mx.random.state
    return mx.stop_gradient(mx.array(state[0]))


def _set_random_key(key: mx.array) -> None:
    state: Any = mx.random.state  # cannot be assigned itself
    state[0][:] = mx.stop_gradient(key)
