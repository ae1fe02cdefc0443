"""A verdict as a table: each check with its figures before and after, its bound and result.

`list_checks` returns one row for each check. Every page, the card, `compare` and the terminal show
these rows, so a new figure is a field of the verdict and a row here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nested_core import seams
from nested_core.records.answers import AnswerRecord, shown_answer
from nested_core.records.loss_conclusion import MIN_CHANGE
from nested_core.records.verdict import (
    MIN_HARMED,
    ChampionLoss,
    CheckRow,
    Code,
    ComparedLoss,
    GeneralLoss,
    Reason,
    TaskResult,
    Validation,
    Verdict,
    describe_examples,
)
from nested_core.text.digest_format import shorten_digest
from nested_core.text.document import Table, Text
from nested_core.text.loss_format import format_difference, format_loss, loss_name_for_file

CHECK_COLUMNS = ("checked", "before", "after", "difference", "threshold", "verdict")
CHECKED = (
    "What was checked. Losses are in {unit} (nats/token: the mean of -ln(probability) of the "
    "expected tokens, as mlx_lm prints it). Differences have their 95 % interval"
)
LOST_COLUMNS = ("question", "expected", "before", "after")
MAX_LOST_PER_SUITE = 3
MAX_SHOWN_REASONS = 20
UPDATE_CODES: frozenset[Code] = frozenset({"tier_unchanged", "updates_missing"})
SUITE_CODES: frozenset[Code] = frozenset({"task_below", "task_regressed"})
OWN_ROW_CODES: frozenset[Code] = frozenset(
    {"loss_regressed", "examples_harmed", "drift", "forgetting", "answers_broken"}
)


def describe_verdict(verdict: Verdict, headline: str) -> Iterator[Text]:
    """Yield the first blocks of a document on a verdict: headline, summary, warnings."""
    yield Text(headline, verdict.tone, is_headline=True)
    yield Text(f"{verdict.summary()}.")
    yield from (Text(f"{note}.", "warn") for note in verdict.notes())


def check_tables(verdict: Verdict) -> Iterator[Table]:
    """Yield the table of checks, and one of the reasons where there are several."""
    yield check_table(verdict)
    if len(verdict.reasons) > 1:
        rows = [(r.name, r.message, len(r.tensors)) for r in verdict.reasons[:MAX_SHOWN_REASONS]]
        yield Table("Every reason against the adapter", ("code", "message", "tensors"), rows)


def check_table(verdict: Verdict) -> Table:
    """Return a table with one row for each check of a verdict."""
    unit = verdict.validation.unit if verdict.validation else seams.unit_of_loss(None)
    rows = [check.cells for check in list_checks(verdict)]
    return Table(CHECKED.format(unit=unit), CHECK_COLUMNS, rows)


def tier_table(verdict: Verdict) -> Table:
    """Return a table with one row for each tier: updates due and applied, mean relative change."""
    rows = []
    for tier in verdict.tiers:
        in_tier = [t.relative_delta for t in verdict.tensors if t.tier == tier.tier]
        deltas = [delta for delta in in_tier if delta is not None]
        mean = f"{sum(deltas) / len(deltas):.3f}" if deltas else None
        counts = (tier.expected_updates, tier.applied_updates, tier.skipped_updates)
        changed = f"{tier.changed} of {tier.tensors}"
        rows.append((f"tier {tier.tier}", f"every {tier.frequency}", changed, *counts, mean))
    columns = ("tier", "updated", "tensors changed", "expected", "applied", "skipped", "change")
    judged = f"step {verdict.adapter_step or 0:,}, whose adapter was evaluated"
    change = "Change: norm of a tensor's change over its norm, averaged"
    return Table(f"Updates up to {judged}. {change}", columns, rows)


def list_checks(verdict: Verdict) -> list[CheckRow]:
    """Return one row for each check of a verdict, passed ones included."""
    return [
        _tensor_check(verdict),
        *_update_checks(verdict),
        *_loss_checks(verdict),
        *(_suite_check(verdict, task) for task in verdict.tasks),
        *_sample_checks(verdict),
        *(row for shown, block in verdict.load_blocks() for row in shown.rows(block, verdict)),
    ]


def make_check(
    name: str, reasons: Sequence[Reason], word: str | None = "passed", **figures: str | None
) -> CheckRow:
    """Build a check's row; its result is the codes of `reasons`, or `word` without a reason."""
    codes = ", ".join(dict.fromkeys(reason.code for reason in reasons))
    return CheckRow(name, **figures, verdict=codes or word, has_failed=bool(reasons))


def _tensor_check(verdict: Verdict) -> CheckRow:
    """Build the row on the adapter's tensors, with all reasons that no other row shows."""
    elsewhere = UPDATE_CODES | SUITE_CODES | OWN_ROW_CODES | seams.list_reasons().keys()
    reasons = [reason for reason in verdict.reasons if reason.code not in elsewhere]
    after = f"{sum(tensor.changed for tensor in verdict.tensors)} of {len(verdict.tensors)} changed"
    return make_check("tensors", reasons, after=after, bound="finite, with an effect")


def _update_checks(verdict: Verdict) -> Iterator[CheckRow]:
    """Yield rows on how many updates were applied, and on updates that changed no tensor.

    Nothing for a verdict without tiers (groups of tensors that are updated equally often): it
    compares any two adapters, and knows of no training. The second row is only there for a fault.
    """
    if not verdict.tiers:
        return
    expected = sum(tier.expected_updates for tier in verdict.tiers)
    applied = sum(tier.applied_updates for tier in verdict.tiers)
    reasons = reasons_of(verdict, *UPDATE_CODES)
    about_counts = [reason for reason in reasons if _is_about_counts(verdict, reason)]
    about_tensors = [reason for reason in reasons if reason not in about_counts]
    due = f"{expected:,} were due"
    yield make_check("updates", about_counts, after=f"{applied:,} applied", bound=due)
    if about_tensors:
        moved = sum(tensor.changed for tensor in verdict.tensors)
        after = f"{moved} of {len(verdict.tensors)} moved"
        name = "tensors that updates moved"
        yield make_check(name, about_tensors, after=after, bound="all with a gradient")


def _is_about_counts(verdict: Verdict, reason: Reason) -> bool:
    """Return whether a reason is about updates not applied, not about tensors left unchanged."""
    tensors = [tensor for tensor in verdict.tensors if tensor.name in reason.tensors]
    tiers = [tier for tier in verdict.tiers if tier.tier in {tensor.tier for tensor in tensors}]
    if any(t.applied_updates + t.skipped_updates != t.expected_updates for t in tiers):
        return True
    return any(t.skipped_updates for t in tiers) and any(tensor.changed for tensor in tensors)


def _loss_checks(verdict: Verdict) -> Iterator[CheckRow]:
    """Yield the rows of the table of checks that are about losses.

    These are: held-out losses before and after training, examples that got much worse, the
    champion and a reference that the adapter was compared with, earlier versions, the KL divergence
    of the predictions, and the loss on general text. A check that was not made has no row.
    """
    losses, drift, general = verdict.validation, verdict.drift, verdict.general
    if losses is not None:
        name = f"{loss_name_for_file(losses.file)}, {describe_examples(losses)}"
        yield _loss_check(name, losses, reasons_of(verdict, "loss_regressed"))
        if losses.harmed is not None:
            share = f"{verdict.bound('max_harmed_share') or 0:.2%}"
            bound = f"at most {share} of them, or {MIN_HARMED - 1} examples"
            harmed = reasons_of(verdict, "examples_harmed")
            # How many examples are beyond the rise that counts as harm
            after = str(losses.harmed)
            name = f"examples that lost more than {MIN_CHANGE} {losses.unit}"
            yield make_check(name, harmed, after=after, bound=bound)
    for role, other in (("champion", verdict.champion), ("reference", verdict.reference)):
        if other is not None:
            yield _rival_check(role, other)
    yield from _ancestor_checks(verdict)
    if drift is not None:
        max_kl = verdict.bound("max_kl")
        bound = "none set (0: no prediction moved)" if max_kl is None else f"at most {max_kl:g}"
        reasons = reasons_of(verdict, "drift")
        after = format_loss(drift.kl_initial)
        word = None if max_kl is None else "passed"  # where no reason against it was given
        name = "KL divergence from the initial adapter"
        yield make_check(name, reasons, word, after=after, bound=bound)
        if drift.kl_base is not None:
            name = "KL divergence from the base"
            yield CheckRow(name, after=format_loss(drift.kl_base), verdict=None)
    if general is not None:
        reasons = [r for r in reasons_of(verdict, "forgetting") if r.ancestor is None]
        yield _loss_check("loss on general text", general, reasons)


def _loss_check(name: str, losses: Validation | GeneralLoss, reasons: Sequence[Reason]) -> CheckRow:
    """Build the row of a loss before and after, with its margin."""
    return make_check(
        name,
        reasons,
        (losses.conclusion or "not evaluated").replace("_", " "),
        before=format_loss(losses.loss_before),
        after=format_loss(losses.loss_after),
        difference=_difference(losses),
        bound=None if losses.margin is None else f"at most +{losses.margin:.2g}",
    )


def _rival_check(role: str, rival: ChampionLoss) -> CheckRow:
    """Build the row that compares the candidate with another version on the same examples.

    role: what the other version is, such as champion.
    """
    name, examples = f"{role} {shorten_digest(rival.version)}", f"{rival.examples} examples"
    if rival.not_compared is not None:
        return CheckRow(f"{name}, {examples}", verdict=f"not compared: {rival.not_compared}")
    if rival.loss is None or rival.difference is None:
        problem = "no loss on examples that neither was trained on"
        return CheckRow(f"{name}, {examples}", verdict=problem)
    return CheckRow(
        f"{name} vs this run, {examples}",
        format_loss(rival.loss),
        format_loss(rival.loss_after),
        _difference(rival),
        verdict=rival.describe_few_prompts() or (rival.conclusion or "").replace("_", " ") or None,
    )


def _ancestor_checks(verdict: Verdict) -> Iterator[CheckRow]:
    """Yield a row for each earlier version whose held-out examples this run was judged by too.

    The row compares the losses of the champion and of this run on these examples. Versions that
    were not compared share one row for each cause.
    """
    bound = verdict.bound("max_ancestor_loss_increase")
    names_by_problem: dict[str, list[str]] = {}
    for ancestor in verdict.ancestors:
        if ancestor.not_compared is not None:
            names_by_problem.setdefault(ancestor.not_compared, []).append(ancestor.name)
            continue
        left_out = ancestor.describe_left_out()
        counted = f"{ancestor.examples} examples" + (f" ({left_out})" if left_out else "")
        conclusion = (ancestor.conclusion or "").replace("_", " ")
        yield make_check(
            f"{ancestor.role} vs this run, on what {ancestor.name} was judged by, {counted}",
            [r for r in reasons_of(verdict, "forgetting") if r.ancestor == ancestor.version],
            conclusion or None,
            before=format_loss(ancestor.loss),
            after=format_loss(ancestor.loss_after),
            difference=_difference(ancestor),
            bound=None if bound is None else f"at most +{ancestor.margin or 0:.2g}",
        )
    for problem, names in names_by_problem.items():
        name = f"earlier {names[0]}"
        if len(names) > 1:
            name = f"{len(names)} earlier versions, the newest {names[0].removeprefix('version ')}"
        yield CheckRow(name, verdict=f"not compared: {problem}")


def _difference(compared: ComparedLoss) -> str | None:
    """Format the difference of two losses with its interval; None if there is no difference."""
    if compared.difference is None:
        return None
    return format_difference(compared.difference, compared.interval)


def _suite_check(verdict: Verdict, task: TaskResult) -> CheckRow:
    """Build the row of a suite of questions: right answers before and after, and its bounds.

    task: the suite's result. Its bounds are read from the thresholds that the verdict recorded;
        they are JSON of any age, so that what has another form counts as no bound.
    """
    reasons = [r for r in reasons_of(verdict, *SUITE_CODES) if r.suite == task.name]
    tasks = (verdict.thresholds or {}).get("tasks")
    suites = tasks if isinstance(tasks, list | tuple) else ()
    section = next((t for t in suites if isinstance(t, dict) and t.get("name") == task.name), {})
    text_by_bound = {
        "min": "at least {}",
        "min_gain": "gain {} beyond chance",
        "max_drop": "lose at most {}",
    }
    bounds = [
        text.format(f"{section[key]:.0%}")
        for key, text in text_by_bound.items()
        if isinstance(section.get(key), int | float)
    ]
    shares = (task.before, task.candidate)
    before, after = (f"{task.count(share)} of {task.questions}" for share in shares)
    champion = "" if task.champion is None else f" (champion {task.count(task.champion)})"
    word: str = task.verdict
    if word == "passed" and task.is_no_better_than_constant:
        word = f"no better than one fixed answer ({task.count(task.constant or 0.0)})"
    return make_check(
        f"answers, {task.name}{champion}",
        reasons,
        word,
        before=before,
        after=after,
        difference=format_difference(task.difference, task.interval),
        bound=", ".join(bounds) or None,
    )


def _sample_checks(verdict: Verdict) -> Iterator[CheckRow]:
    """Yield the row on broken sample answers, if any were judged."""
    samples = verdict.samples
    if samples is not None and samples.judged:
        reasons = reasons_of(verdict, "answers_broken")
        after = f"{samples.broken} of {samples.judged} broken"
        word = "broken" if samples.are_broken else "passed"
        yield make_check("sample answers", reasons, word, after=after, bound="at most half")


def reasons_of(verdict: Verdict, *codes: str) -> list[Reason]:
    """Return the reasons of a verdict that have one of these codes."""
    return [reason for reason in verdict.reasons if reason.code in codes]


def lost_answers(verdict: Verdict, answers: Sequence[AnswerRecord]) -> Iterator[Table]:
    """Yield a table of wrongly answered questions for each suite that failed.

    Questions that were answered right before training come first, at most MAX_LOST_PER_SUITE.
    """
    for task in verdict.tasks:
        if task.verdict == "passed":
            continue
        of_suite = [answer for answer in answers if answer.task == task.name]
        earlier_role = "parent" if any(answer.model == "parent" for answer in of_suite) else "base"
        before = {answer.line: answer for answer in of_suite if answer.model == earlier_role}
        wrong = [answer for answer in of_suite if answer.model == "candidate" and answer.score < 1]
        wrong.sort(key=lambda answer: (answer.score - before[answer.line].score, answer.line))
        rows = [
            (a.question, a.expected, shown_answer(before[a.line].answer), shown_answer(a.answer))
            for a in wrong[:MAX_LOST_PER_SUITE]
        ]
        yield Table(f"{task.name}: questions answered wrong", LOST_COLUMNS, rows)
