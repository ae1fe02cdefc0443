"""Two adapters, tensor by tensor and as configurations: what differs, and what must not."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np

from nested_core.gate.measures import measure
from nested_core.gate.verdict import Code, Reason, TensorChange
from nested_core.storage.adapter import Adapter, Tensor


def compare_tensors(
    initial: Adapter, trained: Adapter, tiers: Mapping[str, int]
) -> list[TensorChange]:
    """Compare every tensor that both hold, in name order, by bytes and by value."""
    both = sorted(initial.tensors.keys() & trained.tensors.keys())
    # In one thread: pieces are so short that more would wait for the interpreter's lock.
    return [_compare(n, tiers.get(n), initial.tensors[n], trained.tensors[n]) for n in both]


def _compare(name: str, tier: int | None, before: Tensor, after: Tensor) -> TensorChange:
    if before.shape != after.shape:
        is_finite = all(bool(np.isfinite(t.to_numpy()).all()) for t in (before, after))
        return TensorChange(name, tier, True, None, None, is_finite)
    found = measure(before, after)
    if not found.is_finite:
        return TensorChange(name, tier, found.has_changed, None, None, False)
    scale = max(found.old_norm, found.new_norm)
    relative = found.delta_norm / scale if scale else 0.0
    return TensorChange(name, tier, found.has_changed, found.largest, relative, True)


def structure_reasons(initial: Adapter, trained: Adapter) -> list[Reason]:
    """Differences in names, shapes, dtypes, configuration and base model."""
    before, after = initial.tensors, trained.tensors
    both = before.keys() & after.keys()
    shapes = [name for name in both if before[name].shape != after[name].shape]
    dtypes = [name for name in both if before[name].dtype != after[name].dtype]
    found = [
        _named("tensor_missing", before.keys() - after.keys(), "are not in the trained adapter"),
        _named(
            "tensor_unexpected", after.keys() - before.keys(), "were not in the initial adapter"
        ),
        _named("shape_mismatch", shapes, "have another shape than in the initial adapter"),
        _named("dtype_mismatch", dtypes, "have another dtype than in the initial adapter"),
    ]
    return [reason for reason in found if reason] + _meaning_reasons(initial, trained)


def change_reasons(changes: Iterable[TensorChange], min_relative_change: float) -> list[Reason]:
    """Values that are not finite, and an adapter that did not change, or by less than the bound."""
    changes = list(changes)
    broken = _named("non_finite", [c.name for c in changes if not c.finite], "hold NaN or infinity")
    if broken:
        return [broken]
    if not any(change.changed for change in changes):
        message = f"all {len(changes)} tensors equal the initial adapter, byte for byte"
        return [Reason("unchanged", message, tuple(change.name for change in changes))]
    largest = max(change.relative_delta or 0.0 for change in changes)
    if largest < min_relative_change:
        message = (
            f"no tensor moved by more than {largest:.3g} of its norm; "
            f"gate.min_relative_change is {min_relative_change:g}"
        )
        return [Reason("unchanged", message, tuple(change.name for change in changes))]
    return []


def _named(code: Code, names: Iterable[str], what: str) -> Reason | None:
    ordered = sorted(names)
    return Reason(code, f"{len(ordered)} tensors {what}", tuple(ordered)) if ordered else None


def _meaning_reasons(initial: Adapter, trained: Adapter) -> list[Reason]:
    before, after = initial.meaning(), trained.meaning()
    bases = before.pop("base_fingerprint"), after.pop("base_fingerprint")
    reasons = []
    differing = [key for key in before if before[key] != after[key]]
    if differing:
        pairs = ", ".join(f"{key}: {before[key]} -> {after[key]}" for key in differing)
        reasons.append(Reason("config_mismatch", f"adapter_config.json differs in {pairs}"))
    if None in bases:  # written by another program, which names its base only
        bases = initial.config.get("model"), trained.config.get("model")
    if bases[0] != bases[1]:
        reasons.append(Reason("base_mismatch", f"made for base {bases[0]}, now for {bases[1]}"))
    return reasons
