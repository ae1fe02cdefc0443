"""What was decided about a version: the outcome as data, and the sentence that people read."""

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
    "waiting",  # a person is to be asked
    "declined",  # a person has said no, to it or to one of the same data and settings
    "damaged",
]


@dataclass(frozen=True)
class Decision:
    """The outcome for `version`; `previous` was the champion before it.

    reason: why it was not promoted, where the outcome's word does not say it.
    against_policy: what the registry's policy asks for and a person's promotion did not have.
    """

    outcome: Outcome
    version: str
    previous: str | None = None
    reason: str | None = None
    against_policy: str | None = None

    @property
    def sentence(self) -> str:
        """What became of the version, as every screen says it."""
        return self.reason or self.outcome
