"""Compute a model with layers that are faster than mlx-lm's, for the duration of a block.

Under gradient checkpointing a layer's activations are recomputed in the backward pass, not stored.
mlx-lm changes a layer's class for good and recomputes every layer of the class; here the class is
changed during a block only, and chosen layers are recomputed. A layer with dropout is recomputed
with the masks of its forward pass, because its random key is an argument. In mlx-lm it draws new
masks, so its gradient is not the loss's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core import seams
from nested_core.kernels.device_operations import device_operations
from nested_core.kernels.quantized_linear import multiplying_by_dequantized_weights

DROPOUT_CLASSES = (nn.Dropout, nn.Dropout2d, nn.Dropout3d)


@contextmanager
def checkpointing_layers(
    layers: Sequence[nn.Module], *, keep_dropout_masks: bool = True
) -> Iterator[None]:
    """Recompute the given layers' activations in the backward pass, during the block.

    Python looks up __call__ on the class, so the classes' method is replaced and then restored.

    Args:
        layers: the layers to recompute; others of their classes are not affected.
        keep_dropout_masks: whether dropout uses the same masks both times; mlx-lm's does not.
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
    call: Callable[..., object], chosen: frozenset[int], *, keep_dropout_masks: bool
) -> Callable[..., Any]:
    """Wrap a class's __call__ so that layers with an id in `chosen` are checkpointed.

    A checkpointed layer keeps no activations; the backward pass computes them again.

    call: the class's own __call__. chosen: ids of layers; others of the class are called as before.
    keep_dropout_masks: whether the second computation draws the same dropout masks as the first.
    """

    def checkpointed(layer: nn.Module, *args: object, **kwargs: object) -> Any:
        """Call the layer; for a chosen layer store only the inputs for the backward pass.

        mx.checkpoint gives gradients to a function's arguments alone, so the parameters are passed
        as one. With dropout the random key is an argument and a result, too.
        """
        if id(layer) not in chosen:
            return call(layer, *args, **kwargs)

        def with_parameters(parameters: Any, *args: object, **kwargs: object) -> Any:
            """Call the layer with its parameters as an argument, so that they get gradients."""
            layer.update(parameters)
            return call(layer, *args, **kwargs)

        def with_random_key(key: mx.array, parameters: Any, *args: object, **kwargs: object) -> Any:
            """Call the layer from a given random key; return its output and the next key.

            A recomputation from the same key draws the same dropout masks.
            """
            outer_key = _read_random_key()
            _set_random_key(key)
            try:
                return with_parameters(parameters, *args, **kwargs), _read_random_key()
            finally:
                _set_random_key(outer_key)

        parameters = layer.trainable_parameters()
        drops = keep_dropout_masks and any(
            isinstance(module, DROPOUT_CLASSES) and module.training and module._p_1 < 1
            for module in layer.modules()
        )
        if not drops:
            return mx.checkpoint(with_parameters)(parameters, *args, **kwargs)
        key = _read_random_key()
        output, next_key = mx.checkpoint(with_random_key)(key, parameters, *args, **kwargs)
        _set_random_key(next_key)
        return output

    return checkpointed


def _read_random_key() -> mx.array:
    """Return MLX's next random key, uint32 [2], without gradient."""
    state: Any = mx.random.state
    return mx.stop_gradient(mx.array(state[0]))


def _set_random_key(key: mx.array) -> None:
    """Set MLX's next random key."""
    state: Any = mx.random.state  # cannot be assigned itself
    state[0][:] = mx.stop_gradient(key)


@dataclass(frozen=True)
class ModelLayers:
    """A room's layers in place of a model's, on every device.

    using: returns a context in which the model computes with them.
    """

    using: Callable[[nn.Module], AbstractContextManager[None]]


@contextmanager
def using_optimized_layers(
    model: nn.Module, recomputed: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Compute a model with our layers for this device during the block; others are mlx-lm's.

    recomputed: the layers under gradient checkpointing, whose activations are computed again in the
        backward pass.
    """
    with ExitStack() as stack:
        stack.enter_context(checkpointing_layers(recomputed))
        stack.enter_context(device_operations().using_layers(model))
        stack.enter_context(multiplying_by_dequantized_weights(model))
        for layers in seams.load_all(ModelLayers):
            stack.enter_context(layers.using(model))
        yield
