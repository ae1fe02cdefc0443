"""What a run will need, said before its first step, and how many layers it recomputes for that.

It warns and refuses nothing: a forecast is no measurement.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.nn as nn

from nested_core import backend
from nested_core.config.schema import FineTuneConfig
from nested_core.models.parameters import ParameterRefs, read_parameters
from nested_core.optim.pytree import flatten
from nested_core.optim.single_clock import TieredOptimizer
from nested_core.training.batching import Method
from nested_core.training.distributed import World
from nested_core.training.loss.chunked import rows_at_once
from nested_core.training.loss.supervised import LossRule
from nested_core.training.memory import estimate
from nested_core.training.memory.estimate import (
    BatchShape,
    Device,
    Load,
    fewest_recomputed,
    peak_bytes,
)
from nested_core.training.memory.layers import arrays, item_bytes, read_layers, whole_bytes

LEAST_LENGTH = 32
MASTER_BYTES = 4  # float32


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes that a run needs and has, the layers it recomputes of those that train, and `ways`.

    Ways are settings that would fit, each with the bytes that are needed then; none where it fits.
    """

    needed: int
    room: int
    recomputed: int
    layers: int
    ways: Sequence[tuple[str, int]] = ()

    @property
    def fits(self) -> bool:
        """Whether there is room for what is needed."""
        return self.needed <= self.room

    def describe(self) -> str:
        """The need, the room, and what would fit, on one line."""
        text = f"memory: needs about {_gb(self.needed)} of {_gb(self.room)}"
        if 0 < self.recomputed < self.layers:
            text += f", with {self.recomputed} of {self.layers} layers recomputed"
        if self.fits:
            return text
        ways = [f"{setting} (about {_gb(needed)})" for setting, needed in self.ways]
        if self.ways[-1][1] > self.room:
            return f"{text}; not even {ways[-1]} would fit"
        return f"{text}; try {', '.join(ways[:-1])}{' or ' if ways[1:] else ''}{ways[-1]}"

    def chosen(self, model: nn.Module) -> Sequence[nn.Module]:
        """The layers to recompute: the lowest that train, whose turn comes last in the backward
        pass, when what the others kept is free again."""
        layers: Any = model.layers
        if self.recomputed in (0, self.layers):
            return layers if self.recomputed else ()
        first = len(layers) - self.layers
        found: Sequence[nn.Module] = layers[first : first + self.recomputed]
        return found


def _gb(size: float) -> str:
    gigabytes = size / 1e9
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{gigabytes:.2g} GB"


def plan_memory(
    config: FineTuneConfig,
    model: nn.Module,
    refs: ParameterRefs,
    optimizer: TieredOptimizer,
    rule: LossRule,
    method: Method,
    world: World,
) -> MemoryPlan:
    """Forecast a run whose adapter is attached and whose optimizer has its state.

    Layers are recomputed where `grad_checkpoint` asks for it: all of them, or under a
    `memory_limit_gb` only as many as the forecast needs to fit.
    """
    load = read_load(config, model, refs, optimizer, rule)
    limit = config.training.memory_limit_gb
    room = backend.memory_bytes() if limit is None else int(limit * 1e9)
    return plan(config, load, method.largest_batch(), device_of(config), room, world.size)


def plan(
    config: FineTuneConfig, load: Load, batch: BatchShape, device: Device, room: int, ranks: int = 1
) -> MemoryPlan:
    """The plan for a load, a batch of one of the ranks, a device and the room on it."""
    layers = len(load.trained_layers)
    is_free = config.training.memory_limit_gb is not None and config.training.reference is None
    wanted = fewest_recomputed(load, batch, device, room) if is_free else layers
    recomputed = wanted if config.grad_checkpoint else 0
    needed = peak_bytes(load, batch, device, recomputed)
    if needed <= room:
        return MemoryPlan(needed, room, recomputed, layers)
    ways = [] if config.grad_checkpoint else [("grad_checkpoint: true", batch, wanted)]
    ways += [(f"batch_size: {b.rows * ranks}", b, recomputed) for b in _fewer_rows(batch)]
    ways += [(f"max_seq_length: {b.length}", b, recomputed) for b in _shorter(batch)]
    found: dict[str, tuple[str, int]] = {}
    for setting, smaller, recomputes in ways:
        size = peak_bytes(load, smaller, device, recomputes)
        if size <= room:
            found.setdefault(setting.partition(":")[0], (setting, size))
    if not found:
        least = list(_fewer_rows(batch))[-1:] or [batch]
        size = peak_bytes(load, least[0], device, layers)
        setting = f"grad_checkpoint: true with batch_size: {least[0].rows * ranks}"
        found["both"] = setting, size
    return MemoryPlan(needed, room, recomputed, layers, tuple(found.values()))


def _fewer_rows(batch: BatchShape) -> Iterator[BatchShape]:
    rows = batch.rows // 2
    while rows >= 1:
        yield replace(batch, rows=rows, learnt=batch.learnt * rows // batch.rows)
        rows //= 2


def _shorter(batch: BatchShape) -> Iterator[BatchShape]:
    length = batch.length // 2
    while length >= LEAST_LENGTH:
        yield replace(batch, length=length, learnt=min(batch.learnt, batch.rows * length))
        length //= 2


def read_load(
    config: FineTuneConfig,
    model: nn.Module,
    refs: ParameterRefs,
    optimizer: TieredOptimizer,
    rule: LossRule,
) -> Load:
    """What a model, its adapter and its optimizer hold, and what a step of them keeps."""
    modules = dict(model.named_modules())
    own = read_parameters(refs).values()
    item = item_bytes(modules.values(), refs)
    factors = max(ref.dtype.size for ref in refs.values())
    words = [m.weight.shape[0] for m in modules.values() if _is_embedding(m)]
    vocabulary = max(words, default=0)
    return Load(
        weights=sum(value.nbytes for m in modules.values() for value in arrays(m).values()),
        trained=MASTER_BYTES * sum(value.size for value in own),
        moments=sum(value.nbytes for value in flatten(optimizer.state).values()),
        item=item,
        layers=read_layers(
            model,
            modules,
            draws=config.lora_parameters.dropout > 0,
            copies=max(1, factors // item),
        ),
        vocabulary=vocabulary,
        chunk=None if rule.value_only is None else rows_at_once(vocabulary),
        joins=config.fine_tune_type != "full",
        whole=max(map(whole_bytes, modules.values()), default=0),
    )


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, (nn.Embedding, nn.QuantizedEmbedding))


def device_of(config: FineTuneConfig) -> Device:
    """How the default device computes this configuration."""
    is_plain = config.training.reference is not None
    if backend.has_cuda():
        device = estimate.cuda(int(os.environ.get(backend.COMMIT_VARIABLE, "100")))
        return replace(device, remakes=False, wholes=0) if is_plain else device
    device = estimate.CPU if backend.device() == "cpu" else estimate.METAL
    return replace(device, scores=1, gates=2, wholes=0) if is_plain else device
