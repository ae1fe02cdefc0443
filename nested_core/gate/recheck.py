"""A recorded verdict against its run's files, before it is registered; no model is loaded."""

from __future__ import annotations

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import JUDGE_AGAIN, DamagedError
from nested_core.gate.file_checks import CHECKS_OF_FILES
from nested_core.gate.judged import begin_judging_run, make_checks
from nested_core.gate.recorded_verdict import require_same_verdict
from nested_core.gate.run_evidence import collect_evidence
from nested_core.gate.sample_bounds import require_same_samples
from nested_core.gate.task_bounds import require_same_task_results, task_file_entries
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import require_verdict_manifest
from nested_core.storage.manifest import describe_file
from nested_core.storage.run_directory import RunDirectory


def recheck_verdict(config: FineTuneConfig, run: RunDirectory, recorded: Verdict) -> None:
    """Raise DamagedError unless the run's files bear out `recorded`, a gate.json that says passed.

    The manifest must hold their digests, and all checks that need no model are done again, so that
    a verdict written by hand is worth nothing. The losses and the proof are taken as they are
    recorded, where they agree with the configuration and the data. A check by a bound that the
    verdict does not record was not made when it was given, and is not made now.
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
    require_same_verdict(verdict, recorded, run)
    require_same_task_results(config.gate, run, recorded)
    require_same_samples(run, recorded, has_answers=run.sample_answers.name in bound)
