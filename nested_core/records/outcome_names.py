"""The names of what became of a run, spelt the same in Prefect's states, lists and pages."""

from __future__ import annotations

from enum import StrEnum


class Outcome(StrEnum):
    """What became of a run; also the name of its Prefect state."""

    RUNNING = "Running"  # a process works on it
    PROMOTED = "Promoted"  # the version of this run is champion
    VERIFIED = "Verified"  # the gate passed it, and its policy did not ask for more
    KEPT_CHAMPION = "Kept the champion"  # sound, and not better
    # Nothing was trained, for the data and settings are those of a version that is there;
    SKIPPED_UNCHANGED = "Skipped: unchanged"
    # or of a run that made no champion against the same one, and would make none again;
    SKIPPED_HOPELESS = "Skipped: hopeless"
    SKIPPED_ANOTHER_NIGHT = "Skipped: another night"  # or another run of the adapter is at work.
    ROLLED_BACK = "Rolled back"
    # Of the hourly look, by the first of these that it found:
    ENDED_DEAD_RUNS = "Ended dead runs"  # their processes were gone
    SAW_ROLLBACK = "Saw a rollback"  # that was done elsewhere
    SAW_LONG_RUN = "Saw a long run"  # it takes far longer than the last ones did
    # Of a question that is put to a person, and of the night that asks it:
    WAITS_FOR_APPROVAL = "Waits for approval"
    APPROVED = "Approved"  # the version is champion by a person's word
    DECLINED = "Declined"
    SUPERSEDED = "Superseded"  # a newer version's question closed it
    # Of the type Failed:
    DAMAGED = "Damaged"  # a registry or run folder is not as it was written
    DATA_REFUSED = "Failed: data"  # the data set was rejected before anything was trained
    UNCHANGED = "Rejected: unchanged"  # by the gate, as those below: training did not reach it
    UNSOUND = "Rejected: unsound"  # its files are not an adapter of this base
    WORSE = "Rejected: worse"  # its losses are
    HARMED = "Rejected: harmed"  # good on average, and far worse on some examples
    ANSWERS = "Rejected: answers"  # they are too often wrong, or broken


# Of a night that trained nothing; its time is not that of a training.
ENDED_BEFORE_TRAINING = frozenset(
    {
        Outcome.SKIPPED_UNCHANGED,
        Outcome.SKIPPED_HOPELESS,
        Outcome.SKIPPED_ANOTHER_NIGHT,
        Outcome.DATA_REFUSED,
    }
)
# Of a run that made no champion, within a sentence: `rejected as worse on 24 Nov 2026`.
WORDS_IN_SENTENCE: dict[str, str] = {
    Outcome.UNCHANGED: "rejected as unchanged",
    Outcome.UNSOUND: "rejected as unsound",
    Outcome.WORSE: "rejected as worse",
    Outcome.HARMED: "rejected as harmed",
    Outcome.ANSWERS: "rejected for its answers",
    Outcome.KEPT_CHAMPION: "no better than the champion",
}
# Of a version that was registered, by the outcome of its decision
# (registry/promotion_outcome.py); what the others are called depends on the verdict.
OUTCOME_BY_DECISION: dict[str, Outcome] = {
    "promoted": Outcome.PROMOTED,
    "waiting": Outcome.WAITS_FOR_APPROVAL,
    "declined": Outcome.DECLINED,
    "not_better": Outcome.KEPT_CHAMPION,
}
