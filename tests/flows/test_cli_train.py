"""`train` and what looks at its run afterwards: one JSON document, no Prefect, the whole folder."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flows.commands.training import print_result
from nested_core.config.schema import FineTuneConfig
from nested_core.pipeline.finetune import FinetuneResult
from nested_core.records.dataset import DatasetReport, Finding
from nested_core.records.verdict import JudgedAdapter, SampleVerdict, TierChange, Verdict
from nested_core.storage.adapter import read_adapter
from nested_core.storage.atomic import write_json
from nested_core.storage.run_directory import RunDirectory
from tests.builders.data_sets import chat, write_lines
from tests.example import write_config
from tests.flows.conftest import CommandRun, Ended
from tests.fork_server import python
from tests.left_out import needs_rooms, slow_except

Run = Callable[..., Ended]
TRAIN = ("train", "-c", "config.yaml")
PROGRAM = """
import sys
from flows.cli import main
code = main(sys.argv[1:])
print([name for name in sys.modules if name.split('.')[0] == 'prefect'])
sys.exit(code)
"""


def test_train_json_gives_one_document_on_standard_output(command_run: CommandRun) -> None:
    assert command_run.ended.code == 0
    document = command_run.ended.document
    assert document["verdict"] == "passed"
    assert (document["step"], document["run_dir"]) == (8, "run")
    assert document["val_loss"] < 4
    assert document["red_flags"] == []
    assert document["summary"].startswith(
        "passed, better loss; no questions asked: 84 of 84 tensors changed, validation loss"
    )


def test_progress_goes_to_standard_error(command_run: CommandRun) -> None:
    lines = command_run.ended.stderr.splitlines()
    assert lines[0] == "run directory: run"
    assert any(line.startswith("step 8: ") and "validation loss" in line for line in lines)
    assert "Traceback" not in command_run.ended.stderr


def test_what_each_tier_holds_is_said_before_training(command_run: CommandRun) -> None:
    tier_of = json.loads((command_run.run_dir / "tiers.json").read_bytes())["tensors"]
    tensors = read_adapter(command_run.run_dir / "adapter").tensors
    sizes = [math.prod(tensors[name].shape) for name, tier in tier_of.items() if tier == 0]
    assert (len(sizes), sum(sizes)) == (28, 20480)
    expected = (
        "tier 0 (every step): 28 tensors, 20,480 parameters; tier 1 (every 2 steps): 28 tensors, "
        "20,480 parameters; tier 2 (every 4 steps): 28 tensors, 20,480 parameters"
    )
    assert expected in command_run.ended.stderr


@needs_rooms("memory")
def test_what_memory_is_needed_is_said_once_before_training(command_run: CommandRun) -> None:
    lines = command_run.ended.stderr.splitlines()
    (said,) = [line for line in lines if "needs about" in line]
    assert re.fullmatch(r"memory: needs about 0\.0\d+ GB of \d+\.\d GB", said)
    assert lines.index(said) < next(i for i, line in enumerate(lines) if line.startswith("step "))


def test_the_run_directory_holds_the_whole_truth(command_run: CommandRun) -> None:
    names = {path.name for path in command_run.run_dir.iterdir()}
    assert names >= {"config.yaml", "dataset.json", "initial", "tiers.json", "checkpoints"}
    assert names >= {"metrics.jsonl", "adapter", "gate.json", "run.lock"}
    assert not [name for name in names if name.startswith(".tmp-")]
    tiers = json.loads((command_run.run_dir / "tiers.json").read_bytes())
    assert tiers["frequencies"] == [1, 2, 4]
    assert tiers["tensors"].keys() == read_adapter(command_run.run_dir / "adapter").tensors.keys()


WITHOUT_PREFECT = """
import contextlib, json, sys
sys.modules["prefect"] = None  # importing it is an error
from flows.cli import main
codes = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stdout(sys.stderr):
        try:
            codes.append(main(words))
        except SystemExit as ended:  # of --help
            codes.append(ended.code)
print(json.dumps(codes))
"""


@needs_rooms("evaluate", "serve")
@pytest.mark.slow("trains a run of its own")
def test_commands_that_run_no_flow_need_no_prefect(tmp_path: Path) -> None:
    registry = {"path": "registry", "name": "capitals"}
    config = write_config(tmp_path / "config.yaml", iters=4, val_batches=1, registry=registry)
    write_lines(tmp_path / "asked.jsonl", [chat("I want to see Ecuador.", "Go and see Quito!")])
    program = tmp_path / "program.py"
    program.write_text(WITHOUT_PREFECT)
    commands = [
        ["validate", "-c", config.name],
        ["train", "-c", config.name, "--run-dir", "run"],
        ["status", "run"],
        ["promote", "run", "--registry", "registry", "--name", "capitals"],
        ["evaluate", "registry/capitals", "--data", "asked.jsonl"],
        ["serve", "--help"],
        ["run", "-c", config.name],
    ]
    done = python(program, json.dumps(commands), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    *without_flow, run = json.loads(done.stdout.splitlines()[-1])
    assert without_flow == [0] * 6, done.stderr
    assert run != 0  # a flow run: so the import is blocked


def test_status_of_a_finished_run(command_run: CommandRun, nested_tune: Run) -> None:
    done = nested_tune("status", command_run.run_dir, "--json")
    assert done.code == 0
    status = done.document
    assert (status["state"], status["verdict"], status["process"]) == ("verified", "passed", None)
    assert (status["step"], status["iteration"], status["iterations"]) == (8, 8, 8)
    assert status["updates"] == [8, 4, 2]
    assert status["current_val_loss"] == command_run.ended.document["val_loss"]


def test_status_for_a_person_is_a_table(command_run: CommandRun, nested_tune: Run) -> None:
    done = nested_tune("status", command_run.run_dir)
    assert done.code == 0
    rows = dict(re.findall(r"│ (.*?) +│ (.*?) +│", done.stdout))
    assert (rows["state"], rows["outcome"]) == (
        "verified",
        "Verified: passed, better loss; no questions asked",
    )
    assert rows["updates of each tier"] == "8, 4, 2"
    assert rows["trained"].startswith("8 of 8 steps, ")
    assert not [name for name in rows if "_" in name]  # words, not keys
    assert done.stderr == ""


@pytest.mark.slow("trains and judges a run of its own")
def test_resuming_a_finished_run_judges_it_again(command_run: CommandRun, tmp_path: Path) -> None:
    checkpoint = command_run.run_dir / "checkpoints" / "step-0000008"
    before = (checkpoint / "MANIFEST.json").stat().st_mtime_ns
    gate = (command_run.run_dir / "gate.json").read_bytes()
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    again = python(program, *TRAIN, "--run-dir", "run", "--resume", cwd=command_run.folder)
    assert again.returncode == 0, again.stderr
    assert (checkpoint / "MANIFEST.json").stat().st_mtime_ns == before
    assert (command_run.run_dir / "gate.json").read_bytes() == gate
    assert "[]" in again.stdout.splitlines()[-1]


def train_from_nothing(program: Path) -> subprocess.CompletedProcess[str]:
    """Run a program that trains in an interpreter that has imported nothing, and may not warn."""
    return subprocess.run(
        [sys.executable, program, *TRAIN],
        cwd=program.parent,
        env=os.environ | {"PYTHONWARNINGS": "error"},
        capture_output=True,
        text=True,
        check=False,
    )


def train_forked(program: Path) -> subprocess.CompletedProcess[str]:
    """Run it in a process that has imported the libraries, but no Prefect."""
    return python(program, *TRAIN, cwd=program.parent)


@pytest.mark.parametrize(
    "start",
    slow_except([train_from_nothing, train_forked], train_forked, reason="imports mlx_lm whole"),
)
def test_train_never_imports_prefect_and_prints_the_tier_table(tmp_path: Path, start: Any) -> None:
    write_config(tmp_path / "config.yaml", iters=4, val_batches=1)
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    done = start(program)
    assert done.returncode == 0, done.stderr
    *printed, modules = done.stdout.splitlines()
    assert modules == "[]"
    answers = [i for i, line in enumerate(printed) if line.startswith("    adapter:  ")]
    passed = next(
        i
        for i, line in enumerate(printed)
        if line.startswith("passed, better loss; no questions asked: ")
    )
    assert len(answers) == 3
    assert max(answers) < passed
    assert "  I want to see Ecuador. Where to? (valid.jsonl:1)" in printed
    assert "    expected: Go and see Quito, the capital of Ecuador!" in printed
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed if "│" in line]
    assert [row[:6] for row in rows] == [
        ["tier 0", "every 1", "14 of 14", "4", "4", "0"],
        ["tier 1", "every 2", "14 of 14", "2", "2", "0"],
        ["tier 2", "every 4", "7 of 14", "1", "1", "0"],  # lora_a moves with the second update
    ]
    (run_dir,) = (tmp_path / "runs").iterdir()
    assert f"adapter: runs/{run_dir.name}/adapter" in printed


@pytest.mark.parametrize(
    ("broken", "last"),
    [
        (SampleVerdict(3, 3), "next: `nested-tune promote 'runs/the one' --name NAME`"),
        (
            SampleVerdict(3, 3, 3, {"same": 3}),
            "3 of 3 sample answers are broken (3 the same to every prompt): do not promote it, but "
            "train longer, or try the learning rate that the run's warning names; without such a "
            "warning, one three times as high, or a third of it (docs/gate.md#answers_broken)",
        ),
        (
            SampleVerdict(3, 3, 2, {"no_words": 2}),
            "2 of 3 sample answers are broken (2 a single character or punctuation alone): do not "
            "promote it, but try a lower learning rate, a smaller lora_parameters.scale or fewer "
            "passes (docs/gate.md#answers_broken)",
        ),
    ],
)
def test_the_last_line_is_to_promote_or_what_to_try_where_the_answers_are_broken(
    broken: SampleVerdict, last: str, capfd: pytest.CaptureFixture[str]
) -> None:
    one = JudgedAdapter("adapter", "0" * 64)
    tiers = (TierChange(0, 1, 84, 84, 8, 8, 0),)
    verdict = Verdict((), 8, one, one, (), tiers, samples=broken)
    run = RunDirectory(Path("runs/the one"))
    print_result(FineTuneConfig(), FinetuneResult(run, verdict=verdict), ())
    printed, told = capfd.readouterr()
    lines = [*printed.splitlines(), *told.splitlines()]
    assert lines[-1] == last
    assert "Tiers" not in printed  # there is one alone, that is updated at every step


def test_what_the_data_was_warned_of_is_said_again_at_the_end(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = JudgedAdapter("adapter", "0" * 64)
    tiers = (TierChange(0, 1, 84, 84, 8, 8, 0),)
    result = FinetuneResult(RunDirectory(tmp_path), verdict=Verdict((), 8, one, one, (), tiers))
    found = tuple(Finding("train.jsonl", n, "warning", "goes-on", "They go on.") for n in (4, 7))
    for findings, said in ((found, ["data: 2 warnings (goes-on 2), explained by"]), ((), [])):
        report = DatasetReport("data", "0", {}, findings)
        write_json(tmp_path / "dataset.json", report.to_json())
        print_result(FineTuneConfig(), result, ())
        lines = capfd.readouterr().out.splitlines()
        assert [line[:42] for line in lines if line.startswith("data:")] == said


@pytest.mark.slow("trains and judges a run of its own")
def test_flags_win_over_the_file(tmp_path: Path, nested_tune: Run) -> None:
    write_config(tmp_path / "config.yaml", iters=400, val_batches=0)
    flags = ["--iters", "4", "--batch-size", "1", "--learning-rate", "1e-3", "--seed", "7"]
    done = nested_tune("train", "-c", "config.yaml", "--run-dir", "run", "--json", *flags)
    assert done.code == 0
    assert done.document["step"] == 4
    records = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(records[-1])["learning_rate"] == 0.0010000000474974513
    assert "seed: 7" in (tmp_path / "run" / "config.yaml").read_text()
