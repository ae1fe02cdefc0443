"""Whether a fused model still carries what was learnt: fusing into a quantised base can erase it.

Each module is fused as mlx_lm.fuse does it, with the initial and with the trained adapter, and the
difference of the two weights is laid against the one that float32 gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from nested_core.backend import to_float
from nested_core.gate.verdict import Reason
from nested_core.models.lora import load_leaves

MIN_CARRIED, MIN_CARRIED_BY_A_MODULE = 0.5, 0.1
Leaves = Mapping[str, mx.array]


@dataclass(frozen=True)
class Carried:
    """Of one module's change: its squared norm, and the inner product of the fused one with it."""

    size: float
    along: float

    @property
    def share(self) -> float:
        """1 where the fused module carries all of the change, 0 where none."""
        return self.along / self.size if self.size else 0.0


def judge_fused(
    model: nn.Module, before: Leaves, after: Leaves
) -> tuple[dict[str, Any], list[Reason]]:
    """How much of the change is left once it is fused, and a reason where that is too little.

    `model` is the base as stored with an adapter attached; its modules are float32 afterwards.
    """
    found = {
        name: _measure(model, module, before, after)
        for name, module in model.named_modules()
        if hasattr(module, "fuse")
    }
    total = Carried(sum(c.size for c in found.values()), sum(c.along for c in found.values())).share
    erased = sorted(n for n, c in found.items() if c.share < MIN_CARRIED_BY_A_MODULE)
    evidence = {"modules": len(found), "carried_share": total, "erased_modules": erased}
    if not erased and total >= MIN_CARRIED:
        return evidence, []
    message = (
        f"fused into the base, {total:.1%} of the change is left (at least {MIN_CARRIED:.0%} is "
        f"asked for) and {len(erased)} of {len(found)} modules lose theirs: use the adapter "
        f"unfused, or fuse with --dequantize"
    )
    tensors = tuple(n for n in sorted(after) if n.rpartition(".")[0] in erased)
    return evidence, [Reason("no_effect", message, tensors)]


def _measure(model: nn.Module, module: Any, before: Leaves, after: Leaves) -> Carried:
    fused = [_weight(module.fuse()) for _ in _with_each(model, before, after)]
    module.set_dtype(mx.float32)
    exact = [module.fuse(dequantize=True).weight for _ in _with_each(model, before, after)]
    true, left = exact[1] - exact[0], fused[1] - fused[0]
    return Carried(to_float((true * true).sum()), to_float((true * left).sum()))


def _with_each(model: nn.Module, before: Leaves, after: Leaves) -> Any:
    """Put the one adapter into the model, then the other."""
    for tensors in (before, after):
        load_leaves(model, tensors)
        yield tensors


def _weight(fused: Any) -> mx.array:
    """The weight that a fused module computes with, in float32."""
    weight: mx.array = fused.weight
    if "scales" in fused:
        kind = {"group_size": fused.group_size, "bits": fused.bits, "mode": fused.mode}
        weight = mx.dequantize(weight, fused.scales, fused.get("biases"), **kind)
    return weight.astype(mx.float32)
