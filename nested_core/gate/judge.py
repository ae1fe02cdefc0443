"""Judging: any two adapters from their files, or a run with all that its folder holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from nested_core.adapters import Adapter, read_adapter
from nested_core.config import FineTuneConfig, GateSection
from nested_core.gate.changes import change_reasons, compare_tensors, structure_reasons
from nested_core.gate.effects import effect_reasons, require_factors
from nested_core.gate.evidence import collect_evidence
from nested_core.gate.fit import declared_reasons
from nested_core.gate.losses import measure_losses
from nested_core.gate.updates import TierEvidence, tier_changes, update_reasons
from nested_core.gate.verdict import Reason, Source, Validation, Verdict
from nested_core.run_directory import RunDirectory


def verify_adapters(
    initial: Path, trained: Path, bounds: GateSection | None = None, *, step: int | None = None
) -> Verdict:
    """Judge two adapter directories from their files alone: no run directory, no data, no model.

    Raises ConfigError where a path is no directory, DamagedError where an adapter is not sound.
    """
    before, after = read_adapter(initial), read_adapter(trained)
    return _compare(before, after, bounds or GateSection(), step=step, tiers={})


def judge_run(config: FineTuneConfig, run: RunDirectory) -> Verdict:
    """Judge the adapter that a run offers, from disk, with the tiers' clocks and the losses.

    Raises DamagedError where the folder is not as training left it.
    """
    found = collect_evidence(run)
    evidence = TierEvidence.collect(config, run, found)
    verdict = _compare(
        found.before,
        found.after,
        config.gate,
        step=found.checkpoint.step,
        tiers=evidence.tiers.tensors,
    )
    rows = tier_changes(evidence, verdict.tensors)
    reasons = list(verdict.reasons)
    if not any(reason.code in ("unchanged", "non_finite") for reason in reasons):
        reasons += update_reasons(config, evidence, rows, verdict.tensors)
    validation = measure_losses(config, run) if _is_whole(reasons) else None
    reasons += _loss_reasons(validation, config.gate)
    return replace(verdict, reasons=tuple(reasons), tiers=tuple(rows), validation=validation)


def _compare(
    before: Adapter,
    after: Adapter,
    bounds: GateSection,
    *,
    step: int | None,
    tiers: Mapping[str, int],
) -> Verdict:
    changes = compare_tensors(before, after, tiers)
    reasons = structure_reasons(before, after)
    if _is_whole(reasons):
        require_factors(after)
        reasons += [] if reasons else declared_reasons(after)
    if _is_whole(reasons):
        reasons += change_reasons(changes, bounds.min_relative_change)
        reasons += effect_reasons(before, after) if not reasons else []
    return Verdict(
        tuple(reasons),
        step,
        Source(str(before.path), before.digest()),
        Source(str(after.path), after.digest()),
        tuple(changes),
        thresholds=bounds.model_dump(),
    )


def _is_whole(reasons: list[Reason]) -> bool:
    """Whether names, shapes and dtypes let the tensors be compared and loaded at all."""
    broken = {"tensor_missing", "tensor_unexpected", "shape_mismatch", "dtype_mismatch"}
    return not any(reason.code in broken or reason.code == "non_finite" for reason in reasons)


def _loss_reasons(validation: Validation | None, bounds: GateSection) -> list[Reason]:
    if validation is None:
        return []
    before, after = validation.loss_before, validation.loss_after
    limit = None if before is None else before * (1 + bounds.max_val_loss_increase)
    if after is not None and limit is not None and after <= limit:
        return []
    message = (
        f"loss {before} -> {after}; gate.max_val_loss_increase is {bounds.max_val_loss_increase:g}"
    )
    return [Reason("loss_regressed", message)]
