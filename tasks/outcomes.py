"""The names of states that Prefect's lists show in place of Completed, Failed and Scheduled."""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """What became of a flow run; its state's type stays Prefect's own."""

    PROMOTED = "Promoted"  # the version of this run is champion
    VERIFIED = "Verified"  # the gate passed it, and its policy did not ask for more
    KEPT_CHAMPION = "Kept the champion"  # sound, and not better
    SKIPPED = "Skipped"  # nothing to train, or another night at work
    DAMAGED = "Damaged"  # of the type Failed: a registry or run folder is not as it was written
    REJECTED = "Rejected"  # by the gate; of the type Failed
    RESUMED = "Resumed"  # scheduled again by an automation after a crash; see automations.yaml
    ROLLED_BACK = "Rolled back"
    DECLINED = "Declined"  # by a person who was asked
