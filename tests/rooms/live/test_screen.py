"""What a terminal shows of a run, from its plan and its records alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.cells import cell_len

from flows.rooms.live.live_view import describe_conclusion
from flows.rooms.live.screen import describe_stages, draw_bar, draw_curve, draw_screen
from nested_core.records.metrics import append_metrics
from nested_core.records.plan import join_last_losses
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reports.run_progress import RunProgress
from tests.flows.test_run_view import PLAN, RECORDS, report, view_of


@pytest.mark.parametrize(("width", "height"), [(80, 24), (200, 50), (40, 12)])
def test_a_screen_fits_its_terminal(width: int, height: int) -> None:
    view = view_of(*RECORDS)
    view.stages = [("gate: losses on held-out examples, before and after", 11.0)]
    lines = draw_screen(view, width, height).plain.split("\n")
    assert len(lines) < height
    assert max(map(cell_len, lines)) <= width


def test_a_screen_tells_of_steps_time_losses_speed_memory_and_tiers() -> None:
    screen = draw_screen(view_of(*RECORDS), 100, 40).plain
    for words in (
        " 50% step 100 of 200 (iteration 200 of 400)",
        "0:12 elapsed, about 8.0 s left",
        "training loss 0.08 (train.jsonl, mean since the last report, step 100)",
        "validation loss 0.75 (valid.jsonl, 10 examples, step 100), lowest 0.5 (step 50)",
        "learning rate 0.0001, gradient norm 0.5, 1,234 trained-on tokens/s, peak memory "
        "2.25 of 24 GB",
        "updates: tier 0 (every step) 100 · tier 1 (every 4) 25 · skipped 1",
    ):
        assert words in screen


@pytest.mark.parametrize("last", [{}, {"loss": None}, {"val_loss": None}])
def test_a_page_says_of_the_losses_what_the_screen_says(last: dict[str, None]) -> None:
    records = [*RECORDS, report(125, **last)]
    said = join_last_losses(records, PLAN)
    assert ("not finite" in said) == bool(last)
    screen = draw_screen(view_of(*records), 200, 40).plain
    assert all(sentence in screen for sentence in said.split("; "))


def test_the_axis_ends_at_the_last_planned_step() -> None:
    lines = draw_screen(view_of(*RECORDS), 80, 24).plain.split("\n")
    axis = next(line for line in lines if line.endswith("step 200"))
    last_mark = max(line.rfind("o") for line in lines if "|" in line)
    assert last_mark == pytest.approx(10 + (len(axis) - 10) / 2, abs=2)


def test_what_follows_training_is_listed_with_its_seconds_and_how_it_ended() -> None:
    view = view_of(*RECORDS)
    view.stages = [("gate: losses", 10.5), ("gate: proof", 11.25)]
    assert list(describe_stages(view)) == ["gate: losses: 0.8 s", "gate: proof ..."]
    view.outcome = [view.describe_offered_adapter(100), "verdict: passed"]
    screen = draw_screen(view, 80, 24).plain
    assert "selected: the adapter of step 100, the last one" in screen
    assert screen.endswith("verdict: passed")
    assert screen.count("|") >= 8  # the curve stays readable


def test_samples_are_escaped_and_left_out_where_there_is_no_room() -> None:
    sample = {"prompt": "Who?", "answer": "\x1b[2J[bold]me"}
    view = view_of(*RECORDS, report(110, samples=[sample]))
    assert "Who? -> \\x1b[2J[bold]me (step 110)" in draw_screen(view, 80, 40).plain
    assert "Who?" not in draw_screen(view, 80, 12).plain


def test_bars_are_filled_in_eighths_of_a_character() -> None:
    assert [draw_bar(share, 4) for share in (0, 0.5, 0.53125, 1)] == [
        "░░░░",
        "██░░",
        "██▏░",
        "████",
    ]


def test_names_of_files_and_suites_are_escaped_on_the_screen() -> None:
    view = RunProgress(
        RunDirectory(Path("run")),
        stages=[("asking \x1b[2Jsuite", 0.0)],
        outcome=["rejected (\x1b[2J)"],
    )
    shown = draw_screen(view, 80, 40).plain
    assert "\x1b" not in shown
    assert shown.count(r"\x1b[2J") == 2


def test_a_run_that_was_stopped_is_said_to_end_at_the_step_of_its_checkpoint(tmp_path) -> None:
    """The last report may be of an earlier step than the checkpoint that the stop wrote."""
    run = RunDirectory(tmp_path)
    append_metrics(run.metrics, {"step": 10, "loss": 1.0})
    (run.checkpoints / "step-0000011").mkdir(parents=True)
    view = RunProgress(run)
    view.read_metrics()
    said = ["ended before training was done, at step 11"]
    assert describe_conclusion(view, run) == said


def test_one_loss_is_labelled_once() -> None:
    assert draw_curve(RECORDS[:1]).count("9.5") == 1
