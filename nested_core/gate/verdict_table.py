"""A verdict as a table: what was checked, before, after, the bound, and what came of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from nested_core.gate.loss_figures import MIN_HARMED
from nested_core.records.answers import AnswerRecord, shown_answer
from nested_core.records.verdict import (
    Code,
    GeneralLoss,
    Reason,
    TaskResult,
    Validation,
    Verdict,
    describe_examples,
)
from nested_core.text.loss_format import format_loss

CHECK_COLUMNS = ("checked", "before", "after", "bound", "verdict")
LOST_COLUMNS = ("question", "expected", "before", "after")
MAX_LOST_PER_SUITE = 3
UPDATE_CODES: frozenset[Code] = frozenset({"tier_unchanged", "updates_missing"})
SUITE_CODES: frozenset[Code] = frozenset({"task_below", "task_regressed"})
OWN_ROW_CODES: frozenset[Code] = frozenset(
    {"loss_regressed", "examples_harmed", "drift", "forgetting", "answers_broken"}
)


@dataclass(frozen=True)
class CheckRow:
    """One row: what was checked, its figures before and after, the bound, and the verdict.

    has_failed: whether a reason against the adapter comes from it.
    """

    name: str
    before: str | None
    after: str | None
    bound: str | None
    verdict: str
    has_failed: bool

    @property
    def cells(self) -> tuple[str | None, ...]:
        """The row, in the order of CHECK_COLUMNS."""
        word = f"failed: {self.verdict}" if self.has_failed else self.verdict
        return (self.name, self.before, self.after, self.bound, word)


def list_checks(verdict: Verdict) -> list[CheckRow]:
    """Every check of a verdict, those that passed too."""
    return [
        _tensor_check(verdict),
        *_update_checks(verdict),
        *_loss_checks(verdict),
        *(_suite_check(verdict, task) for task in verdict.tasks),
        *_sample_checks(verdict),
    ]


def _make_check(
    name: str,
    figures: tuple[str | None, str | None, str | None],
    reasons: Sequence[Reason],
    word: str = "passed",
) -> CheckRow:
    codes = ", ".join(dict.fromkeys(reason.code for reason in reasons))
    return CheckRow(name, *figures, codes or word, bool(reasons))


def _tensor_check(verdict: Verdict) -> CheckRow:
    """Tensors, their configuration and effect: all reasons that no other row is about."""
    elsewhere = UPDATE_CODES | SUITE_CODES | OWN_ROW_CODES
    reasons = [reason for reason in verdict.reasons if reason.code not in elsewhere]
    changed = sum(tensor.changed for tensor in verdict.tensors)
    total = len(verdict.tensors)
    figures = (None, f"{changed} of {total} changed", "finite, with an effect")
    return _make_check("tensors", figures, reasons)


def _update_checks(verdict: Verdict) -> Iterator[CheckRow]:
    """How many updates were applied; where some left no trace, also how many tensors they moved."""
    if not verdict.tiers:
        return
    expected = sum(tier.expected_updates for tier in verdict.tiers)
    applied = sum(tier.applied_updates for tier in verdict.tiers)
    reasons = [reason for reason in verdict.reasons if reason.code in UPDATE_CODES]
    counts = [reason for reason in reasons if _is_about_counts(verdict, reason)]
    traces = [reason for reason in reasons if reason not in counts]
    figures = (None, f"{applied:,} applied", f"{expected:,} were due")
    yield _make_check("updates", figures, counts)
    if traces:
        moved = sum(tensor.changed for tensor in verdict.tensors)
        figures = (None, f"{moved} of {len(verdict.tensors)} moved", "all with a gradient")
        yield _make_check("tensors that updates moved", figures, traces)


def _is_about_counts(verdict: Verdict, reason: Reason) -> bool:
    """Whether a reason is about updates that were not applied, not about tensors that stayed."""
    own = [tensor for tensor in verdict.tensors if tensor.name in reason.tensors]
    tiers = [tier for tier in verdict.tiers if tier.tier in {tensor.tier for tensor in own}]
    if any(t.applied_updates + t.skipped_updates != t.expected_updates for t in tiers):
        return True
    return any(t.skipped_updates for t in tiers) and any(tensor.changed for tensor in own)


def _loss_checks(verdict: Verdict) -> Iterator[CheckRow]:
    bounds = verdict.thresholds or {}
    losses = verdict.validation
    if losses is not None:
        reasons = _reasons_of(verdict, "loss_regressed")
        figures = _loss_figures(losses)
        word = (losses.conclusion or "not judged").replace("_", " ")
        yield _make_check(f"loss, {describe_examples(losses)}", figures, reasons, word)
        harmed = _reasons_of(verdict, "examples_harmed")
        if losses.harmed is not None:
            share = f"at most {bounds.get('max_harmed_share', 0):.2%}, or {MIN_HARMED - 1}"
            yield _make_check("examples that lost much", (None, str(losses.harmed), share), harmed)
    if verdict.drift is not None and bounds.get("max_kl") is not None:
        kl = f"{format_loss(verdict.drift.kl_initial)} nats a token"
        bound = f"at most {bounds['max_kl']:g}"
        reasons = _reasons_of(verdict, "drift")
        yield _make_check("drift of predictions", (None, kl, bound), reasons)
    general = verdict.general
    if general is not None:
        reasons = _reasons_of(verdict, "forgetting")
        word = (general.conclusion or "not judged").replace("_", " ")
        yield _make_check("loss on general text", _loss_figures(general), reasons, word)


def _loss_figures(losses: Validation | GeneralLoss) -> tuple[str, str, str | None]:
    margin = None if losses.margin is None else f"at most +{losses.margin:.2g}"
    return format_loss(losses.loss_before), format_loss(losses.loss_after), margin


def _suite_check(verdict: Verdict, task: TaskResult) -> CheckRow:
    """A suite: right answers, and the bounds that it has."""
    reasons = [
        reason
        for reason in verdict.reasons
        if reason.code in SUITE_CODES and reason.suite == task.name
    ]
    suites: list[dict[str, Any]] = list((verdict.thresholds or {}).get("tasks") or ())
    section = next((own for own in suites if own.get("name") == task.name), {})
    words = {
        "min": "at least {}",
        "min_gain": "gain {} beyond chance",
        "max_drop": "lose at most {}",
    }
    bounds = [
        text.format(f"{section[key]:.0%}")
        for key, text in words.items()
        if section.get(key) is not None
    ]
    before, after = (f"{task.count(share)} of {task.questions}" for share in task.shares)
    figures = (before, after, ", ".join(bounds) or None)
    return _make_check(f"answers, {task.name}", figures, reasons)


def _sample_checks(verdict: Verdict) -> Iterator[CheckRow]:
    samples = verdict.samples
    if samples is not None and samples.judged:
        reasons = _reasons_of(verdict, "answers_broken")
        figures = ("0 broken", f"{samples.broken} of {samples.judged} broken", "at most half")
        word = "broken" if samples.are_broken else "passed"
        yield _make_check("sample answers", figures, reasons, word)


def _reasons_of(verdict: Verdict, code: Code) -> list[Reason]:
    return [reason for reason in verdict.reasons if reason.code == code]


def lost_answers(
    verdict: Verdict, answers: Sequence[AnswerRecord]
) -> Iterator[tuple[str, list[tuple[str | None, ...]]]]:
    """Of each suite that failed its name, and rows of LOST_COLUMNS for questions answered wrong.

    Those that were right before come first; at most MAX_LOST_PER_SUITE.
    """
    for task in verdict.tasks:
        if task.verdict == "passed":
            continue
        own = [answer for answer in answers if answer.task == task.name]
        earlier_role = "parent" if any(answer.model == "parent" for answer in own) else "base"
        before = {answer.line: answer for answer in own if answer.model == earlier_role}
        wrong = [answer for answer in own if answer.model == "candidate" and answer.score < 1]
        wrong.sort(key=lambda answer: (answer.score - before[answer.line].score, answer.line))
        yield (
            task.name,
            [
                (
                    answer.question,
                    answer.expected,
                    shown_answer(before[answer.line].answer),
                    shown_answer(answer.answer),
                )
                for answer in wrong[:MAX_LOST_PER_SUITE]
            ],
        )
