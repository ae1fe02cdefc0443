"""The check that the change survives fusing: fusing into a quantized base can round it away.

Each module is fused as mlx_lm.fuse does, with the initial and with the trained adapter, and the
difference of the two weights is compared with the difference computed in float32.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from nested_core.backend import to_float
from nested_core.gate.checks.judged import Check, CheckedRun, GateChecks, GateWork
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.models.lora_attachment import load_adapter_tensors
from nested_core.models.lora_tensors import module_name
from nested_core.models.parameters import float32_weight
from nested_core.records.verdict import MIN_CHANGE_LEFT_BY_FUSING, FusedVerdict, Reason

MIN_CARRIED_SHARE_OF_MODULE = 0.1
Parameters = Mapping[str, mx.array]
Overflow = Literal["before", "after"]  # with the initial adapter already, or the trained one alone


@dataclass(frozen=True)
class FusedChange:
    """A module's change: its squared norm, and the fused change's inner product with it."""

    squared_norm: float
    inner_product: float

    @property
    def carried_share(self) -> float:
        """1 if the fused module carries all of the change, 0 if none of it."""
        return self.inner_product / self.squared_norm if self.squared_norm else 0.0


def judge_fused_change(
    model: nn.Module, before: Parameters, after: Parameters
) -> tuple[FusedVerdict, list[Reason]]:
    """Return the share of the change that is left once fused, and a reason if it is too little.

    `model` is the base as stored with an adapter attached; its modules are float32 afterwards.
    """
    measured = {
        name: _measure_module(model, module, before, after)
        for name, module in model.named_modules()
        if hasattr(module, "fuse")
    }
    overflowing = {n: change for n, change in measured.items() if isinstance(change, str)}
    changes = {n: change for n, change in measured.items() if isinstance(change, FusedChange)}
    squared_norm = sum(change.squared_norm for change in changes.values())
    inner_product = sum(change.inner_product for change in changes.values())
    whole = FusedChange(squared_norm, inner_product)
    erased = sorted(n for n, c in changes.items() if c.carried_share < MIN_CARRIED_SHARE_OF_MODULE)
    evidence = FusedVerdict(len(measured), whole.carried_share, tuple(erased))
    if overflowing:
        return evidence, _overflow_reasons(overflowing, after)
    if not erased and whole.carried_share >= MIN_CHANGE_LEFT_BY_FUSING:
        return evidence, []
    message = (
        f"fused into the base, {whole.carried_share:.1%} of the change is left (at least "
        f"{MIN_CHANGE_LEFT_BY_FUSING:.0%} is asked for) and {len(erased)} of {len(changes)} "
        f"modules lose theirs: use the adapter unfused, or fuse with --dequantize"
    )
    return evidence, [Reason("no_effect", message, _tensor_names_of_modules(erased, after))]


def _tensor_names_of_modules(modules: Collection[str], adapter: Parameters) -> tuple[str, ...]:
    return tuple(name for name in sorted(adapter) if module_name(name) in modules)


def _overflow_reasons(overflowing: Mapping[str, Overflow], after: Parameters) -> list[Reason]:
    """Return reasons for weights that the initial, or the trained, adapter overflows."""
    reasons = []
    for overflow, adapter in (("before", "initial"), ("after", "trained")):
        modules = [name for name, side in overflowing.items() if side == overflow]
        if modules:
            message = (
                f"fused into the base with the {adapter} adapter, the weights of {len(modules)} "
                f"modules are not finite"
            )
            reasons.append(Reason("non_finite", message, _tensor_names_of_modules(modules, after)))
    return reasons


def _measure_module(
    model: nn.Module, module: Any, before: Parameters, after: Parameters
) -> FusedChange | Overflow:
    """Return the change of one module, or with which adapter its fused weight is not finite."""
    fused = [float32_weight(module.fuse()) for _ in _load_each_in_turn(model, before, after)]
    module.set_dtype(mx.float32)
    exact = [module.fuse(dequantize=True).weight for _ in _load_each_in_turn(model, before, after)]
    if not _are_finite(fused[0], exact[0]):
        return "before"
    exact_change = exact[1] - exact[0]
    fused_change = fused[1] - fused[0]
    if not _are_finite(exact_change, fused_change):
        return "after"
    # In units of the largest change, so that no square overflows float32 or vanishes.
    unit = max(to_float(mx.abs(exact_change).max()), to_float(mx.abs(fused_change).max())) or 1.0
    exact_change = exact_change / unit
    fused_change = fused_change / unit
    squared_norm = to_float((exact_change * exact_change).sum()) * unit**2
    return FusedChange(squared_norm, to_float((exact_change * fused_change).sum()) * unit**2)


def _are_finite(*arrays: mx.array) -> bool:
    return all(bool(mx.isfinite(array).all().item()) for array in arrays)


def _load_each_in_turn(model: nn.Module, before: Parameters, after: Parameters) -> Iterator[None]:
    """Put one adapter into the model, yield, then the other."""
    for tensors in (before, after):
        load_adapter_tensors(model, tensors)
        yield


def _find_lost_change(judged: CheckedRun) -> list[Reason]:
    before, after = judged.before.to_mlx(), judged.after.to_mlx()
    model = LoadedBase.load(judged.config, as_stored=True).model
    fused, reasons = judge_fused_change(model, before, after)
    judged.verdict = replace(judged.verdict, fused=fused)
    return reasons


FUSED = Check(
    "fused",
    _find_lost_change,
    needs_all=True,
    is_asked=lambda bounds: bounds.check_fused,
    bounds=("check_fused",),
    stage="whether the change survives fusing",
    plan_work=lambda _: GateWork(rows=2),  # each adapter's weights are read as for a row
)
CHECKS = GateChecks((FUSED,))
