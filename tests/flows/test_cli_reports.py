"""report, runs, compare and card as a person calls them: output, JSON and exit codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.cli import main
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.left_out import needs_rooms
from tests.registry_care import audit
from tests.runs import finished_run


def test_report_writes_the_page_and_names_it(tmp_path, capsys) -> None:
    run = finished_run(tmp_path / "run")
    assert main(["report", str(run.path)]) == 0
    assert capsys.readouterr().out == f"report: {run.report}\n"
    assert run.report.read_text().startswith("<!doctype html>")
    elsewhere = tmp_path / "page.html"
    assert main(["report", str(run.path), "-o", str(elsewhere)]) == 0
    assert "Verified: passed, better" in elsewhere.read_text()


def test_report_of_a_damaged_run_is_written_and_exits_6(tmp_path, capsys) -> None:
    run = finished_run(tmp_path / "run")
    run.gate.write_text("{")
    assert main(["report", str(run.path)]) == 6
    assert str(run.gate) in capsys.readouterr().err
    assert f"Damaged: {run.gate} has changed" in run.report.read_text()


def test_what_is_no_run_is_bad_usage(tmp_path: Path) -> None:
    assert main(["report", str(tmp_path)]) == 2
    assert main(["compare", str(tmp_path)]) == 2
    assert main(["runs", str(tmp_path / "none")]) == 2


@needs_rooms("compare")
@pytest.mark.parametrize("flag", ["-o", "--output", "--html"])
def test_compare_writes_a_page_beside_its_table(tmp_path, capsys, flag) -> None:
    runs = [
        finished_run(tmp_path / name, learning_rate=rate) for name, rate in (("a", 1), ("b", 2))
    ]
    page = tmp_path / "page.html"
    assert main(["compare", *(str(run.path) for run in runs), flag, str(page)]) == 0
    shown = capsys.readouterr().out
    assert "learning_rate" in shown
    assert f"page: {page}" in shown
    assert page.read_text().count("<svg") == 4


def test_runs_lists_and_an_empty_folder_has_none(tmp_path, capsys) -> None:
    (tmp_path / "runs").mkdir()
    assert main(["runs", str(tmp_path / "runs")]) == 0
    assert "no runs in" in capsys.readouterr().out
    run = finished_run(tmp_path / "runs" / "one")
    assert main(["runs", str(tmp_path / "runs")]) == 0
    shown = capsys.readouterr().out
    assert "8 of 8" in shown
    assert run.path.name in shown


@pytest.mark.parametrize(
    "command",
    [
        ["report", "run", "-o", "TARGET"],
        pytest.param(["compare", "run", "--html", "TARGET"], marks=needs_rooms("compare")),
        pytest.param(["card", "registry/capitals", "-o", "TARGET"], marks=needs_rooms("export")),
        pytest.param(
            ["init", "--data", "nowhere", "--model", "nothing", "-o", "TARGET"],
            marks=needs_rooms("planning"),
        ),
        pytest.param(["export-peft", "run", "--out", "TARGET"], marks=needs_rooms("peft")),
        pytest.param(["export", "run", "--fused", "TARGET"], marks=needs_rooms("export")),
        pytest.param(["export", "run", "--gguf", "TARGET"], marks=needs_rooms("export")),
        pytest.param(
            ["import-peft", "nowhere", "--model", "nothing", "--out", "TARGET"],
            marks=needs_rooms("peft"),
        ),
        ["demo", "--out", "TARGET"],
        ["train", "--model", "x", "--data", "nowhere", "--run-dir", "TARGET"],
        ["train", "--model", "x", "--data", "nowhere", "--adapter-path", "TARGET"],
        ["run", "--model", "x", "--data", "nowhere", "--adapter-path", "TARGET"],
    ],
    ids=lambda command: f"{command[0]} {command[-2]}",
)
def test_no_command_writes_into_a_registry_or_looks_at_anything_else_before_it_says_so(
    command, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    finished_run(tmp_path / "run")
    version = register(write_run(tmp_path / "other", 1), Path("registry"), "capitals", {})
    promote(Path("registry"), "capitals", version, by="tester")
    before = sorted(tmp_path.rglob("*"))
    for target in ("registry/capitals/champion/adapters.safetensors", "registry/new", "other/new"):
        if target == "other/new":
            (tmp_path / "other" / "config.yaml").touch()
            (tmp_path / "other" / "run.lock").touch()
            before = sorted(tmp_path.rglob("*"))
        assert main([target if part == "TARGET" else part for part in command]) == 2
        assert f"{target} lies in the r" in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before
    assert audit(Path("registry"), "capitals").findings == ()
