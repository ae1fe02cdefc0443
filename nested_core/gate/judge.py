"""The order of the gate's checks: for any two adapters, and for a run with all its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import numpy as np

from nested_core import backend
from nested_core.config.gate import GateSection
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import DamagedError, NestedTuneError
from nested_core.gate.base_compatibility import base_reasons, config_reasons, fingerprint_reasons
from nested_core.gate.fresh_process_check import (
    Proof,
    ProofRequest,
    begin_proof,
    prove_effect_in_fresh_process,
)
from nested_core.gate.lora_effect import no_effect_reasons, overflow_reasons, require_lora_factors
from nested_core.gate.loss_bounds import drift_reasons, harm_reasons, loss_reasons
from nested_core.gate.recorded_verdict import require_same_verdict
from nested_core.gate.run_evidence import RunEvidence, collect_evidence, config_file_entry
from nested_core.gate.sample_bounds import judge_samples, require_same_samples
from nested_core.gate.task_bounds import (
    judge_answers,
    require_same_task_results,
    task_file_entries,
)
from nested_core.gate.tensor_diff import change_reasons, compare_tensors, structure_reasons
from nested_core.gate.tier_updates import TierEvidence, tier_changes, update_reasons
from nested_core.gate.training_divergence import Divergence, collapse_reason, find_divergence
from nested_core.gate.verdict import (
    ChampionLoss,
    Code,
    Drift,
    JudgedAdapter,
    Reason,
    SampleVerdict,
    Validation,
    Verdict,
    describe_examples,
)
from nested_core.models.base_model import find_model_folder, model_compute_dtype
from nested_core.registry.gate_file import require_verdict_manifest
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.storage.canary_file import CANARY_NAME, render_canary
from nested_core.storage.manifest import describe_file
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.sample_answers_file import render_sample_answers
from nested_core.text.stages import stages

if TYPE_CHECKING:
    from nested_core.gate.champion_adapter import Champion
    from nested_core.gate.held_out_loss import LoadedBase

# With one of these, tensors cannot be compared with each other or loaded into a model.
MISMATCH_CODES = {"tensor_missing", "tensor_unexpected", "shape_mismatch", "dtype_mismatch"}
INCOMPARABLE_CODES = MISMATCH_CODES | {"non_finite"}
NO_HELD_OUT_EXAMPLES_MESSAGE = "there are no held-out examples"
DIVERGENCE_CODES = {"non_finite", "loss_regressed"}


def verify_adapters(
    initial: Path, trained: Path, bounds: GateSection | None = None, *, step: int | None = None
) -> Verdict:
    """Judge two adapter folders from their files, without a run directory or data.

    If the base model that they name is a folder here, a new process loads it with each of them.
    Raises ConfigError if a path is no directory, DamagedError if an adapter is not sound.
    """
    with ThreadPoolExecutor(2) as pool:
        before, after = pool.map(_read_and_hash, (initial, trained))
    verdict = _compare_adapters(before, after, bounds or GateSection(), step=step, tiers={})
    if verdict.has_passed:
        verdict = _prove_in_fresh_process_without_run(verdict, before, after)
    return _add_guides(verdict)


def _read_and_hash(path: Path) -> Adapter:
    adapter = read_adapter(path, follow_links=True)
    adapter.digest()  # the adapter keeps it
    return adapter


def judge_run(config: FineTuneConfig, run: RunDirectory) -> Verdict:
    """Judge the adapter that a run offers: its files, tiers, losses, and the fresh process.

    Raises DamagedError if the folder is not as training left it.
    """
    stages.info("gate: changes of the tensors, updates of the tiers")
    verdict, evidence = _judge_without_model(config, run)
    files = evidence.files | {run.config.name: config_file_entry(config)}
    verdict = replace(verdict, judged_files=files)
    divergence = _find_divergence(config, run, evidence)
    # Here, because `promote` confirms a verdict without a tokenizer.
    from nested_core.gate.canary import choose_canary_prompts, make_canary

    questions = choose_canary_prompts(config)
    request = _make_proof_request(config, evidence, [question.tokens for question in questions])
    with ExitStack() as stack:
        proof = None
        if verdict.has_passed and _has_room_for_two_bases():
            proof = stack.enter_context(begin_proof(request))
        if not _has_any(verdict.reasons, INCOMPARABLE_CODES | {"base_mismatch"}):
            verdict = _compare_losses(verdict, config, run, evidence)
        if not _has_any(verdict.reasons, INCOMPARABLE_CODES | {"unchanged", "base_mismatch"}):
            verdict = _add_divergence(verdict, evidence, divergence)
        if verdict.has_passed and config.gate.check_fused:
            verdict = _check_fused_change(verdict, config, evidence)
        if verdict.has_passed:
            stages.info("gate: a new process loads the adapter, and must see the change")
            if proof is None:
                _release_kept_base()  # the new process needs the memory
                mx.clear_cache()
                proof = stack.enter_context(begin_proof(request))
            shown = proof.judge()
            written = dict(verdict.written_files)
            if shown.canary is not None and not shown.reasons:
                written[CANARY_NAME] = render_canary(make_canary(questions, request, shown.canary))
            verdict = replace(_add_proof(verdict, shown), written_files=written)
            if divergence is not None and divergence.has_risen:
                reasons = tuple(map(_reword_as_divergence, verdict.reasons))
                verdict = replace(verdict, reasons=reasons)
    return _add_guides(
        replace(verdict, reasons=_explain_by_divergence(verdict.reasons, divergence))
    )


def _add_guides(verdict: Verdict) -> Verdict:
    """Every reason with the place in the guide that explains it."""
    return replace(verdict, reasons=tuple(reason.with_guide() for reason in verdict.reasons))


def _find_divergence(
    config: FineTuneConfig, run: RunDirectory, evidence: RunEvidence
) -> Divergence | None:
    # Here, because `promote` confirms a verdict without anything that trains.
    from nested_core.training.metrics_file import read_metrics

    records = read_metrics(run.metrics)
    return find_divergence(records, evidence.checkpoint.step, config.learning_rate)


def _add_divergence(
    verdict: Verdict, evidence: RunEvidence, divergence: Divergence | None
) -> Verdict:
    """Add that training broke the model, and without held-out data that its loss left."""
    reason = collapse_reason(evidence.record.logits)
    if reason is None and verdict.validation is None and divergence and divergence.is_certain:
        code: Code = "non_finite" if divergence.loss is None else "loss_regressed"
        reason = Reason(code, "the training loss is far above where it began")
    return verdict if reason is None else replace(verdict, reasons=(reason, *verdict.reasons))


def _reword_as_divergence(reason: Reason) -> Reason:
    """The proof's reason, as one of a run that diverged: rounding is as large as its weights."""
    is_rounding = reason.code == "config_mismatch"
    return replace(reason, code="loss_regressed") if is_rounding else reason


def _explain_by_divergence(
    reasons: tuple[Reason, ...], divergence: Divergence | None
) -> tuple[Reason, ...]:
    """The reasons, of which the first about values or losses says where training diverged."""
    index = next((i for i, r in enumerate(reasons) if r.code in DIVERGENCE_CODES), None)
    if divergence is None or index is None:
        return reasons
    explained = replace(reasons[index], message=f"{reasons[index].message}; {divergence}")
    return (*reasons[:index], explained, *reasons[index + 1 :])


def recheck_verdict(config: FineTuneConfig, run: RunDirectory, recorded: Mapping[str, Any]) -> None:
    """Raise DamagedError unless the run's files bear out `recorded`, a gate.json that says passed.

    The manifest must hold their digests, and all checks that need no model are done again, so that
    a verdict written by hand is worth nothing. The losses and the proof are taken as they are
    recorded, where they agree with the configuration and the data.
    """
    verdict, evidence = _judge_without_model(config, run)
    if not verdict.has_passed:
        raise DamagedError(
            f"{run.gate} says passed, and the files that it judged do not: {verdict.summary()}. "
            f"Judge the run again with --resume."
        )
    bound = require_verdict_manifest(run.path, recorded)
    files = evidence.files | {run.config.name: describe_file(run.config)}
    written = {run.training_examples}
    written |= {path for path in (run.sample_answers, run.canary) if path.name in bound}
    if run.gate_losses.name in bound or isinstance(recorded.get("validation"), dict):
        written.add(run.gate_losses)
    files |= {path.name: describe_file(path) for path in written}
    files |= task_file_entries(config.gate, run)
    names = sorted({*files, *bound} - {run.gate.name})
    if changed := [name for name in names if files.get(name) != bound.get(name)]:
        raise DamagedError(
            f"{run.gate} was not given on the {' and '.join(changed)} that {run.path} holds: "
            f"{run.manifest.name} has other digests of them. Bring back what was there, or judge "
            f"the run again with --resume."
        )
    require_same_verdict(verdict, recorded, run)
    require_same_task_results(config.gate, run, recorded)
    require_same_samples(run, recorded, has_answers=run.sample_answers.name in bound)


def _judge_without_model(config: FineTuneConfig, run: RunDirectory) -> tuple[Verdict, RunEvidence]:
    """The checks that need no model: tensors, configurations, and updates of each tier."""
    evidence = collect_evidence(run)
    tiers = TierEvidence.collect(config, run, evidence)
    verdict = _compare_adapters(
        evidence.before,
        evidence.after,
        config.gate,
        step=evidence.checkpoint.step,
        tiers=tiers.tiers.tensors,
    )
    rows = tier_changes(tiers, verdict.tensors)
    if not _has_any(verdict.reasons, {"unchanged", "non_finite"}):
        verdict = _add_reasons(verdict, update_reasons(config, tiers, rows, verdict.tensors))
    return replace(verdict, tiers=tuple(rows), last_step=evidence.last_step), evidence


def _compare_adapters(
    before: Adapter,
    after: Adapter,
    bounds: GateSection,
    *,
    step: int | None,
    tiers: Mapping[str, int],
) -> Verdict:
    changes = compare_tensors(before, after, tiers)
    reasons = structure_reasons(before, after)
    if not _has_any(reasons, INCOMPARABLE_CODES):
        require_lora_factors(after)
        if not reasons:
            reasons = config_reasons(after)
    if not _has_any(reasons, INCOMPARABLE_CODES):
        reasons += change_reasons(before, changes, bounds.min_relative_change)
        if not reasons:
            reasons = overflow_reasons(before, after) or no_effect_reasons(before, after)
    return Verdict(
        reasons=tuple(reasons),
        adapter_step=step,
        initial=JudgedAdapter(str(before.path), before.digest()),
        trained=JudgedAdapter(str(after.path), after.digest()),
        tensors=tuple(changes),
        thresholds=bounds.model_dump(),
    )


def _has_any(reasons: Iterable[Reason], codes: set[str]) -> bool:
    return any(reason.code in codes for reason in reasons)


def _add_reasons(verdict: Verdict, reasons: list[Reason]) -> Verdict:
    return replace(verdict, reasons=verdict.reasons + tuple(reasons))


def _compare_losses(
    verdict: Verdict, config: FineTuneConfig, run: RunDirectory, evidence: RunEvidence
) -> Verdict:
    """Add whether the tensors fit the base, and the losses with either adapter."""
    # Here, because `promote` confirms a verdict without a model, and need not wait for mlx-lm.
    from nested_core.data.example_digests import digest_examples
    from nested_core.gate.champion_adapter import UnusableChampion, find_champion
    from nested_core.gate.champion_losses import MeasuredHeldOutExamples, compare_with_champion
    from nested_core.gate.chosen_candidate import Candidates, read_candidates
    from nested_core.gate.held_out_loss import (
        LoadedBase,
        measure_example_losses,
        measure_general_loss,
        read_held_out_examples,
        read_nonempty_splits,
    )
    from nested_core.gate.training_examples import read_ancestor_training_digests

    stages.info("gate: losses on held-out examples, before and after")
    base = LoadedBase.load(config)
    misfits = base_reasons(evidence.after, base.parameters, base.folder)
    if misfits:
        return _add_reasons(verdict, misfits)
    splits = read_nonempty_splits(config, run)
    training_examples = digest_examples(splits["train"])
    files = {run.training_examples.name: np.unique(training_examples).astype("<u8").tobytes()}
    held_out = read_held_out_examples(config, splits)
    champion = find_champion(base, evidence.after)
    losses = None
    validation = None
    drift = None
    champion_loss = None
    if champion is not None:
        champion_loss = ChampionLoss(champion.version, not_compared=NO_HELD_OUT_EXAMPLES_MESSAGE)
    candidates = Candidates()
    if held_out is not None:
        losses = measure_example_losses(base, evidence, held_out)
        ancestors = read_ancestor_training_digests(config, evidence.before.digest())
        seen = np.concatenate([training_examples, ancestors], dtype=np.uint64)
        losses = losses.leaving_out(np.isin(held_out.digests, seen))
        if held_out.has_validation_examples:
            candidates = read_candidates(run.validation_losses)
        validation = Validation.from_losses(
            losses,
            selected_on_same_data=held_out.selected_on_same_data,
            has_one_answer=held_out.are_all_answers_equal,
            bounds=config.gate,
            candidates=candidates,
        )
    general = measure_general_loss(base, run)
    reasons = loss_reasons(validation, general, config.gate)
    if losses is not None and validation is not None:
        reasons += harm_reasons(losses, validation, config.gate)
        drift = Drift.from_losses(losses)
        reasons += drift_reasons(drift, describe_examples(validation), config.gate)
    if held_out is not None and losses is not None and validation is not None:
        if champion is not None:
            examples = MeasuredHeldOutExamples(held_out, losses)
            champion_loss, losses = compare_with_champion(champion, evidence, examples, candidates)
        files[run.gate_losses.name] = losses.render()
        validation = replace(validation, losses_sha256=losses.sha256())
    measured = replace(
        _add_reasons(verdict, reasons),
        validation=validation,
        drift=drift,
        champion=champion_loss,
        general=general,
        written_files=files,
    )
    measured = _judge_sample_answers(measured, base, run, evidence)
    rival = None if isinstance(champion, UnusableChampion) else champion
    return _compare_task_answers(measured, base, run, evidence, rival)


def _judge_sample_answers(
    verdict: Verdict, base: LoadedBase, run: RunDirectory, evidence: RunEvidence
) -> Verdict:
    """Add what base and adapter answer to a few prompts, and whether training broke that.

    A model that cannot be asked is no verdict under `gate.samples: warn`; the error says so.
    """
    from nested_core.gate.sample_answers import ask_samples

    gate = base.config.gate
    stages.info("gate: answers of base and adapter to sample prompts")
    try:
        rows = ask_samples(base, evidence)
    except (NestedTuneError, OSError, MemoryError, RuntimeError, ValueError) as error:
        if gate.samples == "fail":
            raise
        reason = f"{type(error).__name__}: {error}"
        stages.warning("samples: not answered, which is no verdict: %s", reason)
        return replace(verdict, samples=SampleVerdict(asked=0, not_asked=reason[:300]))
    judged = judge_samples(rows)
    files = dict(verdict.written_files)
    if rows:
        files[run.sample_answers.name] = render_sample_answers(rows)
    verdict = replace(verdict, samples=judged, written_files=files)
    if judged.are_broken and gate.samples == "fail":
        reason = f"{judged.describe()}; gate.samples is fail"
        return _add_reasons(verdict, [Reason("answers_broken", reason)])
    return verdict


def _compare_task_answers(
    verdict: Verdict,
    base: LoadedBase,
    run: RunDirectory,
    evidence: RunEvidence,
    champion: Champion | None,
) -> Verdict:
    """Add the answers to `gate.tasks`, unless the adapter has no sound change to ask about."""
    gate = base.config.gate
    if not gate.tasks or _has_any(verdict.reasons, {"unchanged", "non_finite", "no_effect"}):
        return verdict
    from nested_core.gate.task_answers import answer_tasks

    stages.info("gate: answers to gate.tasks")
    answers = answer_tasks(base, run, evidence, champion)
    results, reasons = judge_answers(gate, answers)
    return replace(_add_reasons(verdict, reasons), tasks=results, answers=answers)


def _check_fused_change(verdict: Verdict, config: FineTuneConfig, evidence: RunEvidence) -> Verdict:
    """Add whether the change survives fusing into the base as it is stored."""
    from nested_core.gate.fused_change import judge_fused_change
    from nested_core.gate.held_out_loss import LoadedBase

    stages.info("gate: whether the change survives fusing")
    before, after = evidence.before.to_mlx(), evidence.after.to_mlx()
    fused, reasons = judge_fused_change(
        LoadedBase.load(config, as_stored=True).model, before, after
    )
    return replace(_add_reasons(verdict, reasons), fused=fused)


def _has_room_for_two_bases() -> bool:
    """Whether this process's base and a second one need no more memory than training did."""
    from nested_core.models.kept_base import get_kept_base

    base = get_kept_base()
    if base is None or base.training_peak == 0:
        return False
    return base.evaluation_peak + base.frozen_bytes() <= base.training_peak


def _release_kept_base() -> None:
    # Here, because `promote` confirms a verdict without a model.
    from nested_core.models.kept_base import release_kept_base

    release_kept_base()


def _make_proof_request(
    config: FineTuneConfig, evidence: RunEvidence, questions: Sequence[Sequence[int]]
) -> ProofRequest:
    """Whether a new process computes with the offered adapter what the trainer computed."""
    logits, dtype = evidence.record.logits, model_compute_dtype(config)
    return ProofRequest(
        model=find_model_folder(config.model),
        initial=evidence.before.path,
        trained=evidence.after.path,
        prompts=logits.prompts,
        columns=logits.columns,
        expected=logits.values,
        is_float32=dtype is not None and dtype == mx.float32,
        trusts_remote_code=config.trust_remote_code,
        questions=questions,
    )


def _prove_in_fresh_process_without_run(
    verdict: Verdict, before: Adapter, after: Adapter
) -> Verdict:
    """The same for any two adapters, if the base that they name is a folder here."""
    named = after.config.get("model")
    if not named or not Path(named, "config.json").is_file():
        skipped = f"the base model {named} is not a folder here: nothing was loaded"
        return replace(verdict, proof={"skipped": skipped})
    base = Path(named)
    if mismatch := fingerprint_reasons(after.config, base) or fingerprint_reasons(
        before.config, base
    ):
        return _add_reasons(verdict, mismatch)
    is_float32 = backend.device() == "cpu"  # as training does there: smaller changes are seen
    request = ProofRequest(base, before.path, after.path, is_float32=is_float32)
    return _add_proof(verdict, prove_effect_in_fresh_process(request))


def _add_proof(verdict: Verdict, proof: Proof) -> Verdict:
    return replace(_add_reasons(verdict, list(proof.reasons)), proof=proof.evidence)
