"""The gate's verdict for Prefect's pages: its figures in sentences, and a page of its own."""

from __future__ import annotations

from collections.abc import Iterator

from nested_core.records.verdict import ChampionLoss, TaskResult, Verdict, describe_examples
from nested_core.text.digest_format import shorten_digest
from nested_core.text.loss_format import format_difference, format_interval, format_loss
from nested_core.text.markdown_page import MarkdownPage

COMPARED_MODELS = ("base", "parent", "champion", "candidate")
SUITE_COLUMNS = ("suite", "questions", *COMPARED_MODELS, "change", "95 %", "verdict")
TIER_COLUMNS = ("tier", "updated every", "tensors", "changed", "expected updates", "applied")


def describe_verdict(verdict: Verdict) -> MarkdownPage:
    """A page of markdown: the verdict, why, the losses, and what became of each tier."""
    changed = sum(tensor.changed for tensor in verdict.tensors)
    page = MarkdownPage("passed" if verdict.has_passed else "failed")
    page.add_bullets((reason.code, reason.message) for reason in verdict.reasons)
    step = f"Adapter of step {verdict.adapter_step}"
    page.add_paragraph(f"{step}: {changed} of {len(verdict.tensors)} tensors changed.")
    for sentence in (*describe_quality(verdict), *(f"{note}." for note in verdict.notes())):
        page.add_paragraph(sentence)
    if verdict.tasks:
        page.add_table(SUITE_COLUMNS, map(_suite_row, verdict.tasks))
    tiers = [
        (t.tier, t.frequency, t.tensors, t.changed, t.expected_updates, t.applied_updates)
        for t in verdict.tiers
    ]
    page.add_table(TIER_COLUMNS, tiers)
    return page


def describe_quality(verdict: Verdict) -> Iterator[str]:
    """A sentence each on the loss before and after, the champion's, and the drift."""
    yield _as_sentence(describe_losses(verdict))
    if verdict.champion is not None:
        yield _as_sentence(describe_champion_loss(verdict.champion))
    elif verdict.validation is not None:
        yield "There was no champion to compare with."
    if verdict.drift is not None:
        yield _as_sentence(verdict.drift.describe())


def describe_losses(verdict: Verdict) -> str:
    """`loss 0.0184 before training, 0.0213 after, adapter of step 80 (valid.jsonl, ...); better`.

    Without one, that there was no validation set.
    """
    losses = verdict.validation
    if losses is None:
        return "no loss was measured, for there was no validation set"
    before, after = format_loss(losses.loss_before), format_loss(losses.loss_after)
    result = losses.describe_conclusion()
    if losses.examples == 0:
        result = f"not judged: all {losses.left_out} are ones that an adapter was trained on"
    return (
        f"loss {before} before training, {after} after, adapter of step {verdict.adapter_step} "
        f"({describe_examples(losses)})" + ("" if result is None else f"; {result}")
    )


def describe_champion_loss(champion: ChampionLoss) -> str:
    """The champion's loss on the same examples and the candidate's difference, or why not."""
    version = f"champion {shorten_digest(champion.version)}"
    if champion.not_compared is not None:
        return f"{version}: not compared; {champion.not_compared}"
    if champion.loss is None or champion.difference is None:
        return f"{version}: no loss on examples that neither was trained on"
    interval = ""
    if champion.interval is not None and champion.conclusion != "inconclusive":
        interval = f" (95 % interval {format_interval(champion.interval)})"
    few = "" if not champion.has_few_prompts else f"; {champion.describe_few_prompts()}"
    return (
        f"{version}: loss {format_loss(champion.loss)} on the same examples; difference "
        f"{format_difference(champion.difference)}, {champion.describe_conclusion()}{interval}"
        f"{few}"
    )


def describe_suites(verdict: Verdict) -> str:
    """The right answers before and after, of each suite, and which of them failed."""
    suites = [
        task.describe() if task.verdict == "passed" else f"{task.describe()} (failed)"
        for task in verdict.tasks
    ]
    return "; ".join(suites) or "no suite of questions (gate.tasks) was asked"


def _as_sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def _suite_row(task: TaskResult) -> tuple[object, ...]:
    interval = None
    if task.interval is not None:
        interval = f"{task.interval[0]:+.3f} to {task.interval[1]:+.3f}"
    scores = (task.base, task.parent, task.champion, task.candidate)
    return (task.name, task.questions, *scores, f"{task.difference:+.3f}", interval, task.verdict)
