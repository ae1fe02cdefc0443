"""One run, read through every view: each tells the same numbers, of the same split and step.

The offered adapter is not the last one, so that a view which shows the last figures is found out.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from nested_core import finetune, open_run, read_report
from nested_core.pipeline.finetune import FinetuneResult
from nested_core.records.metrics import read_metrics
from nested_core.records.run_status import Run
from nested_core.records.verdict_table import check_tables, describe_verdict
from nested_core.report.curves import describe_curves
from nested_core.report.run_report import describe_run
from nested_core.seams import is_there, load
from nested_core.storage.untrusted_files import read_json_object
from nested_core.text.document import Document
from nested_core.text.loss_format import format_difference, format_interval, format_loss
from tests.builders.registering import promote
from tests.example import DATA, EXAMPLES, example_config
from tests.flows.conftest import called
from tests.left_out import needs_rooms

pytestmark = pytest.mark.slow("trains a run with questions, and judges it")
WORDS = "passed, better loss; 0 of 15 right (one fixed answer: 1)"
SUITE = {
    "name": "capitals",
    "file": str(EXAMPLES / "geography" / "held_out.jsonl"),
    "score": "contains",
    "max_tokens": 16,
    "max_drop": None,
}


@dataclass(frozen=True)
class Told:
    """A run and the figures that it wrote, from its files alone.

    offered: the step whose adapter is offered, its validation loss and the gate's loss.
    before: the gate's loss of the adapter that training began from; difference: with its interval.
    last: the step of the last evaluation and its loss; trained: the last training loss.
    """

    result: FinetuneResult
    offered: tuple[int, float, float]
    before: float
    difference: tuple[float, float, float]
    last: tuple[int, float]
    trained: float
    right: tuple[int, int]

    @property
    def change(self) -> str:
        """The gate's loss before and after."""
        return f"{format_loss(self.before)} -> {format_loss(self.offered[2])}"

    @property
    def folder(self) -> Path:
        return self.result.run.path


# It rises to 0.06: on any processor the loss falls to step 8 and is far higher at the end.
RISING_RATE = {"name": "exponential_decay", "arguments": [2e-3, 1.15]}


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("told")
    data = folder / "data"  # the gate judges by test.jsonl, the step was chosen by valid.jsonl
    data.mkdir()
    rows = (DATA / "valid.jsonl").read_text().splitlines(keepends=True)
    train = (DATA / "train.jsonl").read_text().splitlines(keepends=True)
    (data / "train.jsonl").write_text("".join(train[:8]))
    (data / "valid.jsonl").write_text("".join(rows[:5]))
    (data / "test.jsonl").write_text("".join(rows[5:]))
    config = example_config(
        data=str(data),
        lr_schedule=RISING_RATE,
        num_layers=-1,
        iters=1000,
        steps_per_eval=4,
        steps_per_report=4,
        training={"epochs": 6},
        gate={"tasks": [SUITE]},
        registry={"path": str(folder / "registry"), "name": "capitals"},
    )
    run = open_run(folder / "runs" / "one")
    result = finetune(config, run)
    assert result.version is not None
    promote(folder / "registry", "capitals", result.version, by="ann")
    records = read_metrics(run.metrics)
    losses = {r["step"]: r["val_loss"] for r in records if "val_loss" in r}
    gate = read_json_object(run.gate)
    step = gate["adapter_step"]
    last = max(losses)
    assert step != last, f"choose settings whose best step is not the last: {losses}"
    (suite,) = gate["tasks"]
    counts = tuple(round(suite[key] * suite["questions"]) for key in ("base", "candidate"))
    return Told(
        result,
        (step, losses[step], gate["validation"]["loss_after"]),
        gate["validation"]["loss_before"],
        (gate["validation"]["difference"], *gate["validation"]["interval"]),
        (last, losses[last]),
        [r["loss"] for r in records if "loss" in r][-1],
        counts,
    )


def asked(told: Told, *command: str) -> str:
    done = called(*command, cwd=told.folder.parent.parent)
    assert done.code == 0
    return done.stdout


@needs_rooms("compare")
def test_status_runs_and_compare_tell_the_same_numbers(told: Told) -> None:
    status = json.loads(asked(told, "status", "runs/one", "--json"))
    (listed,) = json.loads(asked(told, "runs", "--json"))["runs"]
    compared = json.loads(asked(told, "compare", "runs/one", "--json"))
    (own,) = compared["runs"]
    for view in (status, listed, own):
        assert (view["offered_step"], view["offered_val_loss"], view["gate_loss"]) == told.offered
        assert (view["train_loss"], view["val_loss"]) == (told.trained, told.last[1])
        assert (view["step"], view["steps"], view["epochs"]) == (24, 24, 6.0)
        assert (view["outcome"], view["conclusion"]) == ("Promoted", "better")
    assert status["current_val_loss"] == told.last[1]
    assert compared["tasks"] == {"capitals": [told.right[1] / 15]}
    compare_runs = load("nested_core.rooms.compare.comparison:compare_runs")
    assert "iters" not in compare_runs([told.folder, told.folder]).differing_settings()
    page = (EXAMPLES.parent / "docs" / "report.md").read_text(encoding="utf-8")
    documented = re.findall(r'"(\w+)"', page.partition('{"runs": [{')[2].partition("}]}")[0])
    assert set(documented) == set(listed)
    assert set(listed) == set(own) & set(status)


def rows_of(table: str) -> dict[str, list[str]]:
    """The cells of a terminal's table behind the first of each row."""
    lines = [line.strip("│").split("│") for line in table.splitlines() if line.startswith("│")]
    return {name.strip(): [cell.strip() for cell in cells] for name, *cells in lines}


@needs_rooms("compare")
def test_the_tables_of_the_command_line_tell_them_too(told: Told) -> None:
    step, val_loss, gate_loss = told.offered
    listed = rows_of(asked(told, "runs"))["one"]
    losses = [format_loss(val_loss), format_loss(gate_loss)]
    outcome = listed.pop(1)  # its first line: a long cell goes on below
    assert f"Promoted: {WORDS}".startswith(outcome)
    assert outcome.startswith("Promoted: passed, better loss; 0 of 15 right")
    assert listed[:-1] == ["capitals", f"{step} of 24", *losses]
    status = rows_of(asked(told, "status", "runs/one"))
    compared = rows_of(asked(told, "compare", "runs/one"))
    data = "train.jsonl, mean since the last report, step 24"
    last_step, last_loss = told.last
    for shown in (status, compared):
        (outcome,) = shown["outcome"]  # its first line, as above
        assert f"Promoted: {WORDS}".startswith(outcome)
        assert outcome.startswith("Promoted: passed, better loss; 0 of 15 right (one fixed answer")
        assert shown["trained"] == ["24 of 24 steps, 6 passes over train.jsonl"]
        assert shown["selected: the adapter of step"] == [str(step)]
        assert shown["its validation loss"] == [format_loss(val_loss)]
        assert shown["test loss, test.jsonl, 5 examples"] == [told.change]
        assert shown["answers, capitals"] == [f"{told.right[0]} of 15 -> {told.right[1]} of 15"]
        assert shown["training loss, last report"] == [f"{format_loss(told.trained)} ({data})"]
        evaluated = f"{format_loss(last_loss)} (valid.jsonl, 5 examples, step {last_step})"
        assert shown["validation loss, last report"][0].startswith(evaluated)


def test_each_page_has_the_same_rows_and_the_loss_in_the_same_words(told: Told) -> None:
    step, _, gate_loss = told.offered
    result, folder = told.result, told.folder.parent.parent
    verdict = result.verdict
    assert verdict is not None
    assert result.version is not None
    config = example_config(registry={"path": str(told.folder), "name": "capitals"})
    pages = {
        "report": str(describe_run(Run(result.run))),
        "gate": str(Document("", [*describe_verdict(verdict, "Verified"), *check_tables(verdict)])),
        "repr": repr(result),
    }
    if is_there("export"):
        pages["card"] = asked(told, "card", "capitals")
    if is_there("nights"):
        describe_champion = load("nested_core.rooms.nights.pages:describe_champion")
        champion = (folder / "registry", "capitals", result.version, verdict)
        pages["champion"] = str(describe_champion(*champion))
        describe_night = load("nested_core.rooms.nights.pages:describe_night")
        pages["night"] = str(describe_night(config, Run(result.run), "Promoted", "done"))
    plain = {name: page.replace("\\", "") for name, page in pages.items()}
    losses = f"{format_loss(told.before)} | {format_loss(gate_loss)}"
    difference, *interval = told.difference
    differs = f"{format_difference(difference)} ({format_interval(interval)})"
    rows = (
        f"| test loss, test.jsonl, 5 examples | {losses} | {differs} |",
        f"| answers, capitals | {told.right[0]} of 15 | {told.right[1]} of 15 |",
    )
    for name in plain.keys() - {"repr"}:
        assert [row for row in rows if row not in plain[name]] == [], name
    loss = f"test loss {told.change} (test.jsonl, 5 examples, step {step} of 24)"
    for name in plain.keys() - {"card"}:
        assert loss in plain[name], name
    if "card" in plain:
        for words in ("| steps | 24 of 24 |", "| passes over train.jsonl | 6 |"):
            assert words in plain["card"]
        assert f"| step of this adapter | {step} |" in plain["card"]
        assert "1000" not in plain["card"]  # iters did not count
    assert "24 of 24 steps, 6 passes over train.jsonl" in read_report(told.folder).to_html()
    assert f"The adapter of step {step} is the one that was evaluated." in plain["report"]
    assert "Validation losses are of valid.jsonl, 5 examples." in plain["report"]
    assert result.training is not None
    assert (result.training.adapter_step, verdict.adapter_step) == (step, step)
    assert result.training.best_val_loss == told.offered[1]
    assert result.training.val_loss == told.last[1]
    drawn = str(describe_curves(Run(result.run).metrics, 24, "data", "nats/token"))
    assert f"{format_loss(told.last[1])} (step {told.last[0]})" in drawn.replace("\\", "")
