"""The verdict in gate.json: passed, or failed with reasons, its figures, and how to word them.

verdict_file.py reads and writes the file. No other module knows its fields.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import PurePath
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator
from typing_extensions import TypedDict

from nested_core import seams
from nested_core.errors import join_first_values
from nested_core.records.answers import BROKEN_WORDS
from nested_core.records.loss_conclusion import (
    MIN_EXAMPLES,
    TOO_FEW_TO_TELL,
    Conclusion,
    describe_inconclusive,
    describe_smallest_visible,
)
from nested_core.records.outcome_names import Outcome
from nested_core.text.digest_format import shorten_digest
from nested_core.text.document import Block, Cell, Details, Document, Table, Text, Tone
from nested_core.text.loss_format import (
    NATS_PER_TOKEN,
    format_change,
    format_difference,
    format_interval,
    format_loss,
    loss_name_for_file,
)
from nested_core.text.value_format import format_count

UnchangedCode = Literal["unchanged", "tier_unchanged", "updates_missing", "no_effect"]
MisshapenCode = Literal["tensor_missing", "tensor_unexpected", "shape_mismatch", "dtype_mismatch"]
UnusableCode = Literal["non_finite", "unreadable", "config_mismatch", "base_mismatch"]
WorseCode = Literal["loss_regressed", "forgetting", "drift"]
HarmedCode = Literal["examples_harmed"]
AnswersCode = Literal["task_below", "task_regressed", "answers_broken"]
Code = Literal[UnchangedCode, MisshapenCode, UnusableCode, WorseCode, HarmedCode, AnswersCode]


def _require_code_of_room(code: str) -> str:
    """Return the code of a reason if an installed room defines it; else raise ValueError."""
    if code not in seams.list_reasons():
        raise ValueError(f"{code} is no code of a reason")
    return code


CodeOfRoom = Annotated[str, AfterValidator(_require_code_of_room)]

# By the first reason of a verdict.
OUTCOME_BY_CODE: Mapping[Code, Outcome] = {
    code: outcome
    for codes, outcome in (
        (UnchangedCode, Outcome.UNCHANGED),
        (MisshapenCode, Outcome.UNSOUND),
        (UnusableCode, Outcome.UNSOUND),
        (WorseCode, Outcome.WORSE),
        (HarmedCode, Outcome.HARMED),
        (AnswersCode, Outcome.ANSWERS),
    )
    for code in get_args(codes)
}
GATE_GUIDE = "docs/gate.md"
MIN_HARMED = 3  # fewer per-example regressions are no reason against an adapter
MIN_EXAMPLES_WITHOUT_DOUBT = 30  # fewer are said to be few
MIN_CHANGE_LEFT_BY_FUSING = 0.5  # of the whole change, that fusing must leave
SCORE_ROUNDING = 1e-9  # a mean of scores may be off by this much
Noise = Literal["paired", "none"]
Interval = tuple[float, float]


@dataclass(frozen=True)
class Reason:
    """A reason to reject an adapter.

    code: the kind of reason, such as `unchanged`; each is explained in docs/gate.md.
    tensors: the names of the tensors concerned.
    suite: the suite of `gate.tasks` concerned.
    ancestor: the version of the ancestor whose held-out data is concerned.
    """

    code: Code | CodeOfRoom
    message: str
    tensors: tuple[str, ...] = ()
    suite: str | None = None
    ancestor: str | None = None

    @property
    def name(self) -> str:
        """The code, with the suite or version that it is about: `task_below (capitals)`."""
        about = self.suite or (self.ancestor and shorten_digest(self.ancestor))
        return self.code if about is None else f"{self.code} ({about})"

    def with_guide(self) -> Reason:
        """Return the reason with a link to the guide's section on its code in the message."""
        return replace(self, message=f"{self.message}; {GATE_GUIDE}#{self.code}")


@dataclass(frozen=True)
class TensorChange:
    """How one tensor changed from the initial to the trained adapter.

    changed: whether its bytes differ.
    max_abs_delta: the largest absolute difference of a value; None if a value is not finite.
    relative_delta: the norm of the difference over the larger of the two norms.
    """

    name: str
    tier: int | None
    changed: bool
    max_abs_delta: float | None
    relative_delta: float | None
    finite: bool


@dataclass(frozen=True)
class TierChange:
    """How many tensors of one tier changed, and how many updates the tier had.

    frequency: the tier is updated every so many steps.
    expected_updates: how many were due; applied and skipped ones add up to it in a sound run.
    """

    tier: int
    frequency: int
    tensors: int
    changed: int
    expected_updates: int
    applied_updates: int
    skipped_updates: int


@dataclass(frozen=True, kw_only=True)
class ComparedLoss:
    """A paired comparison of losses; below 0 is better.

    difference: the mean of the paired differences; None if a loss is not finite.
    standard_error, interval: of that mean; None with fewer than 5 clusters. The interval is 95 %.
    smallest_visible: the smallest difference that would be significant on these examples.
    conclusion: better, no_worse, inconclusive or worse (records/loss_conclusion.py); None without a
        difference.
    margin: the rise within which the loss has to stay to be no worse.
    one_sided_high: the upper end of the one-sided 95 % interval, which is compared with the margin.
    examples_needed: about how many examples would settle an inconclusive comparison; None if too
        many, or if it is conclusive.
    clusters: how many of the examples are independent: those with one prompt count as one.
    unit: of the losses and of all that is computed from them.
    """

    difference: float | None = None
    standard_error: float | None = None
    interval: Interval | None = None
    smallest_visible: float | None = None
    conclusion: Conclusion | None = None
    margin: float | None = None
    one_sided_high: float | None = None
    examples_needed: int | None = None
    clusters: int | None = None
    unit: str = NATS_PER_TOKEN

    def describe_conclusion(self) -> str | None:
        """Describe the conclusion in words; None without a conclusion.

        An inconclusive one is described with its figures.
        """
        if self.conclusion is None or self.difference is None:
            return None
        if self.conclusion == "worse" and self.interval is None:
            return f"worse by its mean; {TOO_FEW_TO_TELL}"
        if self.conclusion != "inconclusive":
            return self.conclusion.replace("_", " ")
        return describe_inconclusive(
            self.difference, self.deciding_interval, self.margin, self.examples_needed, self.unit
        )

    @property
    def deciding_interval(self) -> Interval | None:
        """The interval that the conclusion is based on."""
        return self.interval


@dataclass(frozen=True, kw_only=True)
class HeldOutComparison(ComparedLoss):
    """A comparison on held-out examples, which may also have chosen the adapter that they judge.

    corrected_interval: the interval corrected for choosing the best of several candidates, or for
        several comparisons; None if neither applies. The conclusion is based on it.
    left_out: how many examples were not counted because an adapter was trained on them; None if
        what an adapter was trained on is not known.
    few_prompts: the number of different prompts if it is too small to resample by prompt, so that
        every example counts as independent; else None.
    """

    corrected_interval: Interval | None = None
    left_out: int | None = 0
    few_prompts: int | None = None

    @property
    def deciding_interval(self) -> Interval | None:
        """The interval that the conclusion is based on: the corrected one if there is one."""
        return self.interval if self.corrected_interval is None else self.corrected_interval

    @property
    def has_few_prompts(self) -> bool:
        """Whether fewer than 5 different prompts were compared, too few for automatic promotion."""
        is_few = self.clusters is not None and self.clusters < MIN_EXAMPLES
        return is_few or self.few_prompts is not None

    def describe_few_prompts(self) -> str | None:
        """Say that there are too few different prompts for an automatic promotion, else None."""
        if not self.has_few_prompts:
            return None
        prompts = self.few_prompts or self.clusters
        few = "1 prompt" if prompts == 1 else f"{prompts} different prompts"
        return f"they have {few}: on fewer than {MIN_EXAMPLES} nothing is promoted by itself"

    def is_better(self, min_improvement: float, noise: Noise) -> bool:
        """Return whether the loss is lower by enough, beyond chance, for an automatic promotion.

        min_improvement: in `unit`: by how much the difference itself has to be lower.
        noise: `none` decides by the mean alone, and ignores both intervals.
        """
        if self.has_few_prompts or self.difference is None or self.difference >= -min_improvement:
            return False
        if noise == "none":
            return True
        is_corrected = self.corrected_interval is None or self.corrected_interval[1] < 0
        return self.interval is not None and self.interval[1] < 0 and is_corrected


@dataclass(frozen=True)
class Validation(HeldOutComparison):
    """The held-out loss of the initial and the trained adapter on the same examples.

    loss_before, loss_after: mean losses in `unit` with the initial and the trained adapter.
    selected_on_same_data: whether the same examples also chose the adapter's step.
    file: the file of the data set that holds the examples.
    file_sha256: SHA-256 of a file beside the data set (`gate.held_out: FILE`); None for a split.
    examples: how many were counted; gate-losses.jsonl has the losses of each.
    left_out: how many were not counted because the candidate or a parent was trained on them.
    chosen_among: how many candidates were compared on these examples to choose this one; 1 if none.
    harmed, helped: how many independent examples got far more than a nat/token worse, or better.
    losses_sha256: SHA-256 of gate-losses.jsonl.
    has_one_answer: whether the expected answer is the same in all examples.
    """

    loss_before: float | None
    loss_after: float | None
    selected_on_same_data: bool
    file: str | None = None
    file_sha256: str | None = None
    examples: int | None = None
    losses_sha256: str | None = None
    has_one_answer: bool = False
    chosen_among: int = 1
    harmed: int | None = None
    helped: int | None = None

    def doubts(self) -> Iterator[str]:
        """Yield reasons to distrust the losses, such as few examples or one answer in all."""
        if self.examples is not None and self.examples < MIN_EXAMPLES_WITHOUT_DOUBT:
            shown = (
                "can show no difference"
                if self.smallest_visible is None
                else describe_smallest_visible(self.smallest_visible, self.unit)
            )
            yield f"{format_count(self.examples, 'held-out example')} {shown}"
        elif self.clusters is not None and self.clusters < min(
            MIN_EXAMPLES_WITHOUT_DOUBT, self.examples or 0
        ):
            yield f"the {self.examples} held-out examples have {self.clusters} different prompts"
        if self.few_prompts is not None:
            yield (
                f"the {self.examples} held-out examples have "
                f"{format_count(self.few_prompts, 'prompt')}: they count as independent, and may "
                f"not be; on fewer than {MIN_EXAMPLES} nothing is promoted by itself"
            )
        if self.has_one_answer:
            yield "all held-out answers are the same"
        if self.left_out:
            yield f"{self.left_out} left out: they were trained on, by the adapter or one before it"
        if self.left_out is None:
            yield "what an adapter before it was trained on is not known, and may be among them"


@dataclass(frozen=True)
class Drift:
    """How far the predictions moved on the held-out examples, in nats per supervised token.

    kl_initial: mean KL(initial || trained); None if not finite.
    kl_base: mean KL(base || trained); None without the key `gate.drift`, or if not finite.
    tokens: the number of supervised tokens that the means are over; None for means over examples.
    """

    kl_initial: float | None
    kl_base: float | None
    tokens: int | None

    def describe(self) -> str:
        """Describe the divergences: `KL divergence from the initial adapter 0.42 nats/token`."""
        moved = f"KL divergence from the initial adapter {format_loss(self.kl_initial)} nats/token"
        if self.kl_base is not None:
            moved += f", from the base model {format_loss(self.kl_base)}"
        over = "" if self.tokens is None else f"{self.tokens:,} tokens of "
        return f"{moved} ({over}the held-out examples)"

    def is_within(self, bound: float) -> bool:
        """Return whether the divergence from the initial adapter is finite and at most `bound`."""
        return self.kl_initial is not None and self.kl_initial <= bound


@dataclass(frozen=True)
class VersionLoss(HeldOutComparison):
    """The loss of a registered version, compared with the candidate on the same held-out examples.

    version: the registered version.
    loss: its mean loss in `unit`. `difference` is candidate minus version.
    examples: how many were compared.
    not_compared: why there is no comparison and there are no figures; None if there is one.
    """

    version: str
    loss: float | None = None
    examples: int = 0
    not_compared: str | None = None

    @property
    def loss_after(self) -> float | None:
        """The candidate's mean loss in `unit`; None if there is no comparison."""
        if self.loss is None or self.difference is None:
            return None
        return self.loss + self.difference


@dataclass(frozen=True)
class ChampionLoss(VersionLoss):
    """The loss of the champion, compared with the candidate on the same held-out examples.

    version: the champion when the gate ran.
    left_out: how many were not compared, because the champion, the candidate or an ancestor was
        trained on them.
    """

    def describe(self) -> str:
        """Describe the champion's loss and the candidate's difference, or why there is none."""
        version = f"champion {shorten_digest(self.version)}"
        if self.not_compared is not None:
            return f"{version} not compared: {self.not_compared}"
        if self.loss is None or self.difference is None:
            return f"{version} without a loss on examples that neither was trained on"
        interval = None if self.conclusion == "inconclusive" else self.interval
        parts = [
            f"{version} {format_loss(self.loss)}",
            f"difference {format_difference(self.difference, interval)}",
        ]
        parts += filter(None, [self.describe_conclusion(), self.describe_few_prompts()])
        return ", ".join(parts)


JOINED = "joined"  # in place of a version, where several are judged together


LEAST_LOST, SHARE_LOST = 0.05, 0.1  # of a rise in the loss's unit, and as a share of the loss


@dataclass(frozen=True)
class AncestorLoss(VersionLoss):
    """Champion and candidate compared on the held-out examples of an earlier version.

    The earlier version is the champion or one that the champion was trained from. Without a
    champion the adapter of `resume_adapter_file` stands for it.

    version: the earlier version whose examples are used.
    registered: when it was registered, as ISO 8601; None if not known.
    loss: the champion's mean loss in `unit`; the candidate's is `loss` + `difference`.
    examples: how many were compared.
    left_out: how many were not, because a version or the candidate was trained on them.
    superseded: how many were not, because newer data has another answer to the same prompt.
    repeated: how many were not, because newer data is judged by them too.
    missing: how many are lost from the registry.
    not_compared: why there is no comparison and there are no figures; None if there is one.
    joined: versions whose examples are compared together, as each has too few; `version` is then
        JOINED.
    is_start: whether the adapter that training began from stands for the champion.
    """

    registered: str | None = None
    superseded: int = 0
    repeated: int = 0
    missing: int = 0
    joined: tuple[str, ...] = ()
    is_start: bool = False

    @property
    def role(self) -> str:
        """Whose loss the candidate's is compared with."""
        return "start" if self.is_start else "champion"

    @property
    def name(self) -> str:
        """Name the version, such as `version 1a2b3c4d of 2026-11-24`, or count the joined ones."""
        if self.is_start and self.registered is None:
            return f"the adapter {shorten_digest(self.version)}, from which it began,"
        if self.joined:
            return f"each of {len(self.joined)} joined versions"
        night = "" if self.registered is None else f" of {self.registered[:10]}"
        return f"version {shorten_digest(self.version)}{night}"

    @property
    def is_unmeasured(self) -> bool:
        """Whether nothing was compared, on these examples or on newer data that has all of them."""
        return self.not_compared is not None and not (self.repeated and not self.left_out)

    def is_forgotten(self, noise: Noise) -> bool:
        """Return whether the candidate is worse, corrected for the number of ancestors compared."""
        if self.conclusion != "worse" or self.clusters is None or self.clusters < MIN_EXAMPLES:
            return False
        corrected = self.corrected_interval
        return noise == "none" or (corrected is not None and corrected[0] > 0)

    @property
    def is_lost(self) -> bool:
        """Whether the loss rose so far that a person has to know, whatever the gate's bound is."""
        rise = 0.0 if self.corrected_interval is None else self.corrected_interval[0]
        return self.loss is not None and rise > max(LEAST_LOST, SHARE_LOST * self.loss)

    def describe_forgotten(self) -> str:
        """Say what was forgotten, as a clause."""
        return (
            f"forgot what {self.name} was judged by: loss "
            f"{format_change(self.loss, self.loss_after)}, the {self.role}'s to the candidate's, "
            f"on {self.examples} of its held-out examples"
        )

    def describe_left_out(self) -> str | None:
        """Count the examples that were not compared, by reason; None if all were compared."""
        counts = {
            "trained on": self.left_out,
            "superseded by newer data": self.superseded,
            "held out by newer data too": self.repeated,
            "lost from the registry": self.missing,
        }
        return ", ".join(f"{count} {why}" for why, count in counts.items() if count) or None


@dataclass(frozen=True)
class GeneralLoss(ComparedLoss):
    """The loss of the initial and the trained adapter on text unrelated to the task.

    path, sha256: the file of the text and its hash.
    """

    loss_before: float | None
    loss_after: float | None
    path: str
    sha256: str


@dataclass(frozen=True)
class TaskResult:
    """How right the answers to one suite of `gate.tasks` are.

    questions: the number of questions of the suite.
    base, parent, champion, candidate: the mean score of each model, from 0 to 1. parent is the
        adapter that training started from, None for a fresh one.
    difference, interval: candidate minus parent, or minus base without a parent, and its 95 %
        interval; the interval is None with too few questions.
    champion_difference, champion_interval: candidate minus champion; None without a champion.
    conclusion: the worse of the conclusions about the two differences.
    chosen_among: how many candidates were compared on these questions to choose this one; the
        interval is corrected for it.
    lost: how many questions got a lower score than before.
    lost_first: the lines of the first of these questions.
    smallest_visible: the smallest share of lost answers that would be significant.
    seconds: the time of each model for all questions.
    odd: how many of the candidate's answers are empty, endless or one repeated token.
    same_answer: a digest of 12 bits of the candidate's answer if it is the same to every question
        although different ones are expected; else None. Versions keep gate.json: it has no text.
    constant: the mean score of the best constant answer, which is the one expected answer that is
        right for the most questions; None if the questions expect no answer.
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
    chosen_among: int = 1
    same_answer: str | None = None
    constant: float | None = None

    @property
    def is_no_better_than_constant(self) -> bool:
        """Whether always giving the best constant answer would score at least as well."""
        return self.constant is not None and self.candidate <= self.constant + SCORE_ROUNDING

    @property
    def may_be_behind_champion(self) -> bool:
        """Whether the champion scores higher, by more than is shown to be within `max_drop`."""
        has_fallen = (self.champion_difference or 0.0) < -SCORE_ROUNDING
        return has_fallen and self.conclusion not in ("better", "no_worse")

    @property
    def is_above_base(self) -> bool:
        """Whether the candidate scores above the base, or is all right as the base is."""
        return self._is_above(self.base)

    def _is_above(self, share: float) -> bool:
        return self.candidate > min(share, 1 - 2 * SCORE_ROUNDING) + SCORE_ROUNDING

    @property
    def before(self) -> float:
        """The mean score that `difference` is measured from: the parent's, or else the base's."""
        return self.base if self.parent is None else self.parent

    def count(self, share: float) -> str:
        """Convert a mean score to a number of right answers: `14`, or `13.5` with partial ones."""
        return f"{round(share * self.questions, 2):g}"

    def describe_right(self) -> str:
        """Describe the score and what it has to beat: `14 of 20 right (one fixed answer: 3)`.

        A base that is not below it is named too.
        """
        rivals = []
        shows_base = not (self.is_above_base or self.is_no_better_than_constant)
        if self.base > self.candidate or shows_base:
            rivals.append(f"base: {self.count(self.base)}")
        if self.constant is not None:
            rivals.append(f"one fixed answer: {self.count(self.constant)}")
        right = f"{self.count(self.candidate)} of {self.questions} right"
        return f"{right} ({', '.join(rivals)})" if rivals else right

    def describe_lost(self) -> str | None:
        """Describe what a passing suite lost: `capitals: 37 of 40 right, lost 3: ...`.

        Returns None if it lost no answer or failed.
        """
        if not self.lost or self.verdict == "failed":
            return None
        named = join_first_values(self.lost_first, len(self.lost_first))
        more = self.lost - len(self.lost_first)
        others = f" and {more} more" if more else ""
        if self.difference > 0:
            why = "more were won"
        elif self.interval is None:
            why = "too few questions to detect a drop"
        else:
            why = "within its max_drop" if self.interval[1] < 0 else "not beyond chance"
        right = f"{self.count(self.candidate)} of {self.questions} right"
        return f"{self.name}: {right}, lost {self.lost}: {named}{others}; {why}"

    def describe_cut(self) -> str | None:
        """Say that all answers were cut off; None if one ended, or more or all are right now."""
        if self.odd.get("endless", 0) < self.questions or self._is_above(self.before):
            return None
        cut = f"all {self.questions} answers were cut off at its max_tokens"
        return f"{self.name}: {cut}, so they may be right further on; raise it, and ask again"

    def describe(self) -> str:
        """Describe the scores: `capitals: 0 of 15 right before, 15 of 15 after`, and so on."""
        total = self.questions
        before, after = (self.count(share) for share in (self.before, self.candidate))
        text = f"{self.name}: {before} of {total} right before, {after} of {total} after"
        if self.interval is None:
            text += ", too few questions to detect a drop"
        else:
            interval = format_interval(self.interval)
            text += f" (difference {format_difference(self.difference)}, 95 % interval {interval})"
        if self.chosen_among > 1:
            text += f"; these questions also chose the step, among {self.chosen_among}"
        if self.champion is not None:
            text += f", champion {self.count(self.champion)} of {total}"
        odd = [f"{count} {name}" for name, count in self.odd.items() if count]
        return f"{text}, {' and '.join(odd)}" if odd else text


LEARN_MORE = (
    "train longer, or try the learning rate that the run's warning names; without such a warning, "
    "one three times as high, or a third of it"
)


@dataclass(frozen=True)
class SampleVerdict:
    """Whether training broke the answers to sample prompts (gate/checks/samples.py).

    asked: the number of prompts.
    judged: the number of prompts that the base answers soundly; 0 if these are too few.
    broken: how many of the judged answers of the candidate are broken.
    ways: how many broken answers there are by each way of BROKEN_WORDS.
    not_asked: why no prompt was asked; None if they were.
    """

    asked: int
    judged: int = 0
    broken: int = 0
    ways: dict[str, int] = field(default_factory=dict)
    not_asked: str | None = None

    @property
    def are_broken(self) -> bool:
        """Whether more than half of the judged answers are broken."""
        return 2 * self.broken > self.judged

    def describe(self) -> str:
        """Describe the count: `3 of 3 sample answers are broken (3 one token or pair repeated)`."""
        ways = ", ".join(f"{n} {BROKEN_WORDS.get(way, way)}" for way, n in self.ways.items())
        return f"{self.broken} of {self.judged} sample answers are broken ({ways})"

    def suggest(self) -> str:
        """Return a sentence on which setting to change for unbroken answers."""
        if self.ways.get("same"):
            return LEARN_MORE
        return "try a lower learning rate, a smaller lora_parameters.scale or fewer passes"


@dataclass(frozen=True)
class JudgedAdapter:
    """An adapter that was judged: its path, and the digest of its configuration and tensors."""

    path: str
    digest: str


@dataclass(frozen=True)
class FusedVerdict:
    """How much of the change remains when the adapter is fused into the base.

    modules: how many modules the adapter changes.
    carried_share: the share of the change that fusing preserves.
    erased_modules: the modules whose change is lost by rounding.
    """

    modules: int
    carried_share: float
    erased_modules: tuple[str, ...]


class ProofEvidence(TypedDict, total=False):
    """What a fresh process measured with plain mlx_lm.

    skipped: why it did not run, such as a base model that is not there.
    relative_distance_from_trainer: how far its logits are from the trainer's, over their norm.
    rounding, relative_distance_from_float32: how far the process's and the trainer's logits are
        from those computed in float32; measured only if they differ by more than `tolerance`.
    """

    skipped: str | None
    model: str
    prompts: int
    error: str | None
    max_abs_difference_from_initial: float | None
    relative_distance_from_trainer: float | None
    tolerance: float
    rounding: float | None
    relative_distance_from_float32: float | None


@dataclass(frozen=True)
class CheckRow:
    """One row of the table of checks: name, figures, bound and result.

    verdict: the result in a word; None for a figure that is not judged.
    has_failed: whether this check gave a reason to reject the adapter.
    """

    name: str
    before: str | None = None
    after: str | None = None
    difference: str | None = None
    bound: str | None = None
    verdict: str | None = "passed"
    has_failed: bool = False

    @property
    def figures(self) -> str | None:
        """The figures as `3.142 -> 0.0213`.

        Without a figure before, it is the one after, or the result if there is no figure.
        """
        if self.before is None or self.after is None:
            return self.after or self.verdict
        return f"{self.before} -> {self.after}"

    @property
    def cells(self) -> tuple[object, ...]:
        """The cells of the row, in the order of CHECK_COLUMNS."""
        word = Cell(f"failed: {self.verdict}", "bad") if self.has_failed else self.verdict
        return (self.name, self.before, self.after, self.difference, self.bound, word)


@dataclass(frozen=True)
class VerdictBlock:
    """How a room's block of the verdict is shown.

    name: its key in gate.json.
    rows: returns rows of the table of checks, of the block and the verdict.
    notes: returns sentences beside the verdict.
    """

    name: str
    rows: Callable[[dict[str, Any], Verdict], Iterable[CheckRow]]
    notes: Callable[[dict[str, Any], Verdict], Iterable[str]]


@dataclass(frozen=True, repr=False)
class Verdict:
    """The content of gate.json.

    reference: like `champion`, for the version that the registry's policy names as reference.
    ancestors: champion and candidate on the held-out examples of earlier versions, newest first.
    thresholds: the values of the section `gate` that applied, by key; a missing key did not exist
        when the verdict was given.
    doubt: why only a person should promote the adapter; None without such a doubt.
    blocks: what rooms measured, by their keys in gate.json, as JSON values.
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
    reference: ChampionLoss | None = None
    ancestors: tuple[AncestorLoss, ...] = ()
    thresholds: dict[str, Any] | None = None
    general: GeneralLoss | None = None
    fused: FusedVerdict | None = None
    proof: ProofEvidence | None = None
    tasks: tuple[TaskResult, ...] = ()
    samples: SampleVerdict | None = None
    doubt: str | None = None
    blocks: dict[str, Any] = field(default_factory=dict)

    @property
    def has_passed(self) -> bool:
        """Whether there is no reason to reject the adapter."""
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """Return the content of gate.json."""
        document: dict[str, Any] = asdict(self)
        blocks = document.pop("blocks")
        return {"verdict": self.word, **document, **blocks}

    @property
    def word(self) -> Literal["passed", "failed"]:
        """The verdict in a word: passed or failed."""
        return "passed" if self.has_passed else "failed"

    @property
    def outcome(self) -> Outcome:
        """What became of the run by this verdict: verified, or rejected for its first reason."""
        if self.has_passed:
            return Outcome.VERIFIED
        code: Any = self.reasons[0].code
        if code in OUTCOME_BY_CODE:
            return OUTCOME_BY_CODE[code]
        return Outcome[seams.list_reasons()[code]]

    def load_blocks(self) -> Iterator[tuple[VerdictBlock, dict[str, object]]]:
        """Yield, for each block of an installed room, what displays it and the block."""
        shown = seams.load_all(VerdictBlock) if self.blocks else ()
        yield from ((one, self.blocks[one.name]) for one in shown if one.name in self.blocks)

    @property
    def reason_names(self) -> list[str]:
        """The code of each reason, with the suite that it is about: `task_below (capitals)`."""
        return [reason.name for reason in self.reasons]

    @property
    def noise(self) -> Noise:
        """How differences were judged: `paired` by their interval, `none` by the mean alone."""
        return "paired" if (self.thresholds or {}).get("noise") == "paired" else "none"

    def bound(self, name: str) -> float | None:
        """Return the threshold of a key of section `gate`; None if it was not set."""
        value = (self.thresholds or {}).get(name)
        return float(value) if isinstance(value, int | float) else None

    def __repr__(self) -> str:
        """Show the one-line summary."""
        return f"Verdict({self.summary()})"

    def _repr_html_(self) -> str:
        """Return the verdict as HTML for a notebook's cell."""
        reasons = [(reason.name, reason.message) for reason in self.reasons]
        tiers = [(t.tier, t.frequency, t.expected_updates, t.applied_updates) for t in self.tiers]
        tensors = [(t.name, t.changed, t.relative_delta, t.finite) for t in self.tensors]
        change = Table("Change", ("tensor", "changed", "relative", "finite"), tensors)
        blocks: list[Block] = [
            Text(self.summary(), self.tone, is_headline=True),
            Table("Reasons", ("code", "message"), reasons),
            Table("Updates", ("tier", "every", "expected", "applied"), tiers),
            Details("Tensors", [change]),
        ]
        return Document("Verdict", blocks).to_fragment()

    @property
    def broken_answers(self) -> str:
        """Describe broken sample answers and suites with one answer to all questions; else "".

        An adapter with broken answers must not be promoted.
        """
        broken = [
            f"{task.name}: all {task.questions} answers are the same"
            for task in self.tasks
            if task.same_answer is not None
        ]
        if self.samples is not None and self.samples.are_broken:
            broken.append(self.samples.describe())
        return "; ".join(broken)

    @property
    def doubtful_answers(self) -> str:
        """Describe each suite whose answers show no learning; "" if all show some.

        These are no better than one constant answer. If no suite has a higher score than the base,
        those that are no better than the base count too. Beside a suite that gained, one whose
        answers are all right is a guard, and no doubt.
        """
        has_gain = any(
            task.is_above_base and not task.is_no_better_than_constant for task in self.tasks
        )
        doubtful = [
            task
            for task in self.tasks
            if (task.is_no_better_than_constant and not (has_gain and task.candidate == 1))
            or not (has_gain or task.is_above_base)
        ]
        return self._describe_right_answers(doubtful)

    @property
    def answers_in_words(self) -> str:
        """Describe the doubtful answers or else all; of a better loss alone, that none are."""
        if self.tasks:
            return self.doubtful_answers or self._describe_right_answers(self.tasks)
        losses = self.validation
        return "no questions asked" if losses and losses.conclusion == "better" else ""

    def _describe_right_answers(self, tasks: Sequence[TaskResult]) -> str:
        """Describe the scores of these suites, with their names where there are several suites."""
        prefix = "{0.name}: " if len(self.tasks) > 1 else ""
        return ", ".join(prefix.format(task) + task.describe_right() for task in tasks)

    @property
    def tone(self) -> Tone:
        """The colour of the verdict wherever it is shown; "" is neutral."""
        if not self.has_passed:
            return "bad"
        if self.broken_answers or self.doubtful_answers or self.doubt:
            return "warn"
        return "good" if self.is_conclusive and self.tasks else ""

    @property
    def rival(self) -> str | None:
        """The champion that the adapter was compared with; None without a champion."""
        return None if self.champion is None else self.champion.version

    def losses_beside(self, champion: str) -> tuple[float, float] | None:
        """Return the held-out losses of the adapter and of a champion on the same examples.

        None if the gate did not measure this champion, neither as the adapter that training started
        from nor as the one to compare with, or if a loss is not finite.
        """
        losses, record = self.validation, self.champion
        if losses is not None and self.initial.digest == champion:
            after, before = losses.loss_after, losses.loss_before
        elif record is not None and record.version == champion:
            after, before = record.loss_after, record.loss
        else:
            return None
        return None if after is None or before is None else (after, before)

    def notes(self) -> list[str]:
        """Return warnings that belong beside the verdict; of a failed one, those of rooms alone."""
        of_rooms = [  # from optional packages, each with its block of the verdict
            note for shown, block in self.load_blocks() for note in shown.notes(block, self)
        ]
        if not self.has_passed:
            return of_rooms
        lost = [n for one in self.tasks for n in (one.describe_lost(), one.describe_cut()) if n]
        if self.broken_answers:
            samples = self.samples
            advice = samples.suggest() if samples and samples.are_broken else LEARN_MORE
            warning = f"{self.broken_answers}: do not promote it, but {advice}"
            lost.append(f"{warning} ({GATE_GUIDE}#answers_broken)")
        lost += [
            f"warning: it {one.describe_forgotten()} ({GATE_GUIDE}#forgetting)"
            for one in self.ancestors
            if one.is_lost
        ]
        return lost + of_rooms

    def summary(self) -> str:
        """Summarize the verdict in one line: the reasons, or what changed and was measured."""
        if not self.has_passed:
            first, *others = self.reasons
            also = f"; also {', '.join(reason.name for reason in others)}" if others else ""
            rival = "" if self.champion is None else f"; {self.champion.describe()}"
            # The outcome may end with the reason's name, which is then not said again
            is_named = str(self.outcome).endswith(f": {first.name}")
            why = first.message if is_named else f"{first.name}: {first.message}"
            return f"{self.outcome} ({why}){also}{rival}"
        changed = sum(tensor.changed for tensor in self.tensors)
        tensors = f"{changed} of {len(self.tensors)} tensors changed"
        if self.validation is not None or self.tasks:
            further = [*self._doubts(), *(task.describe() for task in self.tasks)]
            measured = "; ".join([self.describe_loss(), *further])
            return f"{self.describe_passed()}: {tensors}, {measured}"
        if self.tiers:  # a run was judged, and not just any two adapters, which have no tiers
            return f"{self.describe_passed()}: changed and sound ({tensors})"
        return f"passed: {tensors}"

    def _doubts(self) -> Iterator[str]:
        """Yield reasons to distrust the losses and their comparison with the champion."""
        if self.validation is not None:
            yield from self.validation.doubts()
        champion, few = self.champion, None
        if champion is not None and not (self.validation and self.validation.has_few_prompts):
            few = champion.describe_few_prompts()
        if champion is not None and few is not None:
            yield f"{champion.examples} of them are compared with the champion: {few}"

    @property
    def is_measured(self) -> bool:
        """Whether held-out losses or answers to a suite measured the adapter's quality."""
        return bool(self.tasks) or (self.validation is not None and self.validation.examples != 0)

    @property
    def is_conclusive(self) -> bool:
        """Whether quality was measured and the held-out loss, if any, is not inconclusive."""
        losses = self.validation
        return self.is_measured and (losses is None or losses.conclusion != "inconclusive")

    def describe(self) -> str:
        """Return the verdict in a few words: `passed, better`, or `failed`."""
        conclusion = None if self.validation is None else self.validation.conclusion
        return self._describe(conclusion) if self.has_passed else self.word

    def describe_passed(self) -> str:
        """Return `passed, better` and the like; an inconclusive comparison with its figures."""
        losses = self.validation
        return self._describe(None if losses is None else losses.describe_conclusion())

    def _describe(self, conclusion: str | None) -> str:
        """Return `passed` with the conclusion, or with what keeps quality from being known."""
        if self.broken_answers:
            return "passed, answers broken"
        if not self.is_measured:
            return "passed, quality not measured"
        words = "passed" if conclusion is None else f"passed, {conclusion.replace('_', ' ')}"
        if not self.answers_in_words:
            return words
        if conclusion is not None and (self.doubtful_answers or not self.tasks):
            # Which may go on with the figures of the loss
            words = re.sub(r"^passed, [a-z ]+", r"\g<0> loss", words)
        return f"{words}; {self.answers_in_words}"

    def describe_loss(self) -> str:
        """Describe the held-out loss before and after training, and its data.

        Example: `test loss 3.142 -> 0.0213 (test.jsonl, 84 examples, step 150 of 200)`.
        """
        losses = self.validation
        if losses is None:
            return "no held-out loss"
        name = loss_name_for_file(losses.file)
        if losses.examples == 0:
            return f"{name} not measured: all held-out examples were trained on"
        change = format_change(losses.loss_before, losses.loss_after)
        return f"{name} {change} ({self.describe_data()})"

    def describe_losses(self) -> str:
        """Describe the held-out loss, its conclusion, and the champion's loss."""
        parts = [self.describe_loss()]
        conclusion = None if self.validation is None else self.validation.describe_conclusion()
        if conclusion is None or self.broken_answers:
            parts += [conclusion or "", self.broken_answers or self.answers_in_words]
        else:
            parts.append(self.describe_passed().removeprefix("passed, "))
        if self.champion is not None:
            parts.append(self.champion.describe())
        return "; ".join(filter(None, parts))

    def describe_data(self) -> str:
        """Describe what the losses were measured on: "test.jsonl, 84 examples, step 150 of 200"."""
        if self.validation is None:
            return "no held-out examples"
        of_all = "" if self.last_step is None else f" of {self.last_step}"
        return f"{describe_examples(self.validation)}, step {self.adapter_step}{of_all}"


def describe_examples(validation: Validation) -> str:
    """Describe the file and number of held-out examples: "test.jsonl, 84 examples"."""
    if validation.examples is None:
        return "held-out examples"
    return f"{PurePath(str(validation.file)).name}, {format_count(validation.examples, 'example')}"
