"""Whether a run fits in memory, said before its first step, and how many layers it recomputes.

A plan warns and never refuses, since it is a prediction and not a measurement.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import mlx.core as mx

from nested_core import backend, seams
from nested_core.rooms.memory import peak_estimate
from nested_core.rooms.memory.model_footprint import compute_footprint
from nested_core.rooms.memory.peak_estimate import (
    DeviceProfile,
    ModelFootprint,
    estimate_peak_bytes,
    fewest_recomputed_layers,
)
from nested_core.training.loss.loss_interface import BatchShape
from nested_core.training.memory_plan import MemoryForecaster, MemoryPlan
from nested_core.training.training_setup import TrainingSetup

if TYPE_CHECKING:
    from nested_core.config.schema import FineTuneConfig

SHORTEST_SUGGESTED_LENGTH = 32  # tokens
KEPT_BUFFERS_OF_A_STEP = 0.5  # freed buffers kept, of what a step needs


@dataclass(frozen=True)
class MemoryForecast(MemoryPlan):
    """A plan with its predicted peak, and what would fit.

    suggestions: (setting, predicted peak) pairs that would fit; empty if the run fits already.
    """

    needed: int
    suggestions: Sequence[tuple[str, int]] = ()

    def describe(self) -> str:
        """Return the predicted peak, the capacity, and the settings that would fit, on one line."""
        needed, capacity = _format_gigabytes(self.needed), _format_gigabytes(self.capacity)
        text = f"memory: needs about {needed} of {capacity}"
        if 0 < self.recomputed < self.layers:
            text += f", with {self.recomputed} of {self.layers} layers recomputed"
        if self.fits:
            return text
        *others, last = [f"{n} (about {_format_gigabytes(peak)})" for n, peak in self.suggestions]
        if self.suggestions[-1][1] > self.capacity:
            return f"{text}; not even {last} would fit"
        return f"{text}; try {', '.join(others)} or {last}" if others else f"{text}; try {last}"


def _format_gigabytes(size: float) -> str:
    gigabytes = size / 1e9
    return f"{gigabytes:.1f} GB" if gigabytes >= 1 else f"{gigabytes:.2g} GB"


def forecast_memory(setup: TrainingSetup, capacity: int) -> MemoryForecast:
    """Predict the peak of a run on the default device, of which it may take `capacity` bytes.

    Bounds the freed buffers that MLX keeps in this process, where that is due.
    """
    config = setup.config
    footprint = compute_footprint(
        config, setup.model, setup.parameters, setup.optimizer, setup.loss_fn
    )
    plan = plan_memory_for_device(
        config,
        footprint,
        setup.step_schedule.largest_batch(),
        device_profile_for(config),
        capacity,
        processes=setup.world.size,
    )
    if not config.clear_cache_threshold:
        limit_kept_buffers(footprint, plan.needed)
    return plan


def plan_memory_for_device(
    config: FineTuneConfig,
    footprint: ModelFootprint,
    batch: BatchShape,
    device: DeviceProfile,
    capacity: int,
    *,
    processes: int = 1,
) -> MemoryForecast:
    """Plan for a model, a batch of one process, a device and its memory in bytes.

    Layers are recomputed under `grad_checkpoint`: all of them, or under a `memory_limit_gb` only as
    many as are needed to fit.
    """
    layers = len(footprint.layers_of_backward_pass)
    wanted = layers
    if config.training.memory_limit_gb is not None and config.training.reference is None:
        wanted = fewest_recomputed_layers(footprint, batch, device, capacity)
    recomputed = wanted if config.grad_checkpoint else 0
    needed = estimate_peak_bytes(footprint, batch, device, recomputed)
    if needed <= capacity:
        return MemoryForecast(needed, capacity, recomputed, layers)

    fewer_rows, shorter = list(_batches_of_fewer_rows(batch)), list(_shorter_batches(batch))
    alternatives = [
        [(f"batch_size: {each.rows * processes}", each, recomputed) for each in fewer_rows],
        [(f"max_seq_length: {each.length}", each, recomputed) for each in shorter],
    ]
    if not config.grad_checkpoint:
        alternatives.insert(0, [("grad_checkpoint: true", batch, wanted)])
    suggestions = []
    for settings in alternatives:  # of each key, the first value that fits
        peaks = ((n, estimate_peak_bytes(footprint, b, device, count)) for n, b, count in settings)
        fitting = next((each for each in peaks if each[1] <= capacity), None)
        if fitting is not None:
            suggestions.append(fitting)
    if not suggestions:
        smallest = fewer_rows[-1] if fewer_rows else batch
        setting = f"grad_checkpoint: true with batch_size: {smallest.rows * processes}"
        suggestions.append((setting, estimate_peak_bytes(footprint, smallest, device, layers)))
    return MemoryForecast(needed, capacity, recomputed, layers, suggestions=tuple(suggestions))


def limit_kept_buffers(footprint: ModelFootprint, needed: int) -> None:
    """Bound the freed buffers that MLX keeps on CUDA, which it never gives back by itself.

    Kept is half of what the widest step needs: of `needed`, the forecast of the run's peak in
    bytes, without the `footprint.resident` that stay from step to step. Small models have their
    bound since they were loaded (`backend.prepare_for_model_size`).
    """
    operations = os.environ.get(backend.OPERATIONS_PER_COMMIT_VARIABLE)
    of_small = backend.OPERATIONS_PER_COMMIT_BY_MODEL_SIZE[backend.SMALL_MODEL]
    if backend.computes_on_cuda() and operations not in (None, of_small):
        mx.set_cache_limit(int(KEPT_BUFFERS_OF_A_STEP * (needed - footprint.resident)))


def _batches_of_fewer_rows(batch: BatchShape) -> Iterator[BatchShape]:
    rows = batch.rows // 2
    while rows >= 1:
        yield replace(batch, rows=rows, target_tokens=batch.target_tokens * rows // batch.rows)
        rows //= 2


def _shorter_batches(batch: BatchShape) -> Iterator[BatchShape]:
    length = batch.length // 2
    while length >= SHORTEST_SUGGESTED_LENGTH:
        target_tokens = min(batch.target_tokens, batch.rows * length)
        yield replace(batch, length=length, target_tokens=target_tokens)
        length //= 2


def device_profile_for(config: FineTuneConfig) -> DeviceProfile:
    """Return the profile of the default device, without our kernels under `training.reference`."""
    is_plain = config.training.reference is not None
    if backend.computes_on_cuda():
        device = peak_estimate.cuda_profile(
            int(os.environ.get(backend.OPERATIONS_PER_COMMIT_VARIABLE, "100"))
        )
        if is_plain or not seams.is_there("cuda"):
            device = replace(device, recomputes_mlp_product=False, attention_multiple=1)
    elif backend.device() == "cpu":
        device = peak_estimate.CPU_PROFILE
    else:
        device = peak_estimate.METAL_PROFILE
    return replace(device, dequantized_weights=0) if is_plain else device


FORECAST = MemoryForecaster(forecast_memory)
