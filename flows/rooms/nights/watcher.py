"""What the room does around the flows, in their order."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.states import State

from flows.flow_runs.watchers import AdapterPage, Sighting, Watcher
from flows.rooms.nights.artifacts import (
    NIGHTS_PAGE,
    find_nights_page,
    make_nights_page,
    publish_night,
    publish_nights,
)
from flows.rooms.nights.dead_runs import end_dead_runs, resume_forgotten_runs
from flows.rooms.nights.other_night import find_other_night
from flows.rooms.nights.run_list import tidy_run_list
from flows.rooms.nights.warning_events import (
    warn_of_full_disks,
    warn_of_long_runs,
    warn_of_old_champions,
    warn_of_unusual_night,
)
from nested_core.config.schema import FineTuneConfig
from nested_core.records.outcome_names import Outcome
from nested_core.storage.run_directory import RunDirectory
from tasks.artifact_client import artifact_key, artifact_path


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
        self,
        registry: Path,
        names: Sequence[str],
        sound: Sequence[str],
        old_after_days: float | None,
    ) -> Iterator[Sighting]:
        """Warn, end dead runs, resume forgotten ones, and bring lists and pages up to date.

        Yields what was found: long runs, and dead runs that were ended.

        sound: the names of the registry that are not damaged, whose pages are published.
        old_after_days: the age at which a champion is warned of; None warns of none.
        """
        if old_after_days is not None:
            warn_of_old_champions(registry, names, old_after_days)
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
        page = find_nights_page(client, name) or make_nights_page(client, name)
        return AdapterPage(artifact_key(name, NIGHTS_PAGE), artifact_path(page))


WATCHER = NightWatcher()
