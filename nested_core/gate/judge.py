"""The order of the gate's checks: for any two adapters, and for a run with all its files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.gate.checks.champion import CHAMPION, REFERENCE
from nested_core.gate.checks.file_checks import CHECKS_OF_ADAPTERS, CHECKS_OF_FILES
from nested_core.gate.checks.judged import (
    Check,
    CheckedRun,
    GateChecks,
    Judged,
    begin_judging,
    begin_verdict,
    log_stopped_checks,
    run_checks,
)
from nested_core.gate.checks.losses import (
    BASE,
    COLLAPSE,
    DRIFT,
    GENERAL_TEXT,
    HARMED_EXAMPLES,
    LOSSES,
    TRAINING_LOSS,
    WORSE_LOSS,
)
from nested_core.gate.checks.proof import PROOF, PROOF_WITHOUT_RUN
from nested_core.gate.checks.samples import SAMPLES
from nested_core.gate.checks.tasks import TASKS
from nested_core.gate.evidence.run_evidence import collect_evidence
from nested_core.gate.evidence.training_divergence import find_divergence
from nested_core.gate.proof.proof_of_run import ProofOfRun
from nested_core.models.session import Session
from nested_core.records.metrics import read_metrics
from nested_core.records.start import read_start
from nested_core.records.verdict import Verdict
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.stages import stages

# These run after CHECKS_OF_FILES; the rooms' checks run between losses and answers. `stopped_by` of
# a check names the earlier checks after whose failure it cannot run.
CHECKS_OF_LOSSES: tuple[Check[CheckedRun], ...] = (
    BASE,
    LOSSES,
    COLLAPSE,
    WORSE_LOSS,
    GENERAL_TEXT,
    HARMED_EXAMPLES,
    DRIFT,
    CHAMPION,
    REFERENCE,
)
CHECKS_OF_ANSWERS: tuple[Check[CheckedRun], ...] = (SAMPLES, TASKS, TRAINING_LOSS)


def verify_adapters(
    initial: Path, trained: Path, bounds: GateSection | None = None, *, step: int | None = None
) -> Verdict:
    """Compare two adapter folders by their files alone, without a run directory or data.

    If the base model named in adapter_config.json is a folder on this machine, a new process also
    loads it with each adapter and compares the logits. `step` is only recorded in the verdict.
    Raises ConfigError if a path is no directory, DamagedError if an adapter cannot be read.
    """
    bounds = bounds or GateSection()
    with ThreadPoolExecutor(2) as pool:
        before, after = pool.map(_read_and_hash, (initial, trained))
    judged = Judged(before, after, begin_verdict(before, after, bounds, step), bounds=bounds)
    run_checks(judged, (*CHECKS_OF_ADAPTERS, PROOF_WITHOUT_RUN))
    return judged.verdict


def _read_and_hash(path: Path) -> Adapter:
    """Read an adapter and compute its digest, which the adapter object caches."""
    adapter = read_adapter(path, follow_links=True)
    adapter.digest()
    return adapter


def list_checks_with_model() -> list[Check[CheckedRun]]:
    """Return a run's checks that need the base model, in order, including the rooms' checks."""
    room_checks = [check for room in seams.load_all(GateChecks) for check in room.checks]
    first = [check for check in room_checks if not check.after_answers]
    last = [check for check in room_checks if check.after_answers]
    return [*CHECKS_OF_LOSSES, *first, *CHECKS_OF_ANSWERS, *last, PROOF]


def run_gate_checks(
    config: FineTuneConfig, run: RunDirectory, session: Session | None = None
) -> CheckedRun:
    """Run every check of the gate on a run: files, tiers, losses, answers and the fresh process.

    The returned object holds the verdict and the contents of the files to write beside gate.json.
    The fresh process starts early, while other checks compute, if there is memory for it. `session`
    may hold a base model that training already loaded. Raises DamagedError if the run's files
    changed since training wrote them.
    """
    stages.info("gate: changes of the tensors, updates of the tiers")
    evidence = collect_evidence(run)
    judged = begin_judging(config, run, evidence)
    judged.session = session or Session()
    start = read_start(config, run)
    rate = 0.0 if config.lr_schedule else config.learning_rate  # a schedule has its own rates
    rate *= 1.0 if start is None else start.rate_share
    judged.divergence = find_divergence(read_metrics(run.metrics), evidence.checkpoint.step, rate)
    run_checks(judged, CHECKS_OF_FILES)
    with closing(ProofOfRun(config, evidence, judged.divergence, judged.session)) as judged.proof:
        if judged.verdict.has_passed:
            judged.proof.begin_if_there_is_room()
        run_checks(judged, list_checks_with_model())
    log_stopped_checks(judged)
    return judged
