"""One run, read through every view: each tells the same numbers, of the same split and step.

The offered adapter is not the last one, so that a view which shows the last figures is found out.
"""

from __future__ import annotations

import html
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from nested_core import compare_runs, finetune, open_run, read_report
from nested_core.pipeline.finetune import FinetuneResult
from nested_core.records.metrics import read_metrics
from nested_core.records.run import Run
from nested_core.registry import promote
from nested_core.report.champion_page import ChampionRecord, describe_champion
from nested_core.report.loss_curves import describe_curves
from nested_core.report.night_page import describe_night
from nested_core.report.verdict_page import describe_verdict
from nested_core.storage.strict_files import read_json_object
from nested_core.text.loss_format import format_difference, format_interval, format_loss
from tests.example import DATA, EXAMPLES, example_config
from tests.flows.conftest import called

WORDS = "passed, better"
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


def run_json(told: Told, *command: str) -> Any:
    done = called(*command, "--json", cwd=told.folder.parent.parent)
    assert done.code == 0
    return json.loads(done.stdout)


def test_status_runs_and_compare_tell_the_same_numbers(told: Told) -> None:
    status = run_json(told, "status", "runs/one")
    (listed,) = run_json(told, "runs")["runs"]
    compared = run_json(told, "compare", "runs/one")
    (own,) = compared["runs"]
    for view in (status, listed, own):
        keys = ("offered_step", "offered_val_loss", "gate_loss")
        assert tuple(view[key] for key in keys) == told.offered
    assert status["current_val_loss"] == listed["val_loss"] == own["val_loss"] == told.last[1]
    assert status["current_train_loss"] == listed["train_loss"] == told.trained
    losses = compared["losses"]
    assert (losses["validation_step"], losses["validation"]) == ([told.last[0]], [told.last[1]])
    assert losses["training"] == [told.trained]
    assert (losses["gate_step"], losses["gate_after"]) == ([told.offered[0]], [told.offered[2]])
    assert (losses["gate_file"], losses["gate_examples"]) == (["test.jsonl"], [5])
    assert (losses["validation_file"], losses["validation_examples"]) == (["valid.jsonl"], [5])
    assert (status["step"], listed["step"], own["step"], own["epochs"]) == (24, 24, 24, 6.0)
    assert (listed["steps"], own["steps"]) == (24, 24)
    assert compared["tasks"] == {"capitals": [told.right[1] / 15]}


def test_the_tables_of_the_command_line_tell_them_too(told: Told) -> None:
    step, val_loss, gate_loss = told.offered
    listed = called("runs", cwd=told.folder.parent.parent).stdout
    cells = [cell.strip() for cell in re.findall(r"[^│\n]+", listed.splitlines()[3])]
    assert cells[1:6] == [
        "capitals",
        f"promoted: {WORDS}",
        f"{step} of 24",
        format_loss(val_loss),
        format_loss(gate_loss),
    ]
    status = called("status", "runs/one", cwd=told.folder.parent.parent).stdout
    shown = dict(re.findall(r"│ (.*?) +│ (.*?) +│", status))
    last_step, last_loss = told.last
    assert shown["verdict"] == WORDS
    assert shown["offered: the adapter of step"] == str(step)
    assert shown["its validation loss"] == format_loss(val_loss)
    assert shown["gate's loss after"] == format_loss(gate_loss)
    assert shown["last report at step"] == "24"
    train = "train.jsonl, mean since the last report, step 24"
    assert shown["training loss, last report"] == f"{format_loss(told.trained)} ({train})"
    assert shown["validation loss, last evaluation"].startswith(
        f"{format_loss(last_loss)} (valid.jsonl, 5 examples, step {last_step})"
    )
    named = list(compare_runs([told.folder]).rows())
    rows = {str(name): cells for name, *cells in named}
    places = {str(name): number for number, (name, *_) in enumerate(named)}

    def below(name: str, count: int) -> list[tuple[object, ...]]:
        """The rows of the split and step that stand below a loss."""
        return [tuple(row) for row in named[places[name] + 1 :][:count]]

    assert rows["verdict"] == [WORDS]
    assert rows["gate's loss before"] == [told.before]
    gate_rows = [("gate's loss: file", "test.jsonl"), ("gate's loss: examples", 5)]
    assert below("gate's loss before", 2) == gate_rows
    assert rows["training loss, mean of the last report"] == [told.trained]
    assert below("training loss, mean of the last report", 2) == [
        ("training loss: file", "train.jsonl"),
        ("training loss: at step", 24),
    ]
    assert below("validation loss, last evaluation", 3) == [
        ("validation loss: file", "valid.jsonl"),
        ("validation loss: examples", 5),
        ("validation loss: at step", last_step),
    ]
    assert rows["offered: the adapter of step"] == [step]
    assert rows["its validation loss"] == [val_loss]
    assert rows["gate's loss after"] == [gate_loss]
    assert rows["validation loss, last evaluation"] == [told.last[1]]
    assert rows["trained"] == ["24 of 24 steps, 6 passes over train.jsonl"]
    assert rows["right answers, capitals"] == [told.right[1] / 15]
    assert "iters" not in compare_runs([told.folder, told.folder]).differing_settings()


def test_the_page_the_card_and_python_tell_them(told: Told) -> None:
    step, _, gate_loss = told.offered
    page = html.unescape(re.sub(r"<[^>]+>", " ", read_report(told.folder).to_html()))
    assert "24 of 24 steps, 6 passes over train.jsonl" in page
    assert f"The adapter of step {step} is the one that was judged." in page
    change = f"loss {format_loss(told.before)} → {format_loss(gate_loss)} on test.jsonl, 5 examples"
    assert f"P{WORDS[1:]}: {change}" in page
    difference, *interval = told.difference
    words = " ".join(page.split())
    assert f"Loss before {format_loss(told.before)} nats a token, test.jsonl, 5 examples" in words
    assert f"Loss after {format_loss(gate_loss)} step {step}, same examples" in words
    assert f"Difference {format_difference(difference)} after minus before" in words
    assert f"95 % interval {format_interval(interval)}" in words
    assert "Validation losses are of valid.jsonl, 5 examples." in words
    for at, loss in ((step, told.offered[1]), told.last):  # in the table below the curve
        assert re.search(
            rf"(?<!\S){at} [0-9.]+ [0-9.]+ {re.escape(format_loss(loss))}(?!\S)", words
        )
    assert f"{told.right[1]} of 15 right answers to capitals" in page

    card = called("card", "capitals", cwd=told.folder.parent.parent).stdout
    assert "| steps | 24 of 24 |" in card
    assert "| passes over train.jsonl | 6 |" in card
    assert f"| step of this adapter | {step} |" in card
    losses = f"{format_loss(told.before)} | {format_loss(gate_loss)} |"
    assert f"| mean loss, nats a token | test.jsonl, 5 examples | {losses}" in card
    assert "the loss is better." in card
    assert f"| {told.right[0]} of 15 | {told.right[1]} of 15 |" in card
    assert "1000" not in card  # iters did not count

    result = told.result
    assert result.training is not None
    assert result.verdict is not None
    assert result.verdict.validation is not None
    assert (result.training.adapter_step, result.verdict.adapter_step) == (step, step)
    assert result.verdict.validation.loss_after == gate_loss
    assert result.training.best_val_loss == told.offered[1]
    assert result.training.val_loss == told.last[1]
    change = f"{format_loss(told.before)} -> {format_loss(gate_loss)}"
    assert f"{change} (test.jsonl, 5 examples, step {step} of 24)" in repr(result)


def test_prefects_pages_tell_them(told: Told) -> None:
    step, _, gate_loss = told.offered
    assert told.result.verdict is not None
    figures = (
        f"{format_loss(told.before)} before training, {format_loss(gate_loss)} after, adapter of "
        f"step {step} (test.jsonl, 5 examples)"
    )
    assert figures in str(describe_verdict(told.result.verdict))
    config = example_config(registry={"path": str(told.folder), "name": "capitals"})
    night = str(describe_night(config, Run(told.result.run), "Promoted", "done"))
    assert figures in night
    answers = f"{told.right[0]} of 15 right before, {told.right[1]} of 15 after"
    assert f"capitals: {answers}" in night
    registry = told.folder.parent.parent / "registry"
    assert told.result.version is not None
    record = ChampionRecord.read(registry, "capitals", told.result.version)
    champion = str(describe_champion(record))
    assert figures in champion
    assert answers in champion
    curves = read_metrics(told.result.run.metrics)
    drawn = str(describe_curves(curves, 24, "data"))
    assert f"step {told.last[0]}" in drawn
    assert format_loss(told.last[1]) in drawn
