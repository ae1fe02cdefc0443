"""Runs beside each other and in a list: what differs, on which examples, and which are damaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nested_core.errors import ConfigError
from nested_core.records.paired_difference import PairedDifference
from nested_core.records.run import Run, list_runs
from nested_core.records.verdict import Reason
from nested_core.records.verdict_file import read_verdict
from nested_core.report.run_comparison import _describe_difference, compare_runs
from nested_core.report.run_outcome import describe_outcome
from nested_core.report.run_page import read_report
from tests.runs import (
    HOSTILE_ROW,
    add_metrics,
    begin_run,
    finished_run,
    judge,
    make_losses,
    make_verdict,
    write_plan_of,
)


def test_only_the_settings_that_differ_are_compared(tmp_path: Path) -> None:
    one = finished_run(tmp_path / "one", learning_rate=1e-3)
    two = finished_run(tmp_path / "two", learning_rate=2e-3, nested={"frequencies": [1]})
    document = compare_runs([one.path, two.path]).to_json()
    assert list(document)[:4] == ["runs", "config", "losses", "tasks"]
    settings = document["config"]
    assert settings.pop("data") != []
    assert settings == {"learning_rate": [1e-3, 2e-3], "nested.frequencies": [[1, 2, 4], [1]]}
    assert document["losses"]["gate_after"] == [pytest.approx(2.675)] * 2
    assert document["losses"]["difference_to_first"][1]["difference"] == 0
    assert document["tasks"] == {"capitals": [2 / 3, 2 / 3]}
    assert document["speed"]["tokens_per_second"][0] > 0
    assert document["same_held_out_examples"] is True


def test_each_loss_stands_with_its_file_examples_and_step(tmp_path: Path) -> None:
    run = finished_run(tmp_path / "one", steps=25)
    write_plan_of(run)
    losses = compare_runs([run.path]).to_json()["losses"]
    names = ("training_file", "training_step", "validation_file", "validation_examples")
    assert [losses[name] for name in names] == [["train.jsonl"], [25], ["valid.jsonl"], [12]]
    assert losses["validation_step"] == losses["gate_step"] == [25]
    assert (losses["gate_file"], losses["gate_examples"]) == (["valid.jsonl"], [12])


def test_losses_of_a_file_outside_of_the_data_are_not_compared(tmp_path: Path) -> None:
    """Its digest is not recorded: two files of one length may hold different examples."""
    gate = {"held_out": str(tmp_path / "kept.jsonl")}
    runs = [finished_run(tmp_path / name, gate=gate) for name in ("one", "two")]
    comparison = compare_runs([run.path for run in runs])
    assert comparison.has_same_held_out_examples() is False
    assert comparison.paired_with_first() == [None, None]
    assert "not known to be judged on the same" in comparison.to_html()


def test_a_rejected_and_a_going_run_are_compared_too(tmp_path: Path) -> None:
    rejected = finished_run(tmp_path / "one", reasons=[Reason("unchanged", "nothing moved")])
    going = begin_run(tmp_path / "two")
    add_metrics(going, 4)
    comparison = compare_runs([rejected.path, going.path])
    rows = {str(name): cells for name, *cells in comparison.rows()}
    assert rows["outcome"] == ["Rejected: unchanged", "Resumable"]
    assert rows["trained"] == ["8 of 8 steps", "4 of 8 steps"]
    assert comparison.names == ["one", "two"]


def test_the_page_overlays_the_curves_and_escapes(tmp_path: Path) -> None:
    runs = [finished_run(tmp_path / name / "run", text=HOSTILE_ROW) for name in ("a", "b")]
    comparison = compare_runs([run.path for run in runs])
    assert comparison.names == ["a/run", "b/run"]
    page = comparison.to_html()
    assert page.count("<svg") == 4
    assert page.count("<path") == 8
    assert "<script" not in page
    assert comparison._repr_html_().startswith("<div")


def test_nothing_to_compare_is_refused() -> None:
    with pytest.raises(ConfigError, match="no run to compare"):
        compare_runs([])


def test_the_list_is_newest_first_and_a_damaged_run_says_so(tmp_path: Path) -> None:
    old = finished_run(tmp_path / "20261120T100000Z-00000001")
    new = finished_run(tmp_path / "20261121T100000Z-00000002")
    old.gate.write_text("{")
    (tmp_path / "no run").mkdir()
    rows = list_runs(tmp_path)
    assert [row.name for row in rows] == [new.path.name, old.path.name]
    assert (rows[0].state, rows[0].step, rows[0].steps) == ("verified", 8, 8)
    assert rows[0].offered_val_loss == pytest.approx(7.5 / 8**0.5)
    assert rows[1].state == "damaged"
    assert str(old.gate) in describe_outcome(rows[1])
    assert describe_outcome(rows[0]) == "Verified: passed, better"


def test_a_name_whose_digits_are_no_moment_and_a_file_that_goes_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = finished_run(tmp_path / "20269999T999999Z-00000001")
    files = list(run.path.iterdir())
    monkeypatch.setattr(Path, "iterdir", lambda _: iter([*files, run.path / "replaced.tmp"]))
    oldest = min(file.stat().st_mtime for file in files)
    assert Run(run).started.timestamp() == pytest.approx(oldest, abs=1e-3)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a folder"):
        list_runs(tmp_path / "runs")


def test_a_difference_has_its_interval_where_there_are_examples_enough() -> None:
    few, many = (PairedDifference(n, -0.25, 0.1, -0.45, -0.05) for n in (2, 40))
    assert _describe_difference(None) is None
    assert _describe_difference(few) == "-0.25 nats a token"
    assert str(_describe_difference(many)) == "-0.25 nats a token (95 % interval -0.45 to -0.05)"


@pytest.mark.parametrize(
    ("is_held_out", "with_task", "words"),
    [
        (True, True, "passed, better"),
        (False, False, "passed, quality not measured"),
        (False, True, "passed"),
    ],
)
def test_what_passed_has_the_same_words_in_every_list(
    tmp_path: Path, is_held_out: bool, with_task: bool, words: str
) -> None:
    run = finished_run(tmp_path / "run")
    losses = make_losses() if is_held_out else None
    verdict = make_verdict(losses, step=8, with_task=with_task)
    judge(run, verdict, losses, "How much is a pump?")
    assert verdict.summary().startswith(f"{words}: ")
    assert [describe_outcome(row) for row in list_runs(tmp_path)] == [f"Verified: {words}"]
    rows = {row[0]: row[1] for row in compare_runs([run.path]).rows()}
    assert rows["outcome"] == f"Verified: {words}"
    page = read_report(run.path).to_html()
    assert f"P{words[1:]}:" in page
    is_good = words != "passed, quality not measured"  # which nothing was shown of: not green
    assert ('class="verdict good"' in page) is is_good
    assert read_verdict(run.gate).describe() == words  # the last screen of train


def test_what_differs_of_a_suite_is_a_key_by_its_name(tmp_path: Path) -> None:
    file = str(tmp_path / "q.jsonl")
    suite = {"name": "facts", "file": file, "score": "contains"}
    gates: list[dict[str, Any]] = [{"tasks": [suite | {"min": least}]} for least in (0.5, 0.9)]
    runs = [finished_run(tmp_path / str(n), gate=gate) for n, gate in enumerate([*gates, {}])]
    one_suite = compare_runs([run.path for run in runs[:2]]).differing_settings()
    del one_suite["data"]
    assert one_suite == {"gate.tasks.facts.min": [0.5, 0.9]}
    settings = compare_runs([run.path for run in runs]).differing_settings()
    del settings["data"]
    assert settings == {
        "gate.tasks.facts.file": [file, file, None],
        "gate.tasks.facts.score": ["contains", "contains", None],
        "gate.tasks.facts.min": [0.5, 0.9, None],
    }


def test_each_row_says_what_its_figure_is_of(tmp_path: Path) -> None:
    names = [row[0] for row in compare_runs([finished_run(tmp_path / "run").path]).rows()]
    assert len(set(names)) == len(names)
    assert {"training loss: at step", "validation loss: at step", "gate's loss: file"} <= {*names}
