"""What a check of the gate is, and the state that the checks share while they run in order.

A check reads what earlier checks stored in that state, adds its measurements to the verdict, and
returns reasons to reject the adapter. It names the earlier checks after whose failure it cannot
run.

A check also declares what it will compute with the model, by which the gate's time is forecast:
work is counted as if no answer were in the cache of answers.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Generic, Never, TypeVar

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import SPLITS_BY_HELD_OUT_CHOICE, GateSection
from nested_core.gate.evidence.run_evidence import RunEvidence, TierEvidence, tier_changes
from nested_core.gate.evidence.training_divergence import Divergence
from nested_core.gate.tensors.tensor_diff import compare_tensors
from nested_core.models.chat_template import Tokenizer
from nested_core.records.answers import AnswerRecord
from nested_core.records.dataset import held_out_split, read_dataset_record
from nested_core.records.start import read_start
from nested_core.records.verdict import Code, JudgedAdapter, Reason, Verdict
from nested_core.registry.folders import name_exists
from nested_core.registry.policy import read_reference
from nested_core.registry.queries import read_champion
from nested_core.storage.adapter import Adapter
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import open_regular
from nested_core.text.groups import grouped
from nested_core.text.stages import stages

if TYPE_CHECKING:  # `promote` judges an adapter's files again, and loads no model for that
    from nested_core.data.example_digests import TrainedRows
    from nested_core.gate.evidence.champion_adapter import Champion, UnusableChampion
    from nested_core.gate.proof.proof_of_run import ProofOfRun
    from nested_core.measure.losses.chosen_candidate import Candidates
    from nested_core.measure.losses.held_out_loss import HeldOutExamples, LoadedBase
    from nested_core.measure.losses.prediction_comparison import ExamplePredictions
    from nested_core.models.session import Session
    from nested_core.records.losses import ExampleLosses


# If training diverged, the first reason with one of these codes also says at which step.
EXPLAINED_BY_DIVERGENCE: frozenset[Code] = frozenset({"non_finite", "loss_regressed"})


@dataclass
class Checked(ABC):
    """The state of a judgement, which each check reads and adds to.

    failed_checks: for each reason so far, the name of the check that gave it.
    stopped: for each check that could not run, the name of the failed check that prevented it.
    """

    bounds: GateSection = field(default_factory=GateSection, kw_only=True)
    failed_checks: list[str] = field(default_factory=list, init=False)
    stopped: dict[str, str] = field(default_factory=dict, init=False)

    @abstractmethod
    def add(self, check: Check[Never], reason: Reason) -> None:
        """Record a reason to reject the adapter, which `check` gave."""


@dataclass
class Judged(Checked):
    """The initial and the trained adapter, read from disk, and the verdict so far.

    divergence: where the run's training diverged; None if it did not.
    """

    before: Adapter
    after: Adapter
    verdict: Verdict
    divergence: Divergence | None = field(default=None, init=False)

    def add(self, check: Check[Never], reason: Reason) -> None:
        """Add a reason to the verdict, with a link to its section of the guide.

        If training diverged, the first reason that this explains also names the step. The reason
        of a check with `is_cause` comes first in the verdict, every other one last.
        """
        is_explained = any(r.code in EXPLAINED_BY_DIVERGENCE for r in self.verdict.reasons)
        if self.divergence and reason.code in EXPLAINED_BY_DIVERGENCE and not is_explained:
            reason = replace(reason, message=f"{reason.message}; {self.divergence}")
        position = 0 if check.is_cause else len(self.failed_checks)
        self.failed_checks.insert(position, check.name)
        reasons = list(self.verdict.reasons)
        reasons.insert(position, reason.with_guide())
        self.verdict = replace(self.verdict, reasons=tuple(reasons))


@dataclass
class CheckedRun(Judged):
    """A run being judged: its files, and the results of earlier checks that later checks need."""

    config: FineTuneConfig
    run: RunDirectory
    evidence: RunEvidence
    tiers: TierEvidence

    # `run_gate_checks` sets session and proof; the checks of base, losses and champion set the
    # rest. A check that reads `base` must be `stopped_by=WITHOUT_MODEL`.
    session: Session = field(init=False)
    proof: ProofOfRun = field(init=False)
    base: LoadedBase = field(init=False)
    held_out: HeldOutExamples | None = field(default=None, init=False)
    losses: ExampleLosses | None = field(default=None, init=False)
    predictions: ExamplePredictions = field(init=False)  # that the losses are from
    candidates: Candidates = field(init=False)
    trained_on: TrainedRows = field(init=False)
    champion: Champion | UnusableChampion | None = field(default=None, init=False)

    # To be written beside gate.json: file contents by name, and the answers to `gate.tasks`.
    written_files: dict[str, bytes] = field(default_factory=dict, init=False)
    answers: tuple[AnswerRecord, ...] = field(default=(), init=False)


def begin_verdict(
    before: Adapter,
    after: Adapter,
    bounds: GateSection,
    step: int | None = None,
    tiers: Mapping[str, int] | None = None,
) -> Verdict:
    """Return a verdict without reasons, to which the gate's checks then add.

    It has both adapters' digests and the change of each tensor.

    before, after: the adapter before and after training. bounds: the gate's configuration.
    step: the training step that `after` comes from.
    tiers: the tier of each tensor, by name; None if the adapters do not come from a run.
    """
    return Verdict(
        reasons=(),
        adapter_step=step,
        initial=JudgedAdapter(str(before.path), before.digest()),
        trained=JudgedAdapter(str(after.path), after.digest()),
        tensors=tuple(compare_tensors(before, after, tiers or {})),
        thresholds=bounds.model_dump(),
    )


def begin_judging(config: FineTuneConfig, run: RunDirectory, evidence: RunEvidence) -> CheckedRun:
    """Return the state of a run before its first check, with the update counts of each tier."""
    tiers = TierEvidence.collect(run, evidence)
    before, after, step = evidence.before, evidence.after, evidence.checkpoint.step
    verdict = begin_verdict(before, after, config.gate_bounds, step, tiers.tiers.tensors)
    rows = tuple(tier_changes(tiers, verdict.tensors))
    verdict = replace(verdict, tiers=rows, last_step=evidence.last_step)
    return CheckedRun(
        before, after, verdict, config, run, evidence, tiers, bounds=config.gate_bounds
    )


J = TypeVar("J", bound=Checked)
J_contra = TypeVar("J_contra", bound=Checked, contravariant=True)


@dataclass(frozen=True)
class Check(Generic[J_contra]):
    """One check of the gate.

    find: returns the reasons to reject the adapter, and stores measurements in the verdict.
    stopped_by: the earlier checks after whose failure this check cannot run.
    needs_all: whether the check cannot run after the failure of any earlier check.
    is_cause: whether its reason is listed first, as the cause of the earlier reasons.
    is_asked: whether the `gate` section of the configuration asks for the check.
    after_answers: whether a room's check reads the answers, and runs after the checks of these.
    bounds: the keys of `gate` that it judges by. If gate.json lacks them, the run was judged
        without this check, and `promote` skips it too.
    stage: the progress message shown while it runs; None for a check that takes no time.
    plan_work: returns what it computes with the model; None for a check that computes nothing.
    """

    name: str
    find: Callable[[J_contra], Iterable[Reason]]
    stopped_by: tuple[Check[Never], ...] = ()
    needs_all: bool = False
    is_cause: bool = False
    after_answers: bool = False
    is_asked: Callable[[GateSection], bool] = lambda _: True
    bounds: tuple[str, ...] = ()
    stage: str | None = None
    plan_work: Callable[[RunToJudge], GateWork] | None = None

    def find_stopping_check(self, judged: J_contra) -> str | None:
        """Return the name of the first failed check that prevents this one; None if it can run."""
        names = {check.name for check in self.stopped_by}
        return next((f for f in judged.failed_checks if self.needs_all or f in names), None)


@dataclass(frozen=True)
class GateChecks:
    """A room's checks of a run's adapter; they run after the losses, with the base loaded."""

    checks: tuple[Check[CheckedRun], ...]


def run_checks(judged: J, checks: Iterable[Check[J]]) -> None:
    """Run the checks in order and add their reasons to `judged`.

    A check is skipped if the bounds do not ask for it or an earlier failed check stops it.
    """
    for check in checks:
        if not check.is_asked(judged.bounds):
            continue
        if (stopped_by := check.find_stopping_check(judged)) is not None:
            judged.stopped[check.name] = stopped_by
            continue
        if check.stage is not None:
            stages.info("gate: %s", check.stage)
        for reason in check.find(judged):
            judged.add(check, reason)


def log_stopped_checks(judged: Checked) -> None:
    """Log which checks could not run, grouped by the earlier check whose failure stopped them."""
    stopped = grouped((failed, check) for check, failed in judged.stopped.items())
    for failed_check, checks in stopped.items():
        stages.info("gate: not checked, because %s failed: %s", failed_check, ", ".join(checks))


@dataclass(frozen=True, kw_only=True)
class GateWork:
    """What one check computes.

    rows: rows of data through the model, each counted once for every adapter.
    prompt_tokens: tokens of prompts that are read.
    tokens: tokens of answers that are generated one after the other, `answers` answers at once.
    """

    rows: int = 0
    prompt_tokens: int = 0
    tokens: int = 0
    answers: int = 0


@dataclass(frozen=True)
class RunToJudge:
    """A run that was validated and loaded, with the tokenizer of its base."""

    config: FineTuneConfig
    run: RunDirectory
    tokenizer: Tokenizer

    def count_rows(self, rows: int, adapters: int, *, is_base_among: bool = False) -> int:
        """Return the most rows that one pass over `rows` computes with so many adapters.

        A room's loss may compare each with the base, which it computes unless it is among them.
        """
        return rows * (adapters + (self.config.training.loss is not None and not is_base_among))

    @cached_property
    def held_out_rows(self) -> int:
        """The examples that the gate measures losses on."""
        choice, splits = self.config.gate.held_out, read_dataset_record(self.run.dataset).splits
        if (split := held_out_split(choice, splits)) is not None:
            return splits[split].rows
        return 0 if choice in SPLITS_BY_HELD_OUT_CHOICE else count_lines(Path(choice))

    @cached_property
    def goes_on(self) -> bool:
        """Whether the run begins from an adapter that was trained before."""
        start = read_start(self.config, self.run)
        if start is None:
            return self.config.resume_adapter_file is not None
        return start.champion is not None and start.choice.policy == "continue"

    @cached_property
    def champion(self) -> str | None:
        """The champion that the run is compared with; None without one, or without a registry."""
        location = self.config.registry.location
        return None if location is None or not name_exists(*location) else read_champion(*location)

    @cached_property
    def rivals(self) -> tuple[str | None, str | None]:
        """The champion, and the policy's reference version, where they are not the run's start."""
        reference = None
        if self.champion is not None and (location := self.config.registry.location) is not None:
            reference = read_reference(*location)
        reference = None if reference == self.champion else reference
        is_start = self.goes_on and self.config.continual.start is not None
        return None if is_start else self.champion, reference

    def ask(self, prompts: Sequence[Sequence[int]], tokens: Sequence[int]) -> GateWork:
        """The work of prompts, as token ids, to models whose answers have so many tokens each."""
        read = sum(map(len, prompts)) * len(tokens)
        return GateWork(prompt_tokens=read, tokens=sum(tokens), answers=len(prompts))


def count_lines(path: Path) -> int:
    """The lines of a file; 0 for a file that is not there, which its reader reports."""
    if not path.is_file():
        return 0
    with open_regular(path, follow_links=True) as (lines, _):
        return sum(1 for _ in lines)
