"""Judging: any two adapters from their files, or a run with all that its folder holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from nested_core import backend
from nested_core.config.gate import GateSection
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DamagedError
from nested_core.gate.base_fit import base_reasons, declared_reasons
from nested_core.gate.evidence import (
    Evidence,
    changed_since_judged,
    collect_evidence,
    describe_judged,
)
from nested_core.gate.fused import judge_fused
from nested_core.gate.held import HeldBase
from nested_core.gate.lora_effect import effect_reasons, require_factors
from nested_core.gate.losses import measure_general, measure_losses
from nested_core.gate.proof import ProofRequest, prove
from nested_core.gate.tensor_diff import change_reasons, compare_tensors, structure_reasons
from nested_core.gate.tier_updates import TierEvidence, tier_changes, update_reasons
from nested_core.gate.verdict import GeneralLoss, Reason, Source, Validation, Verdict
from nested_core.models.base import base_fingerprint, find_model
from nested_core.models.lora import compute_dtype
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.storage.run_directory import RunDirectory


def verify_adapters(
    initial: Path, trained: Path, bounds: GateSection | None = None, *, step: int | None = None
) -> Verdict:
    """Judge two adapter directories from their files: no run directory and no data.

    Where the base model that they name is a folder here, a new process loads it with each of them.
    Raises ConfigError where a path is no directory, DamagedError where an adapter is not sound.
    """
    with ThreadPoolExecutor(2) as pool:
        before, after = pool.map(_read_and_hash, (initial, trained))
    verdict = _compare(before, after, bounds or GateSection(), step=step, tiers={})
    return _proven_without_a_run(verdict, before, after) if verdict.has_passed else verdict


def _read_and_hash(path: Path) -> Adapter:
    adapter = read_adapter(path)
    adapter.digest()  # kept from now on
    return adapter


def judge_run(config: FineTuneConfig, run: RunDirectory) -> Verdict:
    """Judge the adapter that a run offers, from disk, with the tiers' clocks and the losses.

    Raises DamagedError where the folder is not as training left it.
    """
    verdict, found = _judged_by_files(config, run)
    verdict = replace(verdict, evidence=describe_judged(config, run))
    reasons = list(verdict.reasons)
    if _is_whole(reasons) and not any(reason.code == "base_mismatch" for reason in reasons):
        verdict = _judged_in_the_model(verdict, config, run, found)
    if verdict.has_passed and config.gate.check_fused:
        verdict = _judged_fused(verdict, config, found)
    return _proven(verdict, config, found) if verdict.has_passed else verdict


def confirm_run(config: FineTuneConfig, run: RunDirectory, recorded: Mapping[str, Any]) -> None:
    """Raise DamagedError unless the run's files bear out what gate.json holds: a "passed".

    All that the gate does without a model is done again, so that a verdict that was written by
    hand is worth nothing. The losses and the proof are taken as they are recorded.
    """
    verdict, _ = _judged_by_files(config, run)
    if not verdict.has_passed:
        raise DamagedError(
            f"{run.gate} says passed, and the files that it judged do not: {verdict.summary()}. "
            f"Judge the run again with --resume."
        )
    now = json.loads(json.dumps(verdict.to_json()))
    wrong = [key for key in ("adapter_step", "tiers") if recorded.get(key) != now[key]]
    digests = [
        key for key in ("initial", "trained") if _digest(recorded, key) != now[key]["digest"]
    ]
    if wrong + digests:
        raise DamagedError(
            f"{run.gate} is not the verdict on the files beside it: {', '.join(wrong + digests)} "
            f"differ. Judge the run again with --resume."
        )
    if changed := changed_since_judged(run, recorded.get("evidence")):
        raise DamagedError(
            f"{run.gate} was not given on the {' and '.join(changed)} that {run.path} holds: it "
            f"has other digests of them. Bring back what was there, or judge the run again with "
            f"--resume."
        )


def _digest(recorded: Mapping[str, Any], side: str) -> Any:
    source = recorded.get(side)
    return source.get("digest") if isinstance(source, dict) else None


def _judged_by_files(config: FineTuneConfig, run: RunDirectory) -> tuple[Verdict, Evidence]:
    """What files alone say: tensors, configurations, and updates against the tiers' clocks."""
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
    return replace(verdict, reasons=tuple(reasons), tiers=tuple(rows)), found


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


def _with(verdict: Verdict, reasons: list[Reason]) -> Verdict:
    return replace(verdict, reasons=verdict.reasons + tuple(reasons))


def _judged_in_the_model(
    verdict: Verdict, config: FineTuneConfig, run: RunDirectory, found: Evidence
) -> Verdict:
    """Whether the tensors fit the base, and what they do to the losses."""
    held = HeldBase.load(config)
    misfits = base_reasons(found.after, held.leaves, held.fingerprint)
    if misfits:
        return _with(verdict, misfits)
    validation, general = measure_losses(held, run), measure_general(held, run)
    reasons = _loss_reasons(validation, config.gate) + _forgetting(general, config.gate)
    return replace(_with(verdict, reasons), validation=validation, general=general)


def _judged_fused(verdict: Verdict, config: FineTuneConfig, found: Evidence) -> Verdict:
    """Whether the change survives fusing into the base as it is stored."""
    before, after = (
        {name: tensor.to_mlx() for name, tensor in adapter.tensors.items()}
        for adapter in (found.before, found.after)
    )
    fused, reasons = judge_fused(HeldBase.load(config, as_stored=True).model, before, after)
    return replace(_with(verdict, reasons), fused=fused)


def _proven(verdict: Verdict, config: FineTuneConfig, found: Evidence) -> Verdict:
    """What a new process sees of the offered adapter, against what the trainer saw."""
    mx.clear_cache()  # this process has let go of the model; the new one needs the memory
    logits, dtype = found.record.logits, compute_dtype(config)
    request = ProofRequest(
        find_model(config.model),
        found.before.path,
        found.after.path,
        logits.prompts,
        logits.columns,
        logits.values,
        dtype is not None and dtype == mx.float32,
        config.trust_remote_code,
    )
    proof, reasons = prove(request)
    return replace(_with(verdict, reasons), proof=proof)


def _proven_without_a_run(verdict: Verdict, before: Adapter, after: Adapter) -> Verdict:
    """The same for any two adapters, where the base that they name is at hand."""
    named = after.config.get("model")
    if not named or not Path(named, "config.json").is_file():
        skipped = f"the base model {named} is not a folder here: nothing was loaded"
        return replace(verdict, proof={"skipped": skipped})
    meant, base = after.config.get("base_fingerprint"), base_fingerprint(Path(named))
    if meant is not None and meant != base:
        message = f"made for the base {meant[:12]}; {named} is {base[:12]} now"
        return _with(verdict, [Reason("base_mismatch", message)])
    is_float32 = backend.device() == "cpu"  # as training does there: smaller changes are seen
    request = ProofRequest(Path(named), before.path, after.path, is_float32=is_float32)
    proof, reasons = prove(request)
    return replace(_with(verdict, reasons), proof=proof)


def _loss_reasons(validation: Validation | None, bounds: GateSection) -> list[Reason]:
    if validation is None:
        return []
    before, after = validation.loss_before, validation.loss_after
    if _is_within(before, after, bounds.max_val_loss_increase):
        return []
    message = (
        f"loss {before} -> {after}; gate.max_val_loss_increase is {bounds.max_val_loss_increase:g}"
    )
    return [Reason("loss_regressed", message)]


def _forgetting(general: GeneralLoss | None, bounds: GateSection) -> list[Reason]:
    limit = bounds.max_general_loss_increase
    if general is None or limit is None:
        return []
    before, after = general.loss_before, general.loss_after
    if _is_within(before, after, limit):
        return []
    message = (
        f"loss on general text {before} -> {after}; gate.max_general_loss_increase is {limit:g}"
    )
    return [Reason("forgetting", message)]


def _is_within(before: float | None, after: float | None, increase: float) -> bool:
    """Whether a loss is finite and rose by no more than this share of what it was."""
    return before is not None and after is not None and after <= before * (1 + increase)
