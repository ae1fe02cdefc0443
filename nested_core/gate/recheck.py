"""A recorded verdict against its run's files, before it is registered; no model is loaded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.errors import JUDGE_AGAIN, DamagedError
from nested_core.gate.answers.answer_bounds import judge_answers, judge_samples
from nested_core.gate.chosen_candidate import Candidates, read_candidates
from nested_core.gate.file_checks import CHECKS_OF_FILES
from nested_core.gate.fresh_process_check import TOLERANCE_FLOAT32, TOLERANCE_NARROW_DTYPES
from nested_core.gate.judged import begin_judging_run, make_checks
from nested_core.gate.loss_figures import (
    harm_reasons,
    summarise_champion,
    summarise_drift,
    summarise_losses,
)
from nested_core.gate.run_evidence import collect_evidence
from nested_core.records.answers import read_answers, read_sample_answers
from nested_core.records.dataset import DatasetReport, held_out_file, read_dataset_record
from nested_core.records.losses import ExampleLosses, read_example_losses
from nested_core.records.verdict import ChampionLoss, Drift, Validation, Verdict
from nested_core.records.verdict_file import require_verdict_manifest
from nested_core.storage.manifest import FileEntry, describe_file
from nested_core.storage.run_directory import RunDirectory

NORM_TOLERANCE = 1e-4  # relative: sums of squares depend on the machine's BLAS
LOGIT_TOLERANCES = (TOLERANCE_FLOAT32, TOLERANCE_NARROW_DTYPES)


def recheck_verdict(config: FineTuneConfig, run: RunDirectory, recorded: Verdict) -> None:
    """Raise DamagedError unless the run's files bear out `recorded`, a gate.json that says passed.

    The manifest must hold their digests, and all checks that need no model are done again, so that
    a verdict written by hand is worth nothing. The losses and the proof are taken as they are
    recorded, where they agree with the configuration and the data; all figures of losses and
    answers are computed again from those of single examples. A check by a bound that the verdict
    does not record was not made when it was given, and is not made now.
    """
    evidence = collect_evidence(run)
    judged = begin_judging_run(config, run, evidence)
    asked = recorded.thresholds or {}
    make_checks(judged, (check for check in CHECKS_OF_FILES if asked.keys() >= {*check.bounds}))
    verdict = judged.verdict
    if not verdict.has_passed:
        raise DamagedError(
            f"{run.gate} says passed, and the files that it judged do not: {verdict.summary()}.",
            advice=JUDGE_AGAIN,
        )
    bound = require_verdict_manifest(run.path, recorded)
    files = evidence.files | {run.config.name: describe_file(run.config)}
    written = {run.training_examples}
    written |= {path for path in (run.sample_answers, run.canary) if path.name in bound}
    if run.gate_losses.name in bound or recorded.validation is not None:
        written.add(run.gate_losses)
    files |= {path.name: describe_file(path) for path in written}
    files |= task_file_entries(config.gate, run)
    names = sorted({*files, *bound} - {run.gate.name})
    if changed := [name for name in names if files.get(name) != bound.get(name)]:
        raise DamagedError(
            f"{run.gate} was not given on the {' and '.join(changed)} that {run.path} holds: "
            f"{run.manifest.name} has other digests of them. Bring back what was there; if it is "
            f"lost:",
            advice=JUDGE_AGAIN,
        )
    wrong = list(_differing_fields(config.gate, verdict, recorded))
    wrong += _missing_or_unexpected_fields(config.gate, recorded, read_dataset_record(run.dataset))
    wrong += _differing_losses(config.gate, recorded, run)
    wrong += _differing_answers(config.gate, run, recorded, run.sample_answers.name in bound)
    if wrong:
        files_of = {"tasks": run.answers.name, "samples": run.sample_answers.name}
        place = files_of.get("".join(wrong), "the files")
        raise DamagedError(
            f"{run.gate} is not the verdict on {place} beside it: {', '.join(wrong)} differ.",
            advice=JUDGE_AGAIN,
        )


def task_file_entries(gate: GateSection, run: RunDirectory) -> dict[str, FileEntry]:
    """The entries for the manifest of what the results rest on; none without suites."""
    paths = (run.suites, run.answers) if gate.tasks else ()
    return {path.name: describe_file(path) for path in paths}


def _differing_fields(gate: GateSection, verdict: Verdict, recorded: Verdict) -> Iterator[str]:
    """The fields that were computed again, and came out otherwise."""
    for key in ("adapter_step", "last_step", "tiers"):
        if getattr(recorded, key) != getattr(verdict, key):
            yield key
    if not _are_same_bounds(recorded.thresholds, gate):
        yield "thresholds"
    given, now = ([asdict(tensor) for tensor in own.tensors] for own in (recorded, verdict))
    if not is_close_figure(given, now, abs_tol=0.0):
        yield "tensors"
    for side in ("initial", "trained"):
        if getattr(recorded, side).digest != getattr(verdict, side).digest:
            yield side


def _are_same_bounds(recorded: dict[str, Any] | None, configured: GateSection) -> bool:
    """Whether the recorded bounds are those of the run's configuration.

    One that is not recorded was not asked for when the verdict was given: the run's configuration
    cannot have set it.
    """
    if not recorded:
        return False
    defaults = GateSection().model_dump(mode="json")
    return defaults | recorded == configured.model_dump(mode="json")


def _missing_or_unexpected_fields(
    gate: GateSection, recorded: Verdict, dataset: DatasetReport
) -> Iterator[str]:
    """The fields that are there, or not, against what was configured and what data there is."""
    has_held_out = held_out_file(gate.held_out, dataset) is not None
    expected = {
        "validation": has_held_out,
        "general": gate.general_data is not None,
        "fused": gate.check_fused,
        "proof": True,
    }
    for key, is_expected in expected.items():
        if (getattr(recorded, key) is not None) is not is_expected:
            yield key
    has_drift = recorded.drift is not None
    if (has_drift and not has_held_out) or (gate.max_kl is not None and not has_drift):
        yield "drift"
    if recorded.proof is not None and recorded.proof.get("tolerance") not in LOGIT_TOLERANCES:
        yield "proof"  # or it was not held against the trainer's logits


def _differing_losses(gate: GateSection, recorded: Verdict, run: RunDirectory) -> Iterator[str]:
    """The figures of held-out losses that gate-losses.jsonl does not give."""
    validation, champion = recorded.validation, recorded.champion
    reference = recorded.reference
    if validation is None:
        for key in ("champion", "reference"):
            rival = getattr(recorded, key)
            if rival is not None and rival.not_compared is None:
                yield key
        return
    losses = read_example_losses(run.gate_losses)
    # Whether a file of its own holds validation examples is not known here, and was recorded.
    candidates = Candidates()
    if losses.file == "valid.jsonl" or validation.chosen_among != 1:
        candidates = read_candidates(run.validation_losses)
    judged = summarise_losses(
        losses,
        selected_on_same_data=validation.selected_on_same_data,
        has_one_answer=validation.has_one_answer,
        bounds=gate,
        candidates=candidates,
    )
    yield from _differing_figures("validation", validation, judged)
    is_asked = "max_harmed_share" in (recorded.thresholds or {})
    if is_asked and harm_reasons(losses, judged, gate):
        yield "validation.harmed"
    if losses.file != held_out_file(gate.held_out, read_dataset_record(run.dataset)):
        yield "validation.file"
    yield from _differing_figures("drift", recorded.drift, summarise_drift(losses))
    if (losses.base_drift is not None) is not gate.drift:
        yield "drift.kl_base"
    yield from _differing_rival("champion", champion, losses, gate, candidates)
    if reference is not None and champion is not None and reference.version == champion.version:
        yield from _differing_figures("reference", reference, champion)
        return
    own = replace(losses, champion=losses.reference)
    yield from _differing_rival("reference", reference, own, gate, candidates)


def _differing_rival(
    key: str,
    recorded: ChampionLoss | None,
    losses: ExampleLosses,
    gate: GateSection,
    candidates: Candidates,
) -> Iterator[str]:
    """The figures of champion or reference that its losses, as `champion`, do not give."""
    if recorded is None or losses.champion is None:
        is_not_compared = recorded is not None and recorded.not_compared is not None
        if losses.champion is not None or (recorded is not None and not is_not_compared):
            yield key
        return
    now = summarise_champion(recorded.version, losses, gate, candidates)
    yield from _differing_figures(key, recorded, now)


def _differing_figures(
    name: str,
    recorded: Validation | Drift | ChampionLoss | None,
    recomputed: Validation | Drift | ChampionLoss | None,
) -> Iterator[str]:
    """The fields in which figures differ; their name alone where only one of both is there."""
    if recorded is None or recomputed is None:
        if recorded is not recomputed:
            yield name
        return
    given = asdict(recorded)
    for key, figure in asdict(recomputed).items():
        if not is_close_figure(given[key], figure):
            yield f"{name}.{key}"


def _differing_answers(
    gate: GateSection, run: RunDirectory, recorded: Verdict, has_samples: bool
) -> Iterator[str]:
    """What was recorded of answers, and what the files that hold them do not give.

    That no sample was asked is taken as recorded where the manifest has no file of their answers.
    """
    results, reasons = judge_answers(gate, read_answers(run.answers)) if gate.tasks else ((), [])
    now, given = ([asdict(result) for result in rows] for rows in (results, recorded.tasks))
    if reasons or not is_close_figure(given, now):
        yield "tasks"
    samples = recorded.samples
    if not has_samples and (samples is None or samples.not_asked is not None):
        return
    if samples != judge_samples(read_sample_answers(run.sample_answers) if has_samples else ()):
        yield "samples"


def is_close_figure(recorded: Any, recomputed: Any, *, abs_tol: float = NORM_TOLERANCE**2) -> bool:
    """Whether a figure, or a list or an object of figures, is what another machine may compute."""
    if isinstance(recomputed, dict):
        if not isinstance(recorded, dict) or recorded.keys() != recomputed.keys():
            return False
        recorded, recomputed = [recorded[key] for key in recomputed], list(recomputed.values())
    if isinstance(recomputed, tuple | list):
        return (
            isinstance(recorded, tuple | list)
            and len(recorded) == len(recomputed)
            and all(map(partial(is_close_figure, abs_tol=abs_tol), recorded, recomputed))
        )
    if not isinstance(recomputed, float) or not isinstance(recorded, int | float):
        return bool(recorded == recomputed)
    return math.isclose(recorded, recomputed, rel_tol=NORM_TOLERANCE, abs_tol=abs_tol)
