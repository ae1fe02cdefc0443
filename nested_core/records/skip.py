"""skipped.json: why a run trained nothing, as its result would be the same as an earlier one's."""

from __future__ import annotations

from dataclasses import dataclass

from nested_core.config.schema import FineTuneConfig
from nested_core.records.outcome_names import Outcome
from nested_core.storage.json_file import JsonFile

INSIST = "To train all the same, set continual.skip_unchanged: false"


@dataclass(frozen=True)
class Skip:
    """Why a run trained nothing.

    outcome: SKIPPED_UNCHANGED or SKIPPED_HOPELESS.
    reason: in a few words, with the date: `rejected as worse on 24 Nov 2026`.
    details: further sentences after the reason, such as what the gate found; None if not needed.
    version: the version that the same data and settings produced earlier; None if they produced
        none.
    """

    outcome: Outcome
    reason: str
    details: str | None = None
    version: str | None = None

    def describe(self) -> str:
        """Return the reason with its details, and for a hopeless run how to train all the same."""
        text = self.reason if self.details is None else f"{self.reason} {self.details}"
        return f"{text.rstrip('.')}. {INSIST}" if self.outcome == Outcome.SKIPPED_HOPELESS else text

    def __str__(self) -> str:
        """Format the outcome with its reason."""
        return f"{self.outcome}: {self.describe()}"


def describe_repetition(config: FineTuneConfig) -> str:
    """Say, after a run that made no champion, that the same is not trained again; "" otherwise.

    It is "" unless `continual.from` and `continual.skip_unchanged` are set.
    """
    if config.continual.start is None or not config.continual.skip_unchanged:
        return ""
    return "; the same is not trained again until data, settings or champion change"


SKIP_FILE = JsonFile(Skip, 2**20)
read_skip, write_skip = SKIP_FILE.read, SKIP_FILE.write
