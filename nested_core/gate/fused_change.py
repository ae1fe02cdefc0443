"""Whether the change survives fusing: fusing into a quantized base can round it away.

Each module is fused as mlx_lm.fuse does, with the initial and with the trained adapter, and the
difference of the two weights is compared with the difference computed in float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core.backend import to_float
from nested_core.gate.verdict import Reason
from nested_core.models.lora_attachment import load_adapter_tensors

MIN_SHARE = 0.5  # of the whole change
MIN_SHARE_OF_A_MODULE = 0.1
Parameters = Mapping[str, mx.array]


@dataclass(frozen=True)
class FusedChange:
    """A module's change: its squared norm, and the fused change's inner product with it."""

    squared_norm: float
    inner_product: float

    @property
    def share(self) -> float:
        """1 if the fused module carries all of the change, 0 if none of it."""
        return self.inner_product / self.squared_norm if self.squared_norm else 0.0


def judge_fused(
    model: nn.Module, before: Parameters, after: Parameters
) -> tuple[dict[str, Any], list[Reason]]:
    """The share of the change that is left once it is fused, and a reason if that is too little.

    `model` is the base as stored with an adapter attached; its modules are float32 afterwards.
    """
    changes = {
        name: _measure(model, module, before, after)
        for name, module in model.named_modules()
        if hasattr(module, "fuse")
    }
    squared_norm = sum(change.squared_norm for change in changes.values())
    inner_product = sum(change.inner_product for change in changes.values())
    whole = FusedChange(squared_norm, inner_product)
    erased = sorted(n for n, change in changes.items() if change.share < MIN_SHARE_OF_A_MODULE)
    evidence = {"modules": len(changes), "carried_share": whole.share, "erased_modules": erased}
    if not erased and whole.share >= MIN_SHARE:
        return evidence, []
    message = (
        f"fused into the base, {whole.share:.1%} of the change is left (at least {MIN_SHARE:.0%} "
        f"is asked for) and {len(erased)} of {len(changes)} modules lose theirs: use the adapter "
        f"unfused, or fuse with --dequantize"
    )
    tensors = tuple(name for name in sorted(after) if name.rpartition(".")[0] in erased)
    return evidence, [Reason("no_effect", message, tensors)]


def _measure(model: nn.Module, module: Any, before: Parameters, after: Parameters) -> FusedChange:
    fused = [_weight(module.fuse()) for _ in _loaded(model, before, after)]
    module.set_dtype(mx.float32)
    exact = [module.fuse(dequantize=True).weight for _ in _loaded(model, before, after)]
    exact_change = exact[1] - exact[0]
    fused_change = fused[1] - fused[0]
    squared_norm = to_float((exact_change * exact_change).sum())
    return FusedChange(squared_norm, to_float((exact_change * fused_change).sum()))


def _loaded(model: nn.Module, before: Parameters, after: Parameters) -> Iterator[None]:
    """Put one adapter into the model, yield, then the other."""
    for tensors in (before, after):
        load_adapter_tensors(model, tensors)
        yield


def _weight(fused: Any) -> mx.array:
    """The weight that a fused module computes with, in float32."""
    weight: mx.array = fused.weight
    if "scales" in fused:
        format_ = {"group_size": fused.group_size, "bits": fused.bits, "mode": fused.mode}
        weight = mx.dequantize(weight, fused.scales, fused.get("biases"), **format_)
    return weight.astype(mx.float32)
