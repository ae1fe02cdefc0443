"""The lead's page of an adapter: its last nights in a table and a line, each linked to its run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterKey,
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterTags,
)
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort

from nested_core.errors import NestedTuneError
from nested_core.registry.gate_file import read_gate
from nested_core.storage.dataset_record import read_dataset_record
from nested_core.storage.run_directory import find_run_of
from nested_core.text.foreign_text import escape_markdown
from nested_core.text.svg_chart import STANDALONE, Chart, Curve, Point, draw_chart
from tasks.artifact_client import artifact_key
from tasks.markdown_page import Link, MarkdownPage
from tasks.server_outage import tolerating_server_outage

PAGE = "nights"
MAX_NIGHTS = 30
COLUMNS = ("night", "outcome", "conclusion", "loss", "right", "min", "examples")
HOW_TO_READ = (
    "Of losses and right answers the candidate's comes first, then the champion's. Losses are in "
    "nats a token on the examples that the gate judged by; right: answers of all suites. "
    "Examples: trained on + judged by; * judged by others than the night before."
)


@dataclass(frozen=True)
class Figures:
    """What the files of a run say of its night; None where it did not come so far."""

    conclusion: str | None = None
    loss: float | None = None
    champion_loss: float | None = None
    answers: str | None = None
    examples: str | None = None
    judged_on: str | None = None  # digest of the examples


def find_nights_page(client: SyncPrefectClient, name: str) -> UUID | None:
    """The artifact of an adapter's page, which stays the same; None before there is one."""
    wanted = ArtifactFilter(key=ArtifactFilterKey(any_=[artifact_key(name, PAGE)]))
    found = client.read_artifacts(artifact_filter=wanted, limit=1)
    return found[0].id if found else None


def make_nights_page(client: SyncPrefectClient, name: str) -> UUID:
    """Make the page before the first night, so that a deployment's description can lead to it."""
    page = MarkdownPage(f"{name}: no night yet")
    created = ArtifactCreate(
        key=artifact_key(name, PAGE),
        type="markdown",
        description=f"The nights of {escape_markdown(name)}",
        data=str(page),
    )
    return client.create_artifact(created).id


def publish_nights(name: str | None, ended: tuple[str, str] | None = None) -> None:
    """Publish the page of an adapter, or replace it; one page for all runs.

    `ended` is the id of the flow run at work with the name of the state that it is about to have.
    """
    if name is None:
        return
    with tolerating_server_outage(f"the page of {name}'s nights is not up to date"):
        runs = _read_runs(name)
        if not runs:
            return
        page = describe_nights(name, runs, {} if ended is None else dict([ended]))
        with get_client(sync_client=True) as client:
            there = find_nights_page(client, name) or make_nights_page(client, name)
            client.update_artifact(there, ArtifactUpdate(data=str(page)))


def describe_nights(
    name: str, runs: Sequence[FlowRun], outcomes: Mapping[str, str]
) -> MarkdownPage:
    """The table, the latest night first, and the losses over the nights.

    `outcomes` are those of flow runs, by id, that the server does not know yet.
    """
    page = MarkdownPage(f"{name}: the last nights")
    figures = [_read_figures(run) for run in runs]
    dates = [_describe_date(run) for run in runs]
    picture = draw_losses(dates[::-1], figures[::-1])
    if picture:
        page.add_picture(picture, "losses of candidate and champion over the nights")
    page.add_paragraph(HOW_TO_READ)
    rows = []
    for number, (run, night) in enumerate(zip(runs, figures, strict=True)):
        earlier = (f.judged_on for f in figures[number + 1 :] if f.judged_on is not None)
        is_changed = night.judged_on is not None and next(earlier, night.judged_on) != (
            night.judged_on
        )
        rows.append(
            (
                Link(dates[number], f"/runs/flow-run/{run.id}"),
                outcomes.get(str(run.id), run.state_name),
                night.conclusion,
                _join_two(night.loss, night.champion_loss),
                night.answers,
                f"{run.estimated_run_time.total_seconds() / 60:.1f}",
                f"{night.examples}{'*' * is_changed}" if night.examples else None,
            )
        )
    page.add_table(COLUMNS, rows)
    page.add_links(
        (what, f"/artifacts/key/{artifact_key(name, what)}")
        for what in ("champion", "night", "approval")
    )
    return page


def draw_losses(dates: Sequence[str], figures: Sequence[Figures]) -> str:
    """The losses over the nights as SVG, the oldest first; "" where no loss was measured."""
    sides = [
        (name, [Point(night, loss) for night, loss in enumerate(losses, 1)])
        for name, losses in (
            ("candidate", [each.loss for each in figures]),
            ("champion", [each.champion_loss for each in figures]),
        )
    ]
    curves = [Curve(name, points, has_dots=True) for name, points in sides]
    axis = f"night, 1 is {dates[0]}, {len(dates)} is {dates[-1]}"
    return draw_chart(Chart("Loss", axis, "nats a token", curves), STANDALONE)


def _read_runs(name: str) -> list[FlowRun]:
    """The last fine-tunes of an adapter that were due, the latest first; those of sweeps apart."""
    due = FlowRunFilterExpectedStartTime.model_validate({"before_": datetime.now(UTC)})
    wanted = FlowRunFilter(tags=FlowRunFilterTags(all_=[name]), expected_start_time=due)
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["finetune"])),
            flow_run_filter=wanted,
            sort=FlowRunSort.EXPECTED_START_TIME_DESC,
            limit=MAX_NIGHTS,
        )
    return [run for run in runs if "sweep" not in run.tags]


def _describe_date(run: FlowRun) -> str:
    due = run.expected_start_time or run.created or datetime.now(UTC)
    return f"{due.astimezone(UTC):%d %b}"


def _read_figures(run: FlowRun) -> Figures:
    """What the run's folder says, where it is on this machine and can be read."""
    folder = find_run_of(run.id)
    if folder is None or not folder.dataset.exists():
        return Figures()
    try:
        splits = read_dataset_record(folder.dataset).splits
        gate = read_gate(folder.gate) if folder.gate.exists() else {}
    except (NestedTuneError, OSError):  # its own page and `status` say what is wrong with it
        return Figures()
    validation, champion = gate.get("validation") or {}, gate.get("champion") or {}
    judged_by = validation.get("examples")
    trained_on = splits["train"].rows if "train" in splits else 0
    valid = splits.get("test") or splits.get("valid")
    return Figures(
        conclusion=_describe_conclusion(champion or validation),
        loss=validation.get("loss_after"),
        champion_loss=champion.get("loss"),
        answers=_count_right(gate),
        examples=f"{trained_on}+{judged_by}" if judged_by is not None else f"{trained_on}",
        judged_on=None if judged_by is None or valid is None else valid.digest,
    )


def _describe_conclusion(compared: Mapping[str, Any]) -> str | None:
    """The gate's word as a person writes it: `no worse`."""
    word = compared.get("conclusion")
    return None if word is None else str(word).replace("_", " ")


def _join_two(candidate: float | None, champion: float | None) -> str | None:
    """`0.0764 / 0.0547`: what the candidate has, and the champion."""
    if candidate is None:
        return None
    return f"{candidate:.3g} / {'-' if champion is None else f'{champion:.3g}'}"


def _count_right(gate: Mapping[str, Any]) -> str | None:
    """`12 / 13 of 15`: right answers of all suites, the candidate's and the champion's."""
    asked = gate.get("tasks") or []
    if not asked:
        return None
    counts = []
    for model in ("candidate", "champion"):
        shares = [(task.get(model), task["questions"]) for task in asked]
        is_known = all(share is not None for share, _ in shares)
        right = sum(share * questions for share, questions in shares) if is_known else None
        counts.append("-" if right is None else f"{round(right, 2):g}")
    return f"{' / '.join(counts)} of {sum(task['questions'] for task in asked)}"
