"""Both of this room's contexts around a model that trains, as one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn

from nested_core.kernels.optimized_model import ModelLayers
from nested_core.rooms.delta_nets.gated_delta import using_chunked_gated_delta_rule
from nested_core.rooms.delta_nets.short_convolution import using_short_convolutions


@contextmanager
def using_delta_nets(model: nn.Module) -> Iterator[None]:
    """Compute a model's gated delta nets in chunks, and short convolutions as sums."""
    with using_chunked_gated_delta_rule(model), using_short_convolutions(model):
        yield


LAYERS = ModelLayers(using_delta_nets)
