"""What was decided about a version, as data and as a sentence; and which are undecided."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Literal

from nested_core import seams
from nested_core.config.sections import RegistrySection
from nested_core.registry.judgements import Judgement
from nested_core.registry.ledger import CHAMPION_CHANGE_ACTIONS, Ledger

# Lines about a version in use
USES = ("registered", "restored", "judged", *CHAMPION_CHANGE_ACTIONS)
UNPROMOTED_GRACE_TIME = timedelta(hours=1)  # between a version's registration and its promotion

Outcome = Literal[
    "registered",  # its policy is never: nothing promotes it automatically
    "promoted",
    "rolled_back",
    "already_champion",
    "superseded",  # another version is champion than the one that was expected
    "barred",  # a rollback left it, and nobody has promoted it by name since
    "refused",  # verdict or policy keep it from being promoted by itself
    "not_better",  # than the champion that it follows, and it has to be: nothing was registered
    "waiting",  # a person is to be asked
    "declined",  # a person has said no, to it or to one of the same data and settings
    "damaged",
]


@dataclass(frozen=True)
class Decision:
    """The decision about `version`.

    previous: the champion before the decision.
    reason: why it was not promoted, if the outcome alone does not say it.
    against_policy: what the policy requires and a person's promotion did not have.
    """

    outcome: Outcome
    version: str
    previous: str | None = None
    reason: str | None = None
    against_policy: str | None = None

    @property
    def is_registered(self) -> bool:
        """Whether the version is in the registry."""
        return self.outcome != "not_better"

    @property
    def sentence(self) -> str:
        """The reason, or the outcome if there is no reason."""
        return self.reason or self.outcome


@dataclass(frozen=True)
class Approval:
    """A room's questions to a person, and the answers.

    decide: returns what is decided about a version that only the person's word keeps from its
        promotion: that it waits or was declined. Of the adapter's history, the run's configuration
        of the registry, the verdict on the version, and the champion.
    may_follow: returns whether a version that never was champion waits for a person. Of the
        adapter's folder, the version, the history, and the time since the version's last verdict.
    """

    decide: Callable[[Ledger, RegistrySection, Judgement, str | None], Decision]
    may_follow: Callable[[Path, str, Ledger, timedelta], bool]


def may_be_promoted(folder: Path, version: str, ledger: Ledger) -> bool:
    """Return whether a promotion may follow: the version is new, and was never champion since.

    A version that waits for a person's approval counts as new for as long as it waits.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    """
    lines = ledger.by_version.get(version, [])
    if version in ledger.champion_versions():
        return False
    times = [datetime.fromisoformat(e.time) for _, e in lines if e.action in USES]
    age = datetime.now(UTC) - max(times, default=datetime.now(UTC))
    return age < UNPROMOTED_GRACE_TIME or any(
        approval.may_follow(folder, version, ledger, age) for approval in seams.load_all(Approval)
    )
