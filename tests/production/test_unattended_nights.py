"""Three nights with a kill in each, an outage, a file that is cut, and facts that change."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.learning.streams import OWNERS
from nested_core.records.loss_conclusion import MIN_EXAMPLES
from tests.production.postgresql import Cluster
from tests.production.unattended_nights import (
    SeenNight,
    UnattendedStack,
    owes_outage,
    plan_nights,
    play,
    questions_after,
    split_facts,
)
from tests.webhook_server import serving_webhook

ENDS = ("Promoted", "Kept the champion", "Rejected: worse", "Failed: data")


def test_the_plan_has_a_kill_a_night_and_the_faults_of_thirty_nights() -> None:
    planned = plan_nights(30)
    assert planned == plan_nights(30)
    assert [night.number for night in planned] == [*range(1, 31)]
    assert sum(night.away is not None for night in planned) == 5
    assert sum(bool(night.corrected) for night in planned) == 3
    assert sum(night.has_bad_file for night in planned) == 2
    assert {night.victim for night in planned} == {"training", "parent", "worker", "all"}
    for number, night in enumerate(planned):
        before = {row.prompt: row.answer for row in questions_after(planned[:number])}
        train, held_out = split_facts([night])
        assert len(held_out) >= MIN_EXAMPLES
        again = [row for row in (*train, *held_out) if row.prompt in before]
        assert len(again) == 2 * len(night.corrected)
        assert all(before[row.prompt] != row.answer for row in again)


@pytest.mark.production
@pytest.mark.timeout(3600)
def test_nights_that_go_wrong_end_told_and_are_made_up_for(tmp_path: Path, binaries: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    stack = UnattendedStack.open(tmp_path, lambda: Cluster(binaries), rows)
    try:
        with serving_webhook() as webhook:
            stack.begin(webhook.url)
            seen = list(play(stack, webhook, 3))
    finally:
        stack.stop()
    assert seen == UnattendedStack.open(tmp_path, lambda: Cluster(binaries), rows).seen
    assert [night.number for night in seen] == [1, 2, 3]
    assert all(night.state in ENDS for night in seen)
    for night in seen:
        if night.begun > 1 or night.state.startswith(("Failed", "Rejected")):
            assert night.told, night
    (bad,) = [night for night in seen if night.has_bad_file]
    assert bad.state == "Failed: data"
    assert "bad-json" in bad.message
    assert seen[0].state == "Promoted"
    assert sum(night.killed_after is not None for night in seen) >= 2
    assert sum(night.away is not None for night in seen) == 1
    assert seen[-1].questions == len(questions_after(plan_nights(3)))
    assert seen[-1].right is not None
    assert seen[-1].right > 3 / len(OWNERS)  # by chance it is one of them


def test_an_outage_that_came_too_late_for_its_night_comes_in_the_next() -> None:
    planned = plan_nights(3)
    (with_outage,) = [night.number for night in planned if night.away is not None]
    seen = [see(night.number) for night in planned[: with_outage - 1]]
    assert not owes_outage(planned, seen)
    assert owes_outage(planned, [*seen, see(with_outage)])
    assert not owes_outage(planned, [*seen, see(with_outage, away=20.0)])


def see(number: int, away: float | None = None) -> SeenNight:
    """A night that was promoted."""
    return SeenNight(
        *(number, "Promoted", "", [], 60.0, "training", 10.0, "train", away),
        *(0, False, 2, "rebuild", "", "champion", None),
    )
