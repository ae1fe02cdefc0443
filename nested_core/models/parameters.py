"""The places of trainable leaves in a model: read, filled, and given back as they were."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import mlx.nn as nn

from nested_core.models.lora import adapter_dtype, trainable

if TYPE_CHECKING:
    from nested_core.config.schema import FineTuneConfig


class Slot(NamedTuple):
    """Where a trainable leaf lives, its module and its key there, and the dtype it computes in."""

    module: nn.Module
    key: str
    dtype: mx.Dtype


Slots = dict[str, Slot]


def adapter_slots(
    model: nn.Module, *, masters: bool = False, dtype: mx.Dtype | None = None
) -> Slots:
    """The places of the trainable leaves, by dotted name.

    The leaves compute in `dtype`, or else in their own; what the model holds is their master. With
    `masters` the leaves themselves become float32 first, and compute in the dtype they had.
    """
    modules = dict(model.named_modules())
    slots = {}
    for name, value in trainable(model).items():
        parent, _, key = name.rpartition(".")
        slots[name] = Slot(modules[parent], key, dtype or value.dtype)
        if masters:
            modules[parent][key] = value.astype(mx.float32)
    return slots


def configured_slots(config: FineTuneConfig, model: nn.Module) -> Slots:
    """The places as a configuration has them computed: their dtype, and masters under `full`."""
    dtype = adapter_dtype(config, model)
    return adapter_slots(model, masters=config.has_masters, dtype=dtype)


def read_slots(slots: Slots) -> dict[str, mx.array]:
    """The arrays that the model holds now, by dotted name."""
    return {name: slot.module[slot.key] for name, slot in slots.items()}


def put(slots: Slots, values: Mapping[str, mx.array]) -> None:
    """Place arrays, tracers included, in the model, in the dtype that it computes in."""
    for name, value in values.items():
        module, key, dtype = slots[name]
        module[key] = value.astype(dtype)


@contextmanager
def borrowed(slots: Slots) -> Iterator[None]:
    """Give the model its own leaves back, whatever the block puts in their place."""
    held = read_slots(slots)
    try:
        yield
    finally:
        for name, value in held.items():
            slots[name].module[slots[name].key] = value
