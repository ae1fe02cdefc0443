"""start.json: whether a run of `continual.from` started from the champion or the base, and why."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nested_core.config.schema import FineTuneConfig
from nested_core.storage.json_file import JsonFile
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.digest_format import shorten_digest
from nested_core.text.duration_format import format_duration

MAX_BYTES = 2**20


@dataclass(frozen=True)
class Choice:
    """Whether a run that follows the champion starts from it or from the base.

    policy: `rebuild` trains from the base, `continue` from the champion.
    reason: why, as a clause.
    seconds: the forecast time of a run by policy; empty if nothing was measured.
    """

    policy: Literal["rebuild", "continue"]
    reason: str
    seconds: dict[str, float] = field(default_factory=dict)

    def describe_seconds(self) -> str:
        """Return the forecast times in brackets; "" without forecasts."""
        forecasts = [f"{policy} {format_duration(cost)}" for policy, cost in self.seconds.items()]
        return f" (forecast: {', '.join(forecasts)})" if forecasts else ""


CONFIGURED = Choice("continue", "continual.policy is continue")


@dataclass(frozen=True)
class Start:
    """What a run started training from.

    champion: the version that was champion; None before the first champion.
    choice: whether training started from the champion or from the base.
    rate_share: the factor on `learning_rate` that the run is trained with.
    """

    champion: str | None
    choice: Choice
    rate_share: float = 1.0

    def describe(self, name: str | None) -> str:
        """Describe in a sentence what training started from; `name` is the adapter's name."""
        if self.champion is None:
            return f"{name} had no champion when the run began: starting from a fresh adapter"
        version = f"version {shorten_digest(self.champion)} of {name}"
        if self.choice.policy == "continue":
            rate = f" at {self.rate_share:g} of the learning rate" if self.rate_share != 1 else ""
            what = f"starting from {version}{rate}"
        else:
            what = f"training from the base, to follow {version}"
        if self.choice == CONFIGURED:
            return what
        return f"{what}: {self.choice.reason}{self.choice.describe_seconds()}"

    def to_provenance(self) -> dict[str, object]:
        """Return the block that provenance.json has about the start."""
        return {
            "champion": self.champion,
            "policy": self.choice.policy,
            "reason": self.choice.reason,
            "forecast_seconds": self.choice.seconds,
            "rate_share": self.rate_share,
        }


START_FILE = JsonFile(Start, MAX_BYTES)


def read_start(config: FineTuneConfig, run: RunDirectory) -> Start | None:
    """Read what a run started from; None if its configuration does not follow a champion.

    Raises DamagedError if start.json is missing or has another form.
    """
    return None if config.continual.start is None else START_FILE.read(run.start)
