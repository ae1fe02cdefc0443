"""A sweep's choice, judged by the examples that chose it, from the folders of its runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.config.sections import GateSection
from nested_core.measure.losses.chosen_candidate import Candidates
from nested_core.measure.losses.loss_figures import summarise_losses
from nested_core.records.losses import ExampleLosses, read_example_losses
from nested_core.records.verdict import JudgedAdapter, Verdict
from nested_core.rooms.sweep.search import SweepChoice, join_candidates
from nested_core.storage.atomic import write_json
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.validation_losses import StepLosses, append_step_losses

EXAMPLES = 60
ALL = np.arange(1, EXAMPLES + 1, dtype=np.uint64)


def write_run(path: Path, losses: ExampleLosses, steps: Any, *, is_selected: bool) -> RunDirectory:
    """A judged run whose evaluations had these losses."""
    run = RunDirectory(path)
    path.mkdir()
    for step, own in enumerate(steps, 1):
        contents = losses.lines.tolist()
        append_step_losses(
            run.validation_losses, StepLosses(step=step, contents=contents, losses=own.tolist())
        )
    run.gate_losses.write_bytes(losses.render())
    validation = summarise_losses(losses, GateSection(), selected_on_same_data=is_selected)
    judged = JudgedAdapter("a", "0" * 64)
    verdict = Verdict((), 1, judged, judged, (), validation=validation)
    write_json(run.gate, verdict.to_json())
    return run


def sweep_of(folder: Path, gain: float, *, is_selected: bool = True) -> list[RunDirectory]:
    """Eight runs of one evaluation each; the first is the best of them by luck, or by `gain`."""
    random = np.random.default_rng(8)
    champion = random.exponential(1, EXAMPLES)
    points = champion + random.normal(0, 0.2, (8, EXAMPLES))
    points = points[np.argsort(points.mean(axis=1))]
    points[0] -= gain
    runs = []
    for number, after in enumerate(points):
        losses = ExampleLosses(
            "valid.jsonl" if is_selected else "test.jsonl",
            np.arange(1, EXAMPLES + 1),
            np.full(EXAMPLES, 10.0),
            champion + 1,
            after,
            champion=champion,
            contents=ALL,
        )
        runs.append(write_run(folder / str(number), losses, after[None], is_selected=is_selected))
    return runs


def test_examples_that_chose_nothing_need_no_correction(tmp_path: Path) -> None:
    runs = sweep_of(tmp_path, 0.0, is_selected=False)
    choice = SweepChoice.read(runs[0], [runs[1], *runs], ALL + EXAMPLES)
    assert (choice.chosen_among, choice.corrected_interval) == (1, None)
    losses, first = (read_example_losses(run.gate_losses) for run in runs[:2])
    assert choice.difference == losses.compare_trained_with(first.after)


@pytest.mark.parametrize("common", [EXAMPLES, 7])
def test_examples_of_any_file_that_chose_the_arm_are_corrected_for(tmp_path, common: int) -> None:
    runs = sweep_of(tmp_path, 0.0, is_selected=False)
    choice = SweepChoice.read(runs[0], runs, ALL + EXAMPLES - common)
    assert choice.chosen_among == 8
    assert choice.corrected_interval is not None


def test_the_choice_is_compared_with_the_first_run_on_the_same_examples(tmp_path: Path) -> None:
    runs = sweep_of(tmp_path, 0.2)
    choice = SweepChoice.read(runs[0], [*runs[1:], runs[0]], ALL)
    assert choice.chosen_among == 8
    own, other = (read_example_losses(run.gate_losses) for run in runs[:2])
    assert choice.difference is not None
    assert choice.difference.mean == pytest.approx(own.mean(own.after) - own.mean(other.after))
    assert choice.corrected_interval is not None
    half = (choice.corrected_interval[1] - choice.corrected_interval[0]) / 2
    assert half > (choice.difference.high - choice.difference.low) / 2


def test_runs_without_the_losses_of_their_steps_count_by_the_gates(tmp_path: Path) -> None:
    runs = sweep_of(tmp_path, 0.2)
    kept = SweepChoice.read(runs[0], [*runs[1:], runs[0]], ALL)
    for run in runs:
        run.validation_losses.unlink()
    again = SweepChoice.read(runs[0], [*runs[1:], runs[0]], ALL)
    assert again.chosen_among == 8
    assert again.corrected_interval == pytest.approx(kept.corrected_interval)
    runs[3].gate_losses.unlink()
    wider = SweepChoice.read(runs[0], [*runs[1:], runs[0]], ALL)
    assert wider.corrected_interval is not None
    assert wider.corrected_interval[0] <= again.corrected_interval[0]  # type: ignore[index]


def test_the_runs_of_a_sweep_are_one_family_where_all_read_the_same_examples() -> None:
    known, unlike = np.array([1, 2, 5], np.uint64), np.array([5, 1, 7], np.uint64)
    first = Candidates(2, known, np.array([[1.0, 2, 5], [10, 20, 50]]))
    second = Candidates(1, known, np.array([[0.1, 0.2, 0.5]]))
    joined = join_candidates([first, second])
    assert joined.count == 3
    assert joined.contents is not None
    assert joined.losses is not None
    assert joined.contents.tolist() == [1, 2, 5]
    assert joined.losses.tolist() == [[1, 2, 5], [10, 20, 50], [0.1, 0.2, 0.5]]
    others = Candidates(1, unlike, np.array([[0.5, 0.1, 0.7]]))
    assert [join_candidates([first, one]).losses for one in (others, Candidates(3))] == [None, None]
