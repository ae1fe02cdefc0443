"""Compare a run's recorded verdict with its files again before registration, without a model."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import astuple
from itertools import chain

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.errors import JUDGE_AGAIN, DamagedError
from nested_core.gate.checks.file_checks import CHECKS_OF_FILES
from nested_core.gate.checks.judged import begin_judging, run_checks
from nested_core.gate.evidence.run_evidence import RunEvidence, collect_evidence
from nested_core.records.judged_run import JudgedRun
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import BoundVerdict, bind_verdict
from nested_core.storage.manifest import FileEntry, describe_file
from nested_core.storage.run_directory import RunDirectory

NORM_TOLERANCE = 1e-4  # relative: sums of squares depend on the machine's BLAS


def recheck_verdict(config: FineTuneConfig, run: RunDirectory) -> JudgedRun:
    """Confirm that a run's gate.json says passed and still matches the run's files.

    The file digests must equal those in the manifest. The checks that need no model run again, and
    must reproduce the tensors, tiers and thresholds of gate.json. Losses and answers are not
    computed again: their files only have to be unchanged. A check is skipped if gate.json does
    not record its thresholds, as one of an older version may. Raises
    ConfigError if the run was never judged, GateRejected if the adapter did not pass, DamagedError
    if verdict and files do not agree.
    """
    bound = bind_verdict(run.path, must_pass=True)  # with the digests of the files it was given on
    evidence = collect_evidence(run)
    judged = begin_judging(config, run, evidence)
    recorded = bound.verdict
    bounds = recorded.thresholds or {}
    run_checks(judged, (check for check in CHECKS_OF_FILES if bounds.keys() >= {*check.bounds}))
    verdict = judged.verdict
    if not verdict.has_passed:
        raise DamagedError(
            f"{run.gate} says passed, and the files that it evaluated do not: {verdict.summary()}.",
            advice=JUDGE_AGAIN,
        )
    files = evidence.files | task_file_entries(config.gate, run)
    files[run.gate.name] = bound.files[run.gate.name]
    measured = {path.name for path in (*run.measured, run.suites) if path.exists()}
    # Files that the checks above did not read are hashed here; each verdict has the first two.
    unread = {run.config.name, run.training_examples.name, *measured, *bound.files} - files.keys()
    if recorded.validation is not None:
        unread.add(run.gate_losses.name)
    if any(suite.canary for suite in config.gate.tasks):
        unread.add(run.canary.name)
    files |= {name: describe_file(run.path / name) for name in unread}
    if changed := [name for name in sorted(files) if files[name] != bound.files.get(name)]:
        raise DamagedError(
            f"{run.gate} was not given on the {' and '.join(changed)} that {run.path} holds: "
            f"{run.manifest.name} has other digests of them. Bring back what was there; if it is "
            f"lost:",
            advice=JUDGE_AGAIN,
        )
    if wrong := list(_differing_fields(config.gate_bounds, verdict, recorded)):
        raise DamagedError(
            f"{run.gate} is not the verdict on the files beside it: {', '.join(wrong)} differ.",
            advice=JUDGE_AGAIN,
        )
    return from_evidence(run, bound, evidence)


def from_evidence(run: RunDirectory, bound: BoundVerdict, evidence: RunEvidence) -> JudgedRun:
    """Build a JudgedRun from a run's bound verdict and the files that the gate already read."""
    judged = JudgedRun(run, bound, evidence.after)
    judged.dataset = evidence.dataset
    return judged


def task_file_entries(gate: GateSection, run: RunDirectory) -> dict[str, FileEntry]:
    """Return manifest entries (size and SHA-256) of the suites and answers files.

    Empty if the gate asks no suites (`gate.tasks` is empty).
    """
    paths = (run.suites, run.answers) if gate.tasks else ()
    return {path.name: describe_file(path) for path in paths}


def _differing_fields(gate: GateSection, verdict: Verdict, recorded: Verdict) -> Iterator[str]:
    """Yield the names of verdict fields whose recomputed value differs from gate.json's."""
    for key in ("adapter_step", "last_step", "tiers"):
        if getattr(recorded, key) != getattr(verdict, key):
            yield key
    if not _are_same_bounds(recorded.thresholds, gate):
        yield "thresholds"
    old = [astuple(tensor) for tensor in recorded.tensors]
    new = [astuple(tensor) for tensor in verdict.tensors]
    if len(old) != len(new) or not all(map(_is_close, chain(*old), chain(*new))):
        yield "tensors"
    for side in ("initial", "trained"):
        if getattr(recorded, side).digest != getattr(verdict, side).digest:
            yield side


def _are_same_bounds(recorded: dict[str, object] | None, configured: GateSection) -> bool:
    """Whether the thresholds in gate.json are those of the run's configuration.

    A threshold that did not exist yet when gate.json was written is missing there. The run's
    configuration cannot have set it either, so its default is assumed.
    """
    if not recorded:
        return False
    defaults = GateSection().model_dump(mode="json")
    return defaults | recorded == configured.model_dump(mode="json")


def _is_close(recorded: object, recomputed: object) -> bool:
    """Whether two values are equal, or are floats that differ only by rounding between machines."""
    if isinstance(recorded, float) and isinstance(recomputed, float):
        return math.isclose(recorded, recomputed, rel_tol=NORM_TOLERANCE)
    return bool(recorded == recomputed)
