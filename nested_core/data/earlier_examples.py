"""Examples of earlier versions' data that a run trains on beside its own: the core's interface.

The room replay chooses them before training, and writes them, with the reasons, to the run
directory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.data.batches import BatchOrder, ExampleRows
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.records.start import Choice
from nested_core.storage.run_directory import RunDirectory

REPLAY_KEY = "continual.replay.fraction"
POLICY_KEY = "continual.policy"


@dataclass(frozen=True, eq=False)
class MixedExamples:
    """A run's own and earlier examples under one numbering, and their batches.

    rows: the run's own come first.
    iterations: batches of the whole run.
    """

    rows: ExampleRows
    plan: BatchOrder
    iterations: int


class EarlierExamples(Protocol):
    """The earlier examples of one run; all methods but `choose` read what `choose` wrote."""

    def choose(self) -> Mapping[str, str]:
        """Choose the examples and write replay.json and replay.jsonl.

        Returns the digests, as in dataset.json, of the splits that were read for the choice.
        Raises ConfigError if a source is missing or has changed, under `replay.missing: error`.
        """

    def read_choice(self) -> Choice:
        """Return whether the run starts from the champion or the base, and why."""

    def describe(self) -> list[str]:
        """Return sentences on which examples are trained on, which are not, and what is missing."""

    def require_same_start(self, champion: str | None) -> None:
        """Raise ConfigError if the examples were chosen for another champion than this version."""

    def find_dropped(self) -> tuple[str, ...]:
        """Return the SHA-256 of the run's own training examples that earlier data holds out."""

    def require_rows(self) -> None:
        """Raise DamagedError if replay.json or replay.jsonl is missing or altered."""

    def count(self) -> int:
        """Return the number of earlier examples."""

    def estimate_iterations(self, rows: int) -> int:
        """Estimate the batches of a run with `rows` training examples of its own."""

    def content_digest(self) -> str:
        """Return the SHA-256 of everything about these examples that can change the adapter."""

    def make_provenance(self, tokens: int) -> dict[str, object]:
        """Return the block of provenance.json on these examples.

        tokens: how many of their tokens were trained on.
        """

    def mix(self, new: TokenizedSplit, earlier: TokenizedSplit) -> MixedExamples:
        """Build the batches of a run from its own examples (`new`) and the earlier ones."""


@dataclass(frozen=True)
class Replay:
    """Where earlier examples come from.

    find: returns those of a run.
    list_ancestor_digests: returns what a champion's ancestors are judged by, of the registry's
        folder, the adapter's name and the champion: versions, and digests of what is kept of each.
    """

    find: Callable[[FineTuneConfig, RunDirectory], EarlierExamples]
    list_ancestor_digests: Callable[[Path, str, str], list[object]]


def find_earlier_examples(config: FineTuneConfig, run: RunDirectory) -> EarlierExamples | None:
    """Return the earlier examples of a run; None if it trains on its own examples alone.

    Raises ConfigError if the room replay is not installed.
    """
    if not config.replay_fraction and config.continual.policy == "continue":
        return None
    wanted = REPLAY_KEY if config.replay_fraction else POLICY_KEY
    return seams.load_only(Replay, wanted).find(config, run)
