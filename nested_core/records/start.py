"""start.json: what a run of `continual.from` begins from, why, and what else it would have cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from nested_core.config.schema import FineTuneConfig
from nested_core.storage.json_file import JsonFile
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest
from nested_core.text.duration_format import format_duration

MAX_BYTES = 2**20


@dataclass(frozen=True)
class Choice:
    """How a run follows the champion.

    policy: `rebuild` trains from the base, `continue` from the champion.
    reason: why, as a clause.
    seconds: what a run of each policy is forecast to take; empty where nothing was measured.
    """

    policy: Literal["rebuild", "continue"]
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)

    def describe_seconds(self) -> str:
        """The forecasts in brackets; an empty text without any."""
        told = [f"{policy} {format_duration(cost)}" for policy, cost in self.seconds.items()]
        return f" (forecast: {', '.join(told)})" if told else ""


CONFIGURED = Choice("continue", "continual.policy is continue")


@dataclass(frozen=True)
class Start:
    """What a run began from.

    champion: the version that it follows; None before the first champion.
    choice: whether it goes on from that.
    rate_share: of `learning_rate`, at which it is trained.
    """

    champion: str | None
    choice: Choice
    rate_share: float = 1.0

    def describe(self, name: str | None) -> str:
        """A sentence; `name` is the adapter's."""
        if self.champion is None:
            return f"{name} has no champion yet: starting from a fresh adapter"
        version = f"version {shorten_digest(self.champion)} of {name}"
        if self.choice.policy == "continue":
            rate = f" at {self.rate_share:g} of the learning rate" if self.rate_share != 1 else ""
            what = f"starting from {version}{rate}"
        else:
            what = f"training from the base, to follow {version}"
        if self.choice == CONFIGURED:
            return what
        return f"{what}: {self.choice.reason}{self.choice.describe_seconds()}"

    def to_provenance(self) -> dict[str, Any]:
        """What provenance.json says of it."""
        return {
            "champion": self.champion,
            "policy": self.choice.policy,
            "reason": self.choice.reason,
            "forecast_seconds": self.choice.seconds,
            "rate_share": self.rate_share,
        }


START_FILE = JsonFile(Start, MAX_BYTES)


def read_start(config: FineTuneConfig, run: RunDirectory) -> Start | None:
    """What a loaded run began from; None for one that follows no champion.

    Raises DamagedError where the file is missing or is no such record.
    """
    return None if config.continual.start is None else START_FILE.read(run.start)
