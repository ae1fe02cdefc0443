"""The lead's page of an adapter: its last nights in a table and a line, each linked to its run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from nested_core.records.run import Run
from nested_core.records.verdict import TaskResult, Verdict
from nested_core.storage.run_directory import find_run_of
from nested_core.text.markdown_page import Link, MarkdownPage
from nested_core.text.svg_chart import STANDALONE, Chart, Curve, Point, draw_chart

COLUMNS = ("night", "outcome", "conclusion", "loss", "right", "min", "examples")
HOW_TO_READ = (
    "Of losses and right answers the candidate's comes first, then the champion's. Losses are in "
    "nats a token on the examples that the gate judged by; right: answers of all suites. "
    "Examples: trained on + judged by; * judged by others than the night before."
)


@dataclass(frozen=True)
class Night:
    """A night as the server knows it: its flow run, when it was due (UTC), and what became of it.

    minutes: how long it took, or has taken so far.
    """

    flow_run: UUID
    due: datetime
    outcome: str | None
    minutes: float


@dataclass(frozen=True)
class _Figures:
    """What the files of a run say of its night; None where it did not come so far."""

    conclusion: str | None = None
    loss: float | None = None
    champion_loss: float | None = None
    answers: str | None = None
    examples: str | None = None
    judged_on: str | None = None  # digest of the examples


def describe_nights(
    name: str, nights: Sequence[Night], links: Sequence[tuple[str, str]]
) -> MarkdownPage:
    """The table, the latest night first, the losses over the nights, and links to other pages."""
    page = MarkdownPage(f"{name}: the last nights")
    figures = [_read_figures(night) for night in nights]
    dates = [f"{night.due:%d %b}" for night in nights]
    picture = _draw_losses(dates[::-1], figures[::-1])
    if picture:
        page.add_picture(picture, "losses of candidate and champion over the nights")
    page.add_paragraph(HOW_TO_READ)
    rows = []
    judged_on = None
    for night, date, seen in zip(nights[::-1], dates[::-1], figures[::-1], strict=True):
        is_changed = None not in (judged_on, seen.judged_on) and judged_on != seen.judged_on
        judged_on = seen.judged_on or judged_on
        rows.append(
            (
                Link(date, f"/runs/flow-run/{night.flow_run}"),
                night.outcome,
                seen.conclusion,
                _join_two(seen.loss, seen.champion_loss),
                seen.answers,
                f"{night.minutes:.1f}",
                f"{seen.examples}*" if is_changed else seen.examples,
            )
        )
    page.add_table(COLUMNS, rows[::-1])
    page.add_links(links)
    return page


def _draw_losses(dates: Sequence[str], figures: Sequence[_Figures]) -> str:
    """The losses over the nights as SVG, the oldest first; "" where no loss was measured."""
    sides = {
        "candidate": [each.loss for each in figures],
        "champion": [each.champion_loss for each in figures],
    }
    curves = [
        Curve(name, [Point(night, loss) for night, loss in enumerate(losses, 1)], has_dots=True)
        for name, losses in sides.items()
    ]
    axis = f"night, 1 is {dates[0]}, {len(dates)} is {dates[-1]}"
    return draw_chart(Chart("Loss", axis, "nats a token", curves), STANDALONE)


def _read_figures(night: Night) -> _Figures:
    """What the run's folder says, where it is on this machine and can be read."""
    folder = find_run_of(night.flow_run)
    if folder is None:
        return _Figures()
    run = Run(folder)
    verdict = run.verdict
    if run.dataset is None or run.errors:  # its own page and `status` say what is wrong with it
        return _Figures()
    splits = run.dataset.splits
    trained_on = str(splits["train"].rows if "train" in splits else 0)
    if verdict is None:
        return _Figures(examples=trained_on)
    losses, champion = verdict.validation, verdict.champion
    compared = champion or losses
    conclusion = None if compared is None else compared.conclusion
    held_out = splits.get("test") or splits.get("valid")
    return _Figures(
        conclusion=None if conclusion is None else conclusion.replace("_", " "),
        loss=None if losses is None else losses.loss_after,
        champion_loss=None if champion is None else champion.loss,
        answers=_count_right(verdict),
        examples=trained_on if losses is None else f"{trained_on}+{losses.examples}",
        judged_on=None if losses is None or held_out is None else held_out.digest,
    )


def _join_two(candidate: float | None, champion: float | None) -> str | None:
    """`0.0764 / 0.0547`: what the candidate has, and the champion."""
    if candidate is None:
        return None
    return f"{candidate:.3g} / {'-' if champion is None else f'{champion:.3g}'}"


def _count_right(verdict: Verdict) -> str | None:
    """`12 / 13 of 15`: right answers of all suites, the candidate's and the champion's."""
    if not verdict.tasks:
        return None
    candidate = _sum_right(verdict.tasks, [task.candidate for task in verdict.tasks])
    champion = _sum_right(verdict.tasks, [task.champion for task in verdict.tasks])
    return f"{candidate} / {champion} of {sum(task.questions for task in verdict.tasks)}"


def _sum_right(tasks: Sequence[TaskResult], shares: Sequence[float | None]) -> str:
    if None in shares:
        return "-"
    right = sum((share or 0) * task.questions for share, task in zip(shares, tasks, strict=True))
    return f"{round(right, 2):g}"
