"""One check of the gate, and what is known of an adapter while the checks are made in turn.

A check reads what the checks before it found, adds what it measures to the verdict, and gives its
reasons once, in its own words. It says itself after which reasons it cannot be made.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.gate.evidence.run_evidence import RunEvidence, TierEvidence, tier_changes
from nested_core.gate.evidence.training_divergence import Divergence
from nested_core.gate.tensors.tensor_diff import compare_tensors
from nested_core.records.answers import AnswerRecord
from nested_core.records.verdict import Code, JudgedAdapter, Reason, Verdict
from nested_core.storage.adapter import Adapter
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.stages import stages

if TYPE_CHECKING:  # `promote` judges an adapter's files again, and loads no model for that
    from nested_core.data.example_digests import Digests
    from nested_core.gate.evidence.champion_adapter import Champion, UnusableChampion
    from nested_core.gate.proof.proof_of_run import ProofOfRun
    from nested_core.measure.losses.chosen_candidate import Candidates
    from nested_core.measure.losses.held_out_loss import HeldOutExamples, LoadedBase
    from nested_core.models.session import Session
    from nested_core.records.losses import ExampleLosses

# The first of these says where training diverged, if it did.
EXPLAINED_BY_DIVERGENCE: frozenset[Code] = frozenset({"non_finite", "loss_regressed"})


@dataclass
class Checked(ABC):
    """What checks are made of, in turn.

    given_by: the name of the check that gave each of the reasons.
    stopped: the checks that could not be made, by name, and the earlier check that stopped each.
    """

    bounds: GateSection = field(default_factory=GateSection, kw_only=True)
    given_by: list[str] = field(default_factory=list, init=False)
    stopped: dict[str, str] = field(default_factory=dict, init=False)

    @abstractmethod
    def add(self, check: Check[Any], reason: Reason) -> None:
        """Add a reason that a check gives."""


@dataclass
class Judged(Checked):
    """Two adapters on disk, and the verdict so far.

    divergence: where training diverged, for a run that did.
    """

    before: Adapter
    after: Adapter
    verdict: Verdict
    divergence: Divergence | None = field(default=None, init=False)

    def add(self, check: Check[Any], reason: Reason) -> None:
        """Add a reason that a check gives, with where training diverged and the guide's place."""
        is_told = any(earlier.code in EXPLAINED_BY_DIVERGENCE for earlier in self.verdict.reasons)
        if self.divergence and reason.code in EXPLAINED_BY_DIVERGENCE and not is_told:
            reason = replace(reason, message=f"{reason.message}; {self.divergence}")
        place = 0 if check.is_cause else len(self.given_by)
        self.given_by.insert(place, check.name)
        reasons = list(self.verdict.reasons)
        reasons.insert(place, reason.with_guide())
        self.verdict = replace(self.verdict, reasons=tuple(reasons))


@dataclass
class CheckedRun(Judged):
    """A run, and what the checks found of it that later ones need, each set by one of them."""

    config: FineTuneConfig
    run: RunDirectory
    evidence: RunEvidence
    tiers: TierEvidence

    # Set when the checks of a run begin, by the check of the base, and by those of losses and
    # champion; a check that is stopped where there is no base is `stopped_by=WITHOUT_MODEL`.
    session: Session = field(init=False)
    proof: ProofOfRun = field(init=False)
    base: LoadedBase = field(init=False)
    held_out: HeldOutExamples | None = field(default=None, init=False)
    losses: ExampleLosses | None = field(default=None, init=False)
    candidates: Candidates = field(init=False)
    trained_on: Digests = field(init=False)
    champion: Champion | UnusableChampion | None = field(default=None, init=False)

    # What is written beside the verdict: files by name, and the answers to `gate.tasks`.
    written_files: dict[str, bytes] = field(default_factory=dict, init=False)
    answers: tuple[AnswerRecord, ...] = field(default=(), init=False)


def begin_verdict(
    before: Adapter,
    after: Adapter,
    bounds: GateSection,
    step: int | None = None,
    tiers: Mapping[str, int] | None = None,
) -> Verdict:
    """What is said of two adapters before any check: their digests, how each tensor changed."""
    return Verdict(
        reasons=(),
        adapter_step=step,
        initial=JudgedAdapter(str(before.path), before.digest()),
        trained=JudgedAdapter(str(after.path), after.digest()),
        tensors=tuple(compare_tensors(before, after, tiers or {})),
        thresholds=bounds.model_dump(),
    )


def begin_judging_run(
    config: FineTuneConfig, run: RunDirectory, evidence: RunEvidence
) -> CheckedRun:
    """A run before any check, with the updates of each tier."""
    tiers = TierEvidence.collect(config, run, evidence)
    before, after, step = evidence.before, evidence.after, evidence.checkpoint.step
    verdict = begin_verdict(before, after, config.gate, step, tiers.tiers.tensors)
    rows = tuple(tier_changes(tiers, verdict.tensors))
    verdict = replace(verdict, tiers=rows, last_step=evidence.last_step)
    return CheckedRun(before, after, verdict, config, run, evidence, tiers, bounds=config.gate)


J = TypeVar("J", bound=Checked)
J_contra = TypeVar("J_contra", bound=Checked, contravariant=True)


@dataclass(frozen=True)
class Check(Generic[J_contra]):
    """One check of the gate.

    find: gives its reasons, and puts what it measured into the verdict.
    stopped_by: the earlier checks of which a reason leaves nothing to check here.
    needs_all: whether any reason does.
    is_cause: whether its reason stands first, as the cause of those that were given before.
    is_asked: whether these bounds ask for it.
    bounds: the keys of `gate` that it judges by. Where gate.json lacks them, the run was judged
        without this check, and `promote` skips it too.
    stage: what it does, for whoever watches; None for what takes no time.
    """

    name: str
    find: Callable[[J_contra], Iterable[Reason]]
    stopped_by: tuple[Check[Any], ...] = ()
    needs_all: bool = False
    is_cause: bool = False
    is_asked: Callable[[GateSection], bool] = lambda _: True
    bounds: tuple[str, ...] = ()
    stage: str | None = None

    def find_stop(self, judged: J_contra) -> str | None:
        """The first check that gave a reason after which this one cannot be made."""
        names = {check.name for check in self.stopped_by}
        return next((by for by in judged.given_by if self.needs_all or by in names), None)


def make_checks(judged: J, checks: Iterable[Check[J]]) -> None:
    """Make each check in turn, unless a reason that was given before stops it."""
    for check in checks:
        if not check.is_asked(judged.bounds):
            continue
        if (stop := check.find_stop(judged)) is not None:
            judged.stopped[check.name] = stop
            continue
        if check.stage is not None:
            stages.info("gate: %s", check.stage)
        for reason in check.find(judged):
            judged.add(check, reason)


def log_stopped_checks(judged: Checked) -> None:
    """Say which checks could not be made, and which earlier one stopped them."""
    stopped: dict[str, list[str]] = {}
    for check, by in judged.stopped.items():
        stopped.setdefault(by, []).append(check)
    if stopped:
        for by, checks in stopped.items():
            stages.info("gate: not checked, because %s failed: %s", by, ", ".join(checks))
