"""The gate before every run of the table: no wrong verdict, with the reasons that belong to it."""

from __future__ import annotations

from pathlib import Path

import pytest

from nested_core.errors import DamagedError, GateRejected
from nested_core.gate.judge import run_gate_checks
from nested_core.pipeline import steps
from tests.builders.candidates import train_candidate
from tests.core.gate.adversaries import CASES, DAMAGED, Case, Scene
from tests.core.gate.pairs import codes
from tests.left_out import slow_except


def one_of_each_verdict() -> list[Case]:
    """All cases that are damaged, which costs nothing, and the first with each set of reasons."""
    first = {frozenset(case.expected): case for case in reversed(CASES)}
    return [case for case in CASES if case.expected == (DAMAGED,) or case in first.values()]


@pytest.fixture(scope="module")
def finished_scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """Two runs that differ by their seed, with checkpoints at steps 4 and 8."""
    folder = tmp_path_factory.mktemp("adversaries")
    run, other = (
        train_candidate(folder / str(seed), seed=seed, save_every=4, steps_per_report=1)
        for seed in (0, 1)
    )
    return Scene(run.config, run.run, other.run)


@pytest.fixture
def scene(finished_scene: Scene, tmp_path: Path) -> Scene:
    """A copy of it to spoil."""
    return finished_scene.copy(tmp_path / "run")


@pytest.mark.parametrize(
    "case",
    slow_except(CASES, *one_of_each_verdict(), reason="another run with a verdict that one has"),
    ids=lambda case: case.name,
)
def test_the_verdict_is_the_one_of_the_table(scene: Scene, case: Case) -> None:
    bounds = case.build(scene) or scene.config
    if case.expected == (DAMAGED,):
        with pytest.raises(DamagedError, match=case.says):
            steps.judge(bounds, scene.run)
        assert not scene.run.gate.exists()
        return
    verdict = run_gate_checks(bounds, scene.run).verdict
    assert tuple(codes(verdict)) == case.expected
    assert verdict.has_passed is (not case.expected)
    assert case.says is None or any(case.says in reason.message for reason in verdict.reasons)
    assert verdict.to_json()["thresholds"] == bounds.gate.model_dump()


def test_a_rejected_run_ends_with_the_reason_in_the_message(scene: Scene) -> None:
    next(case for case in CASES if case.expected == ("unchanged",)).build(scene)
    with pytest.raises(GateRejected, match=r"Rejected: unchanged \(all 42") as error:
        scene.judge()
    assert error.value.exit_code == 4
