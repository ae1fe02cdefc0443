"""Which tests the runs of `python -m tests.again` draw."""

from __future__ import annotations

from collections import Counter

from tests.again import draw_starters, planned_runs

STARTS = {
    "one": {"place 1"},
    "another": {"place 1"},
    "both": {"place 1", "place 2"},
    "third": {"place 3"},
}


def test_each_run_comes_by_every_place_and_each_test_is_drawn_by_some_run() -> None:
    runs = [draw_starters(STARTS, seed) for seed in range(50)]
    for drawn in runs:
        reached = {place for test in drawn for place in STARTS[test]}
        assert reached == {"place 1", "place 2", "place 3"}
        assert not {"one", "another"} <= set(drawn)  # they start from one place
    assert {test for drawn in runs for test in drawn} == STARTS.keys()
    assert draw_starters(STARTS, 7) == runs[7]


def test_the_plan_is_of_as_many_runs_as_are_said() -> None:
    names = [run.name for run in planned_runs()]
    assert len(set(names)) == len(names)
    counts = Counter(name.partition("-")[0] for name in names)
    assert counts == {"test": 10, "slow": 2, "starters": 200}
    assert [run.busy_processes for run in planned_runs()][:10] == [0] * 6 + [4] * 4
