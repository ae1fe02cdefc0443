"""Progress: of work in known amounts, where it takes long, and of training, as it is on disk."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest

from flows.terminal.console import ProgressLine, _wrap, print_table
from flows.terminal.run_follower import RunFollower, showing_run
from nested_core.records.metrics import append_metrics, read_metrics, truncate_metrics
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reports.run_progress import RunProgress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the terminal sees; a test moves it."""
    now = [100.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def test_short_work_shows_nothing(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    show = ProgressLine()
    for done in range(1, 11):
        clock[0] += 0.19
        show("tokenising", done, 10)
    assert capsys.readouterr() == ("", "")


def test_long_work_is_a_line_now_and_then(clock, capsys) -> None:
    show = ProgressLine()
    for done in range(1, 101):
        clock[0] += 0.07
        show("tokenising", done, 100)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines() == [
        "tokenising: 29%",
        "tokenising: 58%",
        "tokenising: 87%",
        "tokenising: 100%",
    ]


def test_a_line_is_broken_between_words_and_a_path_stays_whole() -> None:
    path = "/" + "a" * 90
    assert _wrap(f"  model: {path} is not there", 40) == [
        "  model:",
        f"    {path}",
        "    is not there",
    ]
    assert _wrap(f"{path} {path}", None) == [f"{path} {path}"]


def test_a_command_between_backquotes_is_in_one_line_and_can_be_copied() -> None:
    command = "nested-tune init --data tickets.csv --prompt-feature 'What is it' -o lora.yaml"
    assert _wrap(f"There are no columns. For example: `{command}`. In a terminal, ask.", 40) == [
        "There are no columns. For example:",
        f"  {command}",
        "  In a terminal, ask.",
    ]
    assert _wrap("Look at it with `nested-tune doctor`, which knows more of the machine.", 40) == [
        "Look at it with `nested-tune doctor`,",
        "  which knows more of the machine.",
    ]


def test_metrics_that_were_cut_back_and_have_grown_since_are_read_from_their_start(
    tmp_path: Path,
) -> None:
    """A resumed run of a tiny model writes more between two looks than was cut."""
    path = tmp_path / "metrics.jsonl"
    for step in range(5):
        append_metrics(path, {"step": step, "loss": 1.0})
    progress = RunProgress(RunDirectory(tmp_path))
    progress.read()
    truncate_metrics(path, 1, 9)
    for step in range(2, 20):
        append_metrics(path, {"step": step, "loss": step / 3})
    progress.read()
    assert progress.records == read_metrics(path)


def test_a_loss_that_is_not_finite_is_said_to_be(tmp_path, capsys) -> None:
    with showing_run(RunDirectory(tmp_path)):
        append_metrics(tmp_path / "metrics.jsonl", {"step": 0, "val_loss": math.nan})
    assert capsys.readouterr().err == "step 0: validation loss not finite\n"


def test_what_is_said_before_training_begins_ends_no_training(tmp_path, clock, capsys) -> None:
    run = RunDirectory(tmp_path)
    watcher = RunFollower(run)
    watcher.add_stage("layers: ours")
    run.plan.write_text("{}")
    watcher.view.read()
    clock[0] += 7
    watcher.add_stage("gate: changes of the tensors")
    clock[0] += 2
    watcher.view.read()
    assert watcher.view.stages == [("gate: changes of the tensors", 7.0)]
    assert watcher.view.training_seconds == 7.0
    assert capsys.readouterr().err.splitlines()[0] == "layers: ours"


def test_a_check_of_the_gate_that_lasts_is_said_again_with_its_seconds(
    tmp_path: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    run = RunDirectory(tmp_path)
    follower = RunFollower(run)
    run.plan.write_text("{}")
    run.result.write_text('{"step": 3, "adapter_step": 3, "ended": null}')
    follower.add_stage("gate: answers to gate.tasks")
    for _ in range(25):
        clock[0] += 1
        follower.view.read()
        follower._repeat_stage()
    assert capsys.readouterr().err.splitlines()[-3:] == [
        "gate: answers to gate.tasks",
        "gate: answers to gate.tasks (10 s)",
        "gate: answers to gate.tasks (20 s)",
    ]


@pytest.mark.parametrize(("columns", "width"), [("80", 80), ("", 120), ("0", 120), ("wide", 120)])
def test_a_table_in_a_pipe_keeps_to_columns(columns, width, capsys, monkeypatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    print_table(("what", "problem"), [("file", 30 * "words ")])
    assert max(map(len, capsys.readouterr().out.splitlines())) == width


def test_a_table_has_four_digits_of_a_number_and_the_whole_of_a_path(capsys) -> None:
    path = "registry/capitals/versions/" + 4 * "0123456789abcdef" + "/adapters.safetensors"
    print_table(("what", "changed", "by", "note"), [(path, True, 1.0778199771389183, None)] * 2)
    shown = capsys.readouterr().out
    assert all(value in shown for value in ("yes", "│ 1.078 │", "│ -    │"))
    print_table(("what", "problem"), [(path, 120 * "x")])
    shown = re.sub(r"[│\s]", "", capsys.readouterr().out)
    assert "…" not in shown
    assert shown.count("x") == 120
