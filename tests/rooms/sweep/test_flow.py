"""The points of a sweep's grid, and the settings that each of them makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import uuid4

import pytest
from prefect.client.schemas.objects import FlowRun
from prefect.states import Completed, Crashed, Running, Scheduled, State

from flows.rooms.sweep.flow import MOST_RUNS, SweepParameters, has_ended, promote_choice, sweep
from nested_core.errors import ConfigError
from nested_core.records.verdict import JudgedAdapter, Validation, Verdict
from nested_core.records.verdict_file import write_verdict
from nested_core.registry import Decision
from nested_core.rooms.sweep.page import SweepRunResult, choose_best_run
from nested_core.rooms.sweep.points import grid_points
from nested_core.storage.run_directory import RunDirectory
from tests.example import example_config
from tests.rooms.sweep.test_choice import sweep_of


def test_the_grid_has_every_combination_in_the_order_of_the_keys_names() -> None:
    grid: dict[str, list[Any]] = {"seed": [1, 2], "learning_rate": [0.1]}
    expected = [{"learning_rate": 0.1, "seed": 1}, {"learning_rate": 0.1, "seed": 2}]
    assert grid_points(grid) == expected
    assert grid_points(dict(reversed(grid.items()))) == expected


@pytest.mark.parametrize(
    ("grid", "problem"),
    [
        ({"iters": [4, -1]}, "iters"),
        ({"nseted.fast": ["deep"]}, "did you mean nested"),
        *(  # what the loss is of, so that the losses could not be compared
            ({key: ["a", "b"]}, f"varies {key}")
            for key in ("mask_prompt", "training.supervise", "data", "gate.held_out")
        ),
        ({"registry.name": ["a", "b"]}, "varies registry.name"),
    ],
)
def test_a_grid_that_cannot_run_or_be_compared_is_refused_before_any_run(
    grid: dict[str, list[Any]], problem: str, tmp_path: Path
) -> None:
    registry = {"path": str(tmp_path / "registry"), "name": "capitals"}
    config = SweepParameters(
        base=example_config(registry=registry), grid=grid, deployment="finetune/capitals-manual"
    )
    with (
        patch("flows.rooms.sweep.flow.run_deployment") as start,
        pytest.raises(ConfigError, match=problem),
    ):
        sweep.fn(config)
    start.assert_not_called()


class Started(Exception):
    """The first run of a sweep was about to be started."""


def test_a_grid_has_at_most_256_points(tmp_path: Path) -> None:
    registry = {"path": str(tmp_path / "registry"), "name": "capitals"}

    def start(points: int) -> None:
        sweep.fn(
            SweepParameters(
                base=example_config(registry=registry),
                grid={"seed": list(range(points))},
                deployment="finetune/capitals-manual",
            )
        )

    with patch("flows.rooms.sweep.flow.run_deployment", side_effect=Started) as started:
        with pytest.raises(Started):
            start(MOST_RUNS)
        asked = started.call_args.kwargs["parameters"]["config"]
        assert asked["continual"]["skip_unchanged"] is False, "each point is to be compared"
        with pytest.raises(ConfigError, match="the grid has 257 points, at most 256"):
            start(MOST_RUNS + 1)


def test_the_lowest_validation_loss_is_chosen_whatever_the_test_loss() -> None:
    def outcome(name: str, val_loss: float | None, loss: float, *, passed: bool) -> SweepRunResult:
        return SweepRunResult(name, {}, "Verified", "", passed, loss, "test.jsonl", val_loss)

    outcomes = [
        outcome("a", 0.5, 0.1, passed=True),
        outcome("b", 0.4, 0.9, passed=True),
        outcome("c", 0.1, 0.1, passed=False),
        outcome("d", None, 0.05, passed=True),
    ]
    best = choose_best_run(outcomes)
    assert best is not None
    assert best.run_dir == "b"
    assert choose_best_run(outcomes[2:3]) is None


def test_a_run_without_a_verdict_has_not_passed(tmp_path: Path) -> None:
    outcome = SweepRunResult.read_from_run(RunDirectory(tmp_path), {"seed": 1}, "Crashed", "killed")
    assert not outcome.has_passed
    assert outcome.loss is None


def test_a_run_that_passed_is_a_candidate_whatever_its_states_name(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    losses = Validation(1.0, 0.5, selected_on_same_data=False, file="valid.jsonl")
    adapters = (JudgedAdapter("initial", "0" * 64), JudgedAdapter("adapter", "1" * 64))
    write_verdict(run.path, Verdict((), 4, *adapters, (), validation=losses), {})
    passed = SweepRunResult.read_from_run(run, {"seed": 1}, "Verified", "", is_candidate=True)
    kept = SweepRunResult.read_from_run(run, {"seed": 1}, "Kept the champion", "")
    assert passed.has_passed
    assert not kept.has_passed
    assert passed.describe() == "seed=1 (validation loss 0.5)"


@pytest.mark.parametrize(
    ("state", "run_count", "seconds", "expected"),
    [
        (Running(), 1, 0.0, False),
        (Crashed(), 1, 0.0, False),  # it is about to be resumed
        (Crashed(), 1, 600.0, True),  # nobody resumes it
        (Crashed(), 0, 0.0, True),  # it never began
        (Crashed(), 2, 0.0, True),  # the second time
        (Scheduled(), 1, 0.0, False),
        (Completed(), 1, 0.0, True),
    ],
)
def test_a_point_that_crashed_has_ended_when_it_will_not_go_on_by_itself(
    state: State[None], run_count: int, seconds: float, expected: bool
) -> None:
    run = FlowRun(flow_id=uuid4(), state=state, run_count=run_count)
    assert has_ended(run, seconds) is expected


@pytest.mark.parametrize(("gain", "is_luck"), [(0.0, True), (0.2, False)])
def test_a_choice_that_may_be_luck_is_left_under_the_policy_of_its_point(
    tmp_path: Path, gain: float, is_luck: bool
) -> None:
    runs = sweep_of(tmp_path, gain)
    outcomes = [
        SweepRunResult(str(run.path), {}, "Verified", "", True, None, val_loss=float(number))
        for number, run in enumerate(runs)
    ]
    registry = {"path": str(tmp_path / "registry"), "name": "capitals", "promote": "better"}
    config = example_config(registry=registry)
    with (
        patch("flows.rooms.sweep.flow.find_registered_version", return_value="v"),
        patch("flows.rooms.sweep.flow.read_run_config", return_value=config),
        patch(
            "flows.rooms.sweep.flow.register", return_value=Decision("promoted", "v")
        ) as register,
    ):
        done = promote_choice(config.registry, outcomes[0], outcomes, None)
    assert done.version == "v"
    assert (not register.called) == is_luck
    assert ("the best of 8 candidates" in done.sentence) == is_luck
