"""What rooms do around the flows: as a fine-tune begins and ends, every hour, every week."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient
from prefect.states import State

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.records.outcome_names import Outcome
from nested_core.storage.run_directory import RunDirectory


@dataclass(frozen=True)
class Sighting:
    """What an hourly look came upon: the name that the state of `reconcile` gets, and its words."""

    outcome: Outcome
    sentence: str


@dataclass(frozen=True)
class AdapterPage:
    """A page of an adapter on Prefect's server: its name, and its path there."""

    name: str
    path: str


class Watcher:
    """Does nothing. An instance of a room's subclass, its part, does what the room is for.

    A flow does not fail for what a watcher cannot do: its methods log that, and return.
    """

    def find_other_run(self) -> str | None:
        """Why this fine-tune's flow run is not to train, in a sentence; None where it is."""
        return None

    def begin(self, config: FineTuneConfig, run: RunDirectory, message: str) -> None:
        """A fine-tune begins or goes on; `message` says which."""

    def end(self, config: FineTuneConfig, run: RunDirectory, state: State[None]) -> None:
        """A fine-tune's flow is about to end in this state."""

    def ask(self, registry: Path, name: str, version: str, night: UUID | None) -> None:
        """A version waits for a person; `night` is its fine-tune's flow run, if that is at work."""

    def answer(
        self, config: FineTuneConfig, run: RunDirectory, flow_run: UUID, state: State[None]
    ) -> None:
        """The question of a fine-tune is answered: its flow run has this state from now on."""

    def look(
        self, registry: Path, names: Sequence[str], sound: Sequence[str], days_to_old: float | None
    ) -> Iterable[Sighting]:
        """The hourly look at the server and these adapters; `sound` are those without damage.

        A champion older than `days_to_old` is old.
        """
        return ()

    def find_page(self, client: SyncPrefectClient, name: str) -> AdapterPage | None:
        """The page of all runs of an adapter, made where there is none; None for no such page."""
        return None


def list_watchers() -> Iterator[Watcher]:
    """The watcher of each room that is there and has one."""
    return seams.load_all(Watcher)
