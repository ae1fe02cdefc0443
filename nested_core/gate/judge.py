"""The order of the gate's checks: for any two adapters, and for a run with all its files."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.gate.checks.base import BASE
from nested_core.gate.checks.champion import CHAMPION, REFERENCE
from nested_core.gate.checks.divergence import COLLAPSE, TRAINING_LOSS
from nested_core.gate.checks.file_checks import CHECKS_OF_ADAPTERS, CHECKS_OF_FILES
from nested_core.gate.checks.judged import (
    Check,
    CheckedRun,
    Judged,
    begin_judging_run,
    begin_verdict,
    log_stopped_checks,
    make_checks,
)
from nested_core.gate.checks.losses import DRIFT, GENERAL_TEXT, HARMED_EXAMPLES, LOSSES, WORSE_LOSS
from nested_core.gate.checks.proof import PROOF, PROOF_WITHOUT_RUN
from nested_core.gate.checks.samples import SAMPLES
from nested_core.gate.checks.tasks import TASKS
from nested_core.gate.evidence.run_evidence import collect_evidence
from nested_core.gate.evidence.training_divergence import find_divergence
from nested_core.gate.proof.proof_of_run import ProofOfRun
from nested_core.models.session import Session
from nested_core.records.metrics import read_metrics
from nested_core.records.verdict import Verdict
from nested_core.storage.adapter import Adapter, read_adapter
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.stages import stages

# After CHECKS_OF_FILES, with those of the rooms between the two. Each says itself which earlier
# checks stop it.
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
CHECKS_OF_ANSWERS: tuple[Check[CheckedRun], ...] = (
    SAMPLES,
    TASKS,
    TRAINING_LOSS,
    PROOF,
)


def verify_adapters(
    initial: Path, trained: Path, bounds: GateSection | None = None, *, step: int | None = None
) -> Verdict:
    """Judge two adapter folders from their files, without a run directory or data.

    If the base model that they name is a folder here, a new process loads it with each of them.
    Raises ConfigError if a path is no directory, DamagedError if an adapter is not sound.
    """
    bounds = bounds or GateSection()
    with ThreadPoolExecutor(2) as pool:
        before, after = pool.map(_read_and_hash, (initial, trained))
    judged = Judged(before, after, begin_verdict(before, after, bounds, step), bounds=bounds)
    make_checks(judged, (*CHECKS_OF_ADAPTERS, PROOF_WITHOUT_RUN))
    return judged.verdict


def _read_and_hash(path: Path) -> Adapter:
    adapter = read_adapter(path, follow_links=True)
    adapter.digest()  # the adapter keeps it
    return adapter


def judge_run(config: FineTuneConfig, run: RunDirectory) -> Verdict:
    """The verdict on the adapter that a run offers; nothing is written.

    Raises DamagedError if the folder is not as training left it.
    """
    return make_checks_of_run(config, run).verdict


def list_checks_with_model() -> list[Check[CheckedRun]]:
    """The checks of a run that need its base model, with those of the rooms, in their order."""
    of_rooms = [check for checks in seams.load_all("gate_checks") for check in checks]
    return [*CHECKS_OF_LOSSES, *of_rooms, *CHECKS_OF_ANSWERS]


def make_checks_of_run(
    config: FineTuneConfig, run: RunDirectory, session: Session | None = None
) -> CheckedRun:
    """Judge the adapter that a run offers: its files, tiers, losses, and the fresh process.

    With the verdict, what is to be written beside it. Raises DamagedError if the folder is not as
    training left it.
    """
    stages.info("gate: changes of the tensors, updates of the tiers")
    evidence = collect_evidence(run)
    judged = begin_judging_run(config, run, evidence)
    judged.session = session or Session()
    judged.divergence = find_divergence(
        read_metrics(run.metrics), evidence.checkpoint.step, config.learning_rate
    )
    make_checks(judged, CHECKS_OF_FILES)
    with closing(ProofOfRun(config, evidence, judged.divergence, judged.session)) as judged.proof:
        if judged.verdict.has_passed:
            judged.proof.begin_if_there_is_room()
        make_checks(judged, list_checks_with_model())
    log_stopped_checks(judged)
    return judged
