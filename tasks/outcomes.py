"""The names of states, which Prefect's lists show in place of Completed, Failed and the like."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nested_core.records.verdict import Code
    from nested_core.registry import decision


class Outcome(StrEnum):
    """What became of a flow run; its state's type stays Prefect's own."""

    PROMOTED = "Promoted"  # the version of this run is champion
    VERIFIED = "Verified"  # the gate passed it, and its policy did not ask for more
    KEPT_CHAMPION = "Kept the champion"  # sound, and not better
    SKIPPED = "Skipped"  # nothing to train, or another night at work
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


# Of a version that was registered; what the others are called depends on the verdict.
OUTCOME_BY_DECISION: dict[decision.Outcome, Outcome] = {
    "promoted": Outcome.PROMOTED,
    "waiting": Outcome.WAITS_FOR_APPROVAL,
    "declined": Outcome.DECLINED,
}
# By the first reason of a verdict: each code of nested_core.records.verdict.
OUTCOME_BY_CODE: dict[Code, Outcome] = {
    "unchanged": Outcome.UNCHANGED,
    "tier_unchanged": Outcome.UNCHANGED,
    "updates_missing": Outcome.UNCHANGED,
    "no_effect": Outcome.UNCHANGED,
    "non_finite": Outcome.UNSOUND,
    "tensor_missing": Outcome.UNSOUND,
    "tensor_unexpected": Outcome.UNSOUND,
    "shape_mismatch": Outcome.UNSOUND,
    "dtype_mismatch": Outcome.UNSOUND,
    "unreadable": Outcome.UNSOUND,
    "config_mismatch": Outcome.UNSOUND,
    "base_mismatch": Outcome.UNSOUND,
    "loss_regressed": Outcome.WORSE,
    "forgetting": Outcome.WORSE,
    "drift": Outcome.WORSE,
    "examples_harmed": Outcome.HARMED,
    "task_below": Outcome.ANSWERS,
    "task_regressed": Outcome.ANSWERS,
    "answers_broken": Outcome.ANSWERS,
}
