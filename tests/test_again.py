"""Which tests the runs of `python -m tests.again` draw."""

from __future__ import annotations

from collections import Counter

from tests.again import ROUNDS_OF_STARTERS, draw_starters, planned_runs

STARTS = {
    "one": {"place 1"},
    "another": {"place 1"},
    "both": {"place 1", "place 2"},
    "third": {"place 3"},
}


def test_each_round_comes_by_every_place_and_each_test_is_drawn_by_some_round() -> None:
    rounds = [draw_starters(STARTS, seed) for seed in range(50)]
    for drawn in rounds:
        reached = {place for test in drawn for place in STARTS[test]}
        assert reached == {"place 1", "place 2", "place 3"}
        assert not {"one", "another"} <= set(drawn)  # they start from one place
    assert {test for drawn in rounds for test in drawn} == STARTS.keys()
    assert draw_starters(STARTS, 7) == rounds[7]


def test_the_plan_is_of_as_many_runs_as_are_said() -> None:
    names = [run.name for run in planned_runs()]
    assert len(set(names)) == len(names)
    counts = Counter(name.partition("-")[0] for name in names)
    assert (counts["test"], counts["slow"]) == (10, 2)
    assert counts["starters"] * ROUNDS_OF_STARTERS == 200
    assert [run.busy_processes for run in planned_runs()][:10] == [0] * 6 + [4] * 4
