"""Three nights with a kill in each, an outage, a file that is cut, and facts that change."""

from __future__ import annotations

from pathlib import Path

import pytest

from nested_core.records.loss_conclusion import MIN_EXAMPLES
from tests.production.postgresql import Cluster
from tests.production.unattended_nights import (
    UnattendedStack,
    plan_nights,
    play,
    questions_after,
    split_facts,
)
from tests.webhook_server import serving_webhook


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
    (bad,) = [night for night in seen if night.has_bad_file]
    assert bad.state == "Failed: data"
    assert any("Failed" in text for text in bad.told)
    good = [night for night in seen if not night.has_bad_file]
    assert {night.state for night in good} == {"Promoted"}
    assert all(night.killed_after is not None for night in good)
    assert sum(night.away is not None for night in seen) == 1
    assert seen[-1].questions == len(questions_after(plan_nights(3)))
