"""Publishes the pages of an adapter's nights, before, while and after its flows run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import get_run_logger, runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import FlowFilter, FlowRunFilter
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.sorting import FlowRunSort
from prefect.states import State

from flows.flow_runs.watchers import AdapterPage, Sighting, Watcher
from flows.rooms.nights.other_night import find_other_night
from flows.rooms.nights.run_list import end_dead_runs, resume_forgotten_runs, tidy_run_list
from flows.rooms.nights.warning_events import (
    warn_of_full_disks,
    warn_of_long_runs,
    warn_of_old_champions,
    warn_of_unusual_night,
)
from nested_core.config.schema import FineTuneConfig
from nested_core.records.outcome_names import Outcome
from nested_core.records.run_status import Run
from nested_core.rooms.nights.pages import Night, describe_night, describe_nights, join_lines
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.document import Document
from nested_core.text.foreign_text import escape_markdown
from tasks.artifact_client import artifact_key, artifact_path, find_newest_artifact, publish_page
from tasks.prefect_server import asking_server

NIGHTS_PAGE = "nights"
OTHER_PAGES = ("champion", "night", "approval")
MAX_NIGHTS = 30


def publish_night(
    config: FineTuneConfig,
    run: RunDirectory,
    outcome: str,
    message: str,
    *,
    flow_run: UUID | None = None,
) -> None:
    """Publish the page of a night, or replace it. An unreadable file of the run is only logged.

    outcome: the name of the flow run's state.
    message: the message of that state.
    flow_run: the flow run that the page belongs to; None is the present one.
    """
    shown = join_lines(message)
    if not shown.startswith(outcome):
        shown = f"{outcome}: {shown}"  # a list shows the first 40 characters
    read = Run(run)
    page = describe_night(config, read, outcome, message)
    if read.problems:  # the night is over: a page changes nothing
        get_run_logger().warning("The page of this run is not up to date: %s", read.problems[0])
        return
    publish_page(config.registry.name, "night", page, shown, flow_run)


def find_or_make_nights_page(client: SyncPrefectClient, name: str) -> UUID:
    """Return the artifact of an adapter's page, which stays the same.

    It is made before the first night, so that a deployment's description can lead to it.
    """
    key = artifact_key(name, NIGHTS_PAGE)
    if (page := find_newest_artifact(client, key)) is not None:
        return page.id
    created = ArtifactCreate(
        key=key,
        type="markdown",
        description=f"Runs of {escape_markdown(name)}",
        data=str(Document(f"{name}: no run yet", [])),
    )
    return client.create_artifact(created).id


def publish_nights(name: str | None, ended: tuple[UUID, str] | None = None) -> None:
    """Publish the page that lists all runs of an adapter, or replace it.

    ended: the id of the present flow run, and the name of the state in which it is about to end;
        None while it goes on.
    """
    if name is None:
        return
    with asking_server(f"the page of {name}'s runs is not up to date") as client:
        outcomes = dict([] if ended is None else [ended])
        nights = [night_of(run, outcomes.get(run.id)) for run in _read_runs(client, name)]
        if nights:
            links = _list_links(client, name)
            page = ArtifactUpdate(data=str(describe_nights(name, nights, links)))
            client.update_artifact(find_or_make_nights_page(client, name), page)


def _list_links(client: SyncPrefectClient, name: str) -> list[tuple[str, str]]:
    """Return the newest of each of an adapter's other pages that the server has, with its path."""
    newest = {page: find_newest_artifact(client, artifact_key(name, page)) for page in OTHER_PAGES}
    return [(page, artifact_path(each.id)) for page, each in newest.items() if each is not None]


def _read_runs(client: SyncPrefectClient, name: str) -> list[FlowRun]:
    """Return the last fine-tunes of an adapter that were due, the latest first."""
    wanted = {"tags": {"all_": [name]}, "expected_start_time": {"before_": datetime.now(UTC)}}
    return client.read_flow_runs(
        flow_filter=FlowFilter.model_validate({"name": {"any_": ["finetune"]}}),
        flow_run_filter=FlowRunFilter.model_validate(wanted),
        sort=FlowRunSort.EXPECTED_START_TIME_DESC,
        limit=MAX_NIGHTS,
    )


def night_of(run: FlowRun, outcome: str | None) -> Night:
    """Return a flow run as a night; `outcome` where the server does not know it yet."""
    due = run.expected_start_time or run.created or datetime.now(UTC)
    minutes = run.estimated_run_time.total_seconds() / 60
    return Night(run.id, due.astimezone(UTC), outcome or run.state_name, minutes)


class NightWatcher(Watcher):
    """Pages, warnings, and the end of runs whose process is gone."""

    def find_other_run(self) -> str | None:
        """Another night of this adapter that is at work, or suspended."""
        return find_other_night()

    def begin(self, config: FineTuneConfig, run: RunDirectory, message: str) -> None:
        """Publish the page of this night, which is replaced when it is over."""
        warn_of_full_disks([run.path])
        publish_night(config, run, Outcome.RUNNING, message)

    def end(self, config: FineTuneConfig, run: RunDirectory, state: State[Any]) -> None:
        """Publish the pages of the night and of the adapter."""
        outcome = str(state.name)
        if run.config.exists():
            publish_night(config, run, outcome, str(state.message))
        publish_nights(config.registry.name, (UUID(str(runtime.flow_run.id)), outcome))
        if not state.is_failed():  # that is told already
            warn_of_unusual_night(config.registry, run)

    def answer(
        self, config: FineTuneConfig, run: RunDirectory, flow_run: UUID, state: State[Any]
    ) -> None:
        """Put the answer on both pages."""
        publish_night(config, run, str(state.name), str(state.message), flow_run=flow_run)
        publish_nights(config.registry.name)

    def look(
        self, registry: Path, names: Sequence[str], sound: Sequence[str], days_to_old: float | None
    ) -> Iterator[Sighting]:
        """Warn, end dead runs, resume forgotten ones, and bring lists and pages up to date.

        Yields what was found: long runs, and dead runs that were ended.

        sound: the names of the registry that are not damaged, whose pages are published.
        days_to_old: the age at which a champion is warned of; None warns of none.
        """
        if days_to_old is not None:
            warn_of_old_champions(registry, names, days_to_old)
        warn_of_full_disks([registry, Path.cwd()])
        if long_runs := ", ".join(warn_of_long_runs()):
            sentence = f"take far longer than the runs before them: {long_runs}"
            yield Sighting(Outcome.SAW_LONG_RUN, sentence)
        if dead := ", ".join(end_dead_runs()):
            sentence = f"ended, for their processes are gone: {dead}"
            yield Sighting(Outcome.ENDED_DEAD_RUNS, sentence)
        resume_forgotten_runs()
        tidy_run_list()
        for name in sound:
            publish_nights(name)

    def find_page(self, client: SyncPrefectClient, name: str) -> AdapterPage:
        """The page of the last nights."""
        path = artifact_path(find_or_make_nights_page(client, name))
        return AdapterPage(artifact_key(name, NIGHTS_PAGE), path)


WATCHER = NightWatcher()
