"""What was decided about a version, as data and as a sentence."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
