"""Examples of earlier data sets, which a run is trained on beside its own: what the core asks.

The room replay chooses them before training, and writes them with why to the run directory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.data.batches import BatchPlan, ExampleRows
from nested_core.data.tokens.tokenized_split import Int64, TokenizedSplit
from nested_core.records.start import Choice
from nested_core.storage.run_directory import RunDirectory

REPLAY_KEY = "continual.replay.fraction"
POLICY_KEY = "continual.policy"


@dataclass(frozen=True, eq=False)
class MixedExamples:
    """A run's own examples and the earlier ones under one numbering, and their batches.

    iterations: batches of the whole run.
    sum_earlier: the sum of a value a row, int64 [n], over the earlier rows of the first so many
        batches.
    """

    rows: ExampleRows
    plan: BatchPlan
    iterations: int
    sum_earlier: Callable[[Int64, int], int]


class EarlierExamples(Protocol):
    """The earlier examples of one run. All but `choose` read what `choose` wrote."""

    def __init__(self, config: FineTuneConfig, run: RunDirectory) -> None: ...

    def choose(self) -> None:
        """Choose them and write replay.json and replay.jsonl.

        Raises ConfigError where a source is missing or has changed, under `replay.missing: error`.
        """

    def read_choice(self) -> Choice:
        """Whether the run goes on from the champion or is trained from the base, and why."""

    def describe(self) -> list[str]:
        """Sentences: which are trained on, which are not, and what is missing."""

    def require_same_start(self, champion: str | None) -> None:
        """Raise ConfigError if they were chosen for another champion than this version."""

    def find_dropped(self) -> tuple[str, ...]:
        """SHA-256 of the run's own training examples that earlier data holds out."""

    def require_rows(self) -> None:
        """Raise DamagedError where replay.json or replay.jsonl is missing or altered."""

    def count(self) -> int:
        """How many they are."""

    def estimate_iterations(self, rows: int) -> int:
        """About how many batches a run takes that has so many training examples of its own."""

    def content_digest(self) -> str:
        """SHA-256 over all of this that can change the adapter."""

    def make_provenance(self, tokens: int) -> dict[str, Any]:
        """What provenance.json says of them; `tokens` of them were trained on."""

    def mix(self, new: TokenizedSplit, earlier: TokenizedSplit) -> MixedExamples:
        """The batches of a run whose own examples are `new`."""


def find_earlier_examples(config: FineTuneConfig, run: RunDirectory) -> EarlierExamples | None:
    """The earlier examples of a run; None if it replays none and rebuilds nothing.

    Raises ConfigError where the room replay is not installed.
    """
    if not config.replay_fraction and config.continual.policy == "continue":
        return None
    wanted = REPLAY_KEY if config.replay_fraction else POLICY_KEY
    earlier: EarlierExamples = seams.load_only("earlier_examples", wanted)(config, run)
    return earlier
