"""The verdict, as gate.json holds it: passed, or failed with reasons."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from nested_core.config.gate import GateSection
from nested_core.errors import DamagedError, describe_first_problem, join_first_values
from nested_core.gate.answers.answer_records import AnswerRecord
from nested_core.gate.chosen_candidate import Candidates
from nested_core.gate.example_losses import ExampleLosses, Vector
from nested_core.gate.harmed_examples import HarmedExamples
from nested_core.storage.atomic import finite_or_none
from nested_core.storage.manifest import FileEntry
from nested_core.storage.strict_files import read_regular
from nested_core.text.html_markup import collapsed, notebook_fragment, paragraph, table
from nested_core.text.loss_conclusion import (
    Conclusion,
    conclude,
    count_examples_needed,
    describe_conclusion,
    describe_passed,
    describe_smallest_visible,
    margin_of_loss,
)
from nested_core.text.loss_format import format_change, format_loss, loss_name_for_file

Code = Literal[
    "unchanged",
    "tier_unchanged",
    "updates_missing",
    "non_finite",
    "tensor_missing",
    "tensor_unexpected",
    "shape_mismatch",
    "dtype_mismatch",
    "no_effect",
    "loss_regressed",
    "forgetting",
    "drift",
    "task_below",
    "task_regressed",
    "examples_harmed",
    "answers_broken",
    "unreadable",
    "config_mismatch",
    "base_mismatch",
]


GATE_GUIDE = "docs/gate.md"
MIN_EXAMPLES_WITHOUT_DOUBT = 30  # fewer are said to be few


@dataclass(frozen=True)
class Reason:
    """Why an adapter is rejected, and the tensors or the suite of `gate.tasks` that it is about."""

    code: Code
    message: str
    tensors: tuple[str, ...] = ()
    suite: str | None = None

    @property
    def name(self) -> str:
        """The code, and the suite that it is about: `task_below (capitals)`."""
        return self.code if self.suite is None else f"{self.code} ({self.suite})"

    def with_guide(self) -> Reason:
        """The same, with the place in the guide that explains it."""
        return replace(self, message=f"{self.message}; {GATE_GUIDE}#{self.code}")


@dataclass(frozen=True)
class TensorChange:
    """How one tensor changed from the initial to the trained adapter.

    `changed` compares bytes; `max_abs_delta` is None if a value is not finite; `relative_delta`
    is the norm of the difference over the larger of the two norms.
    """

    name: str
    tier: int | None
    changed: bool
    max_abs_delta: float | None
    relative_delta: float | None
    finite: bool


@dataclass(frozen=True)
class TierChange:
    """One tier: how many of its tensors changed, and its updates against those that were due."""

    tier: int
    frequency: int
    tensors: int
    changed: int
    expected_updates: int
    applied_updates: int
    skipped_updates: int


@dataclass(frozen=True)
class Validation:
    """The loss of the initial and of the trained adapter on one recorded list of examples.

    file: the file of the data set that holds the examples.
    examples: how many were counted; RUN_DIR/gate-losses.jsonl has the losses of each.
    left_out: how many were not, because the candidate or a parent was trained on them.
    clusters: how many of the counted ones are independent: those with one prompt are one.
    few_prompts: how many prompts there are, where they are too few to be what is drawn, so that
        every example counts as independent; None where they are not too few.
    difference, standard_error, interval: of the paired differences after minus before, in nats a
        token; None with a loss that is not finite, and the last two with fewer than 5 clusters.
    smallest_visible: the smallest difference that the examples could have told from none.
    conclusion: better, no_worse, inconclusive or worse (text/loss_conclusion.py); None without
        a difference.
    margin: the rise, in nats a token, within which the loss has to be shown to stay.
    one_sided_high: the upper end of the one-sided 95 % interval, which is held against the margin.
    examples_needed: about how many would settle an inconclusive comparison; None for none, or many.
    chosen_among: the candidates among which these examples chose; 1 where they chose nothing.
    corrected_interval: the interval that holds for the best of so many; None for one alone.
    harmed, helped: independent examples that lost, or won, far more than a nat a token.
    losses_sha256: of gate-losses.jsonl.
    has_one_answer: whether what is learnt of the examples is the same in all of them.
    """

    loss_before: float | None
    loss_after: float | None
    selected_on_same_data: bool
    file: str | None = None
    examples: int | None = None
    difference: float | None = None
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    smallest_visible: float | None = None
    losses_sha256: str | None = None
    has_one_answer: bool = False
    conclusion: Conclusion | None = None
    margin: float | None = None
    one_sided_high: float | None = None
    examples_needed: int | None = None
    chosen_among: int = 1
    corrected_interval: tuple[float, float] | None = None
    left_out: int = 0
    clusters: int | None = None
    few_prompts: int | None = None
    harmed: int | None = None
    helped: int | None = None

    @classmethod
    def from_losses(
        cls,
        losses: ExampleLosses,
        *,
        selected_on_same_data: bool,
        has_one_answer: bool = False,
        bounds: GateSection | None = None,
        candidates: Candidates | None = None,
    ) -> Validation:
        """The figures of the losses of each example."""
        bounds = bounds or GateSection()
        counted = losses.counted()
        figures = compare_losses(
            counted, counted.before, bounds, bounds.max_val_loss_increase, candidates
        )
        harm = HarmedExamples.find(counted, figures["margin"] or 0.0)
        return cls(
            loss_before=finite_or_none(counted.mean(counted.before)),
            loss_after=finite_or_none(counted.mean(counted.after)),
            selected_on_same_data=selected_on_same_data,
            file=losses.file,
            examples=len(counted),
            left_out=len(losses) - len(counted),
            losses_sha256=losses.sha256(),
            has_one_answer=has_one_answer,
            chosen_among=1 if candidates is None else candidates.count,
            few_prompts=counted.few_clusters(),
            harmed=None if harm is None else harm.harmed,
            helped=None if harm is None else harm.helped,
            **figures,
        )

    def doubts(self) -> Iterator[str]:
        """What speaks against relying on the figures: few examples, or all with one answer."""
        if self.examples is not None and self.examples < MIN_EXAMPLES_WITHOUT_DOUBT:
            noun = "example" if self.examples == 1 else "examples"
            shown = (
                "can show no difference"
                if self.smallest_visible is None
                else describe_smallest_visible(self.smallest_visible)
            )
            yield f"{self.examples} held-out {noun} {shown}"
        elif self.clusters is not None and self.clusters < min(
            MIN_EXAMPLES_WITHOUT_DOUBT, self.examples or 0
        ):
            yield f"the {self.examples} held-out examples have {self.clusters} different prompts"
        if self.few_prompts is not None:
            noun = "prompt" if self.few_prompts == 1 else "prompts"
            yield (
                f"the {self.examples} held-out examples have {self.few_prompts} {noun}: they count "
                f"as independent, and may not be"
            )
        if self.has_one_answer:
            yield "all held-out answers are the same"
        if self.left_out:
            yield f"{self.left_out} left out that the adapter or a parent was trained on"

    def describe_conclusion(self) -> str | None:
        """`better`, or what an inconclusive comparison saw and would settle it; None without."""
        return describe_conclusion(asdict(self))


@dataclass(frozen=True)
class Drift:
    """How far the predictions moved on the held-out examples, in nats a supervised token.

    kl_initial: mean KL(initial || trained); None if not finite.
    kl_base: mean KL(base || trained), with `gate.drift`; None without it, or if not finite.
    tokens: the supervised tokens that they are means over.
    """

    kl_initial: float | None
    kl_base: float | None
    tokens: int

    def describe(self) -> str:
        """`the predictions moved by 0.42 nats a token from ...`, and on how many tokens."""
        moved = (
            f"the predictions moved by {format_loss(self.kl_initial)} nats a token from those of "
            f"the adapter that training began from"
        )
        if self.kl_base is not None:
            moved += f", and by {format_loss(self.kl_base)} from the base model's"
        return f"{moved} (mean KL divergence, {self.tokens:,} tokens of the held-out examples)"

    @classmethod
    def from_losses(cls, losses: ExampleLosses) -> Drift | None:
        """The figures of the divergences of each example; None if none were measured."""
        counted = losses.counted()
        if len(counted):  # where nothing else is left, it is drift on what was trained on, too
            losses = counted
        drift = losses.drift
        if drift is None:
            return None
        base = losses.base_drift
        return cls(
            kl_initial=finite_or_none(losses.mean(drift)),
            kl_base=None if base is None else finite_or_none(losses.mean(base)),
            tokens=int(losses.tokens.sum()),
        )


@dataclass(frozen=True)
class ChampionLoss:
    """The champion at the time of the gate, on the held-out examples that neither was trained on.

    loss: the champion's mean loss in nats a token; the candidate's is `loss` + `difference`.
    examples: how many examples were compared; left_out: how many were not, because the champion,
        the candidate or an ancestor was trained on them.
    difference, standard_error, interval, smallest_visible, conclusion, margin, one_sided_high,
        examples_needed, clusters, corrected_interval: candidate minus champion, as in Validation.
    not_compared: why there is no comparison; then there are no figures.
    """

    version: str
    loss: float | None = None
    examples: int = 0
    left_out: int = 0
    difference: float | None = None
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    smallest_visible: float | None = None
    not_compared: str | None = None
    conclusion: Conclusion | None = None
    margin: float | None = None
    one_sided_high: float | None = None
    examples_needed: int | None = None
    clusters: int | None = None
    corrected_interval: tuple[float, float] | None = None

    @classmethod
    def from_losses(
        cls,
        version: str,
        losses: ExampleLosses,
        bounds: GateSection | None = None,
        candidates: Candidates | None = None,
    ) -> ChampionLoss:
        """The figures of losses that hold the champion's, NaN for the examples left out."""
        bounds = bounds or GateSection()
        shared = losses.examples_with_champion_loss()
        champion = shared.champion
        if champion is None or not len(shared):
            return cls(version, left_out=len(losses))
        return cls(
            version,
            loss=finite_or_none(shared.mean(champion)),
            examples=len(shared),
            left_out=len(losses) - len(shared),
            **compare_losses(shared, champion, bounds, bounds.max_val_loss_increase, candidates),
        )


def compare_losses(
    losses: ExampleLosses,
    other: Vector,
    bounds: GateSection,
    increase: float,
    candidates: Candidates | None = None,
) -> dict[str, Any]:
    """The paired difference of the trained adapter's losses from others, and what it shows.

    `increase` is the relative bound that the margin comes from. All values are None where there is
    no example, or a loss is not finite.
    """
    compared = losses.compare_trained_with(other)
    if compared is None:
        names = (
            *("difference", "standard_error", "interval", "smallest_visible", "conclusion"),
            *("margin", "one_sided_high", "examples_needed", "clusters", "corrected_interval"),
        )
        return dict.fromkeys(names)
    figures = compared.to_json()
    interval = None if figures["interval"] is None else (compared.low, compared.high)
    one_sided_high = compared.one_sided_high if compared.is_measurable else None
    loss_before = losses.mean(other)
    margin = margin_of_loss(increase, loss_before, bounds.noise)
    conclusion = conclude(
        compared.mean,
        interval,
        one_sided_high,
        margin=margin,
        loss_before=loss_before,
        noise=bounds.noise,
    )
    needed = None
    if conclusion == "inconclusive":
        needed = count_examples_needed(
            compared.mean, compared.standard_error, compared.examples, margin
        )
    corrected = None
    if candidates is not None:
        corrected = candidates.corrected_interval(losses, other, compared)
    return figures | {
        "interval": interval,
        "smallest_visible": compared.smallest_visible if compared.is_measurable else None,
        "conclusion": conclusion,
        "margin": margin,
        "one_sided_high": one_sided_high,
        "examples_needed": needed,
        "clusters": compared.examples,
        "corrected_interval": corrected,
    }


@dataclass(frozen=True)
class GeneralLoss:
    """The loss of the initial and of the trained adapter on text unrelated to the task.

    difference, standard_error, interval, conclusion, margin, one_sided_high, clusters: as in
        Validation; None where a loss is not finite.
    """

    loss_before: float | None
    loss_after: float | None
    path: str
    sha256: str
    difference: float | None = None
    standard_error: float | None = None
    interval: tuple[float, float] | None = None
    smallest_visible: float | None = None
    conclusion: Conclusion | None = None
    margin: float | None = None
    one_sided_high: float | None = None
    examples_needed: int | None = None
    clusters: int | None = None


@dataclass(frozen=True)
class TaskResult:
    """How right the answers to one suite of `gate.tasks` are.

    base, parent, champion, candidate: the mean score of each model that answered, from 0 to 1;
        parent is the adapter that training went on from, None for a fresh one.
    difference: candidate minus parent, or minus base without a parent, with the ends of its 95 %
        interval; None with too few questions for one.
    champion_difference, champion_interval: candidate minus champion; None where no champion
        answered.
    conclusion: the worse of the words for the differences from parent or base, and champion.
    lost: how many questions got a lower score than before; lost_first: the first of them.
    smallest_visible: the smallest share of lost answers that so many questions can show.
    seconds: of each model, all questions together.
    odd: how many of the candidate's answers are empty, endless or one repeated token.
    """

    name: str
    questions: int
    base: float
    parent: float | None
    champion: float | None
    candidate: float
    difference: float
    interval: tuple[float, float] | None
    smallest_visible: float
    verdict: Literal["passed", "failed"]
    seconds: dict[str, float]
    odd: dict[str, int]
    champion_difference: float | None = None
    champion_interval: tuple[float, float] | None = None
    conclusion: Conclusion | None = None
    lost: int = 0
    lost_first: tuple[str, ...] = ()

    @property
    def is_proven_gain(self) -> bool:
        """Whether the answers got better than the parent's, beyond noise."""
        return self.interval is not None and self.interval[0] > 0

    @property
    def before(self) -> float:
        """The mean score that `difference` is measured from: the parent's, else the base's."""
        return self.base if self.parent is None else self.parent

    def describe_lost(self) -> str | None:
        """What a passing suite lost: `capitals: 37 of 40 right, lost 3: ...; not beyond chance`."""
        if not self.lost or self.verdict == "failed":
            return None
        named = join_first_values(self.lost_first, len(self.lost_first))
        more = self.lost - len(self.lost_first)
        others = f" and {more} more" if more else ""
        if self.difference > 0:
            why = "more were won"
        elif self.interval is None:
            why = "too few questions to tell from chance"
        else:
            why = "within its max_drop" if self.interval[1] < 0 else "not beyond chance"
        right = f"{round(self.candidate * self.questions, 2):g} of {self.questions} right"
        return f"{self.name}: {right}, lost {self.lost}: {named}{others}; {why}"

    def describe(self) -> str:
        """`capitals: 0 of 15 right before, 15 of 15 after`, with the interval and odd answers."""
        shares = (self.before, self.candidate)
        counts = [f"{round(share * self.questions, 2):g}" for share in shares]
        total = self.questions
        text = f"{self.name}: {counts[0]} of {total} right before, {counts[1]} of {total} after"
        if self.interval is None:
            text += ", too few questions to tell a drop from chance"
        else:
            low, high = self.interval
            text += f" (difference {self.difference:+.3f}, 95 % interval {low:+.3f} to {high:+.3f})"
        if self.champion is not None:
            text += f", champion {round(self.champion * total, 2):g} of {total}"
        odd = [f"{count} {name}" for name, count in self.odd.items() if count]
        return f"{text}, {' and '.join(odd)}" if odd else text


@dataclass(frozen=True)
class SampleVerdict:
    """Whether training broke the answers to sample prompts (gate/sample_answers.py).

    asked: the prompts; judged: those to which the base's own answer is sound, 0 for too few.
    broken: of the judged ones, the answers that the candidate's damage counts in; ways: how.
    not_asked: why nothing was asked, where the model could not answer.
    """

    asked: int
    judged: int = 0
    broken: int = 0
    ways: dict[str, int] = field(default_factory=dict)
    not_asked: str | None = None

    @property
    def are_broken(self) -> bool:
        """Whether most of the judged answers are."""
        return 2 * self.broken > self.judged

    def describe(self) -> str:
        """`3 of 3 sample answers are broken: 3 repeat one token or pair to the end`."""
        words = {
            "empty": "empty",
            "repeated": "one token or pair repeated to the end",
            "endless": "without an end",
        }
        ways = ", ".join(f"{count} {words.get(way, way)}" for way, count in self.ways.items())
        return f"{self.broken} of {self.judged} sample answers are broken ({ways})"


@dataclass(frozen=True)
class JudgedAdapter:
    """An adapter that was judged: its path, and the digest of its meaning and tensors."""

    path: str
    digest: str


@dataclass(frozen=True, repr=False)
class Verdict:
    """The content of gate.json, and what belongs beside it.

    judged_files: the entries of the judged files for the run's manifest.
    written_files: the content of the files that the gate itself writes, by name.
    """

    reasons: tuple[Reason, ...]
    adapter_step: int | None
    initial: JudgedAdapter
    trained: JudgedAdapter
    tensors: tuple[TensorChange, ...]
    tiers: tuple[TierChange, ...] = ()
    last_step: int | None = None
    validation: Validation | None = None
    drift: Drift | None = None
    champion: ChampionLoss | None = None
    thresholds: dict[str, Any] | None = None
    general: GeneralLoss | None = None
    fused: dict[str, Any] | None = None
    proof: dict[str, Any] | None = None
    tasks: tuple[TaskResult, ...] = ()
    samples: SampleVerdict | None = None
    judged_files: Mapping[str, FileEntry] = field(default_factory=dict, compare=False)
    written_files: Mapping[str, bytes] = field(default_factory=dict, compare=False)
    answers: tuple[AnswerRecord, ...] = field(default=(), compare=False)

    @property
    def has_passed(self) -> bool:
        """Whether there is no reason against the adapter."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """The content of gate.json."""
        fields = asdict(replace(self, judged_files={}, written_files={}, answers=()))
        for name in ("judged_files", "written_files", "answers"):
            del fields[name]
        return {"verdict": "passed" if self.has_passed else "failed"} | fields

    def __repr__(self) -> str:
        return f"Verdict({self.summary()})"

    def _repr_html_(self) -> str:
        reasons = [(reason.code, reason.message) for reason in self.reasons]
        tiers = [(t.tier, t.frequency, t.expected_updates, t.applied_updates) for t in self.tiers]
        tensors = [(t.name, t.changed, t.relative_delta, t.finite) for t in self.tensors]
        return notebook_fragment(
            paragraph(self.summary(), class_="verdict good" if self.has_passed else "verdict bad"),
            table("Reasons", ("code", "message"), reasons),
            table("Updates", ("tier", "every", "expected", "applied"), tiers),
            collapsed(
                "Tensors", table("Change", ("tensor", "changed", "relative", "finite"), tensors)
            ),
        )

    @property
    def has_broken_answers(self) -> bool:
        """Whether training broke most answers to the sample prompts: nothing to promote."""
        return self.samples is not None and self.samples.are_broken

    @property
    def rival(self) -> str | None:
        """The champion that the adapter was judged against; None where there was none."""
        return None if self.champion is None else self.champion.version

    def notes(self) -> list[str]:
        """What a person has to know beside a verdict of `passed`, a line each."""
        if not self.has_passed:
            return []
        lost = [note for task in self.tasks if (note := task.describe_lost()) is not None]
        if self.samples is not None and self.samples.are_broken:
            lost.append(
                f"{self.samples.describe()}: do not promote it; a lower learning rate or fewer "
                f"passes may keep the model ({GATE_GUIDE}#answers_broken)"
            )
        return lost

    def summary(self) -> str:
        """One line: the first reason and the names of the others, or what changed."""
        if not self.has_passed:
            first, *others = self.reasons
            also = f"; also {', '.join(reason.name for reason in others)}" if others else ""
            return f"rejected: {first.code} ({first.message}){also}"
        changed = sum(tensor.changed for tensor in self.tensors)
        tensors = f"{changed} of {len(self.tensors)} tensors changed"
        answers = "".join(f"; {task.describe()}" for task in self.tasks)
        if self.validation is not None:
            before, after = self.validation.loss_before, self.validation.loss_after
            losses = f"{loss_name_for_file(self.validation.file)} {format_change(before, after)}"
            if self.validation.examples == 0:
                losses = f"{loss_name_for_file(self.validation.file)} not judged"
            doubts = "".join(f"; {doubt}" for doubt in self.validation.doubts())
            return (
                f"{self.describe_passed()}: {tensors}, {losses} ({self.describe_data()}){doubts}"
                f"{answers}"
            )
        if self.tasks:
            return f"{self.describe_passed()}: {tensors}, no held-out loss{answers}"
        if self.tiers:  # a run, not any two adapters
            return f"{self.describe_passed()}: changed and sound ({tensors})"
        return f"passed: {tensors}"

    @property
    def is_measured(self) -> bool:
        """Whether held-out losses or answers to a suite say anything of the adapter's quality."""
        return bool(self.tasks) or (self.validation is not None and self.validation.examples != 0)

    @property
    def is_conclusive(self) -> bool:
        """Whether anything was measured, and the held-out loss, if it was, had a clear result."""
        losses = self.validation
        return self.is_measured and (losses is None or losses.conclusion != "inconclusive")

    def describe_passed(self) -> str:
        """`passed, better` and the like; an inconclusive comparison with its figures."""
        conclusion = None if self.validation is None else self.validation.describe_conclusion()
        return describe_passed(
            conclusion, is_measured=self.is_measured, is_broken=self.has_broken_answers
        )

    def describe_data(self) -> str:
        """What the losses were measured on: "test.jsonl, 84 examples, step 150 of 200"."""
        if self.validation is None:
            return "no held-out examples"
        of_all = "" if self.last_step is None else f" of {self.last_step}"
        return f"{describe_examples(self.validation)}, step {self.adapter_step}{of_all}"


def describe_examples(validation: Validation) -> str:
    """The data that losses were measured on: "test.jsonl, 84 examples"."""
    if validation.examples is None:
        return "held-out examples"
    noun = "example" if validation.examples == 1 else "examples"
    return f"{validation.file}, {validation.examples} {noun}"


def read_verdict(path: Path) -> Verdict:
    """The verdict in a gate.json that this run's gate wrote; DamagedError if it holds none."""
    try:
        return TypeAdapter(Verdict).validate_json(read_regular(path))
    except ValidationError as error:
        raise DamagedError(f"{path} holds no verdict: {describe_first_problem(error)}.") from error
