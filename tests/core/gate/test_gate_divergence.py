"""A run that diverged is told as such: never as another configuration, and with rate and step."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.gate import judge_run
from nested_core.gate.training_divergence import Divergence, find_divergence
from nested_core.storage.checkpoint_verification import checkpoint_path
from nested_core.storage.run_directory import RunDirectory
from tests.core.gate.conftest import STEPS, Rewrite
from tests.core.gate.pairs import codes
from tests.core.gate.rewriting import vouch
from tests.example import DATA, train_example
from tests.left_out import slow_except


@pytest.mark.parametrize(
    "frequencies", slow_except([[1], [1, 2, 4]], [1, 2, 4], reason="trains another run")
)
def test_a_learning_rate_of_50_is_not_finite_and_named_with_the_step(
    tmp_path: Path, frequencies: list[int]
) -> None:
    done = train_example(
        tmp_path / "run",
        learning_rate=50.0,
        nested={"frequencies": frequencies},
        steps_per_report=2,
        val_batches=1,
    )
    verdict = judge_run(done.config, done.run)
    assert codes(verdict)[0] == "non_finite"
    assert "config_mismatch" not in codes(verdict)
    first = verdict.reasons[0].message
    assert "training diverged at learning_rate 50: from step 4 on no gradient was left" in first


def test_without_held_out_data_the_training_loss_speaks(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    shutil.copyfile(DATA / "train.jsonl", data / "train.jsonl")
    done = train_example(
        tmp_path / "run", data=str(data), nested={"frequencies": [1]}, steps_per_report=1
    )
    assert judge_run(done.config, done.run).has_passed
    records = done.metrics()
    for record in records[4:]:
        record["loss"] += 100
    done.run.metrics.write_text("".join(json.dumps(record) + "\n" for record in records))
    vouch(done.run, checkpoint_path(done.run.checkpoints, 8))
    verdict = judge_run(done.config, done.run)
    assert codes(verdict) == ["loss_regressed"]
    assert "at learning_rate 0.002: the loss left by step 4" in verdict.reasons[0].message


def reports(key: str, *values: float | None, **others: Any) -> list[dict[str, Any]]:
    return [{"step": 10 * n, key: value} | others for n, value in enumerate(values)]


def test_the_step_at_which_a_loss_left_is_that_of_the_first_report_above() -> None:
    records = reports("loss", 4.0, 3.0, 9.0, None, 12.0, learning_rate=7.0)
    found = find_divergence(records, 40, 1.0)
    assert found == Divergence(20, 7.0, 4.0, 9.0, True, 3)
    assert found.is_certain
    assert str(found) == (
        "training diverged at learning_rate 7: the loss left by step 20: 9 after 4 at first; "
        "lower the rate"
    )
    assert find_divergence(records, 10, 1.0) is None  # the adapter is from before


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([], None),
        (reports("loss", 4.0, 9.0, 3.0), None),  # it came back
        (reports("loss", 4.0, 6.9), None),
        (reports("loss", 0.01, 0.9), None),  # noise where nothing was left to learn
        (reports("loss", 4.0, 7.1), Divergence(10, 1.0, 4.0, 7.1, True, 1)),
        (reports("loss", 4.0, None), Divergence(10, 1.0, 4.0, None, True, 1)),
        (reports("loss", None, None), Divergence(0, 1.0, None, None, True, 2)),
        (reports("val_loss", 4.0, 3.0, 7.5), Divergence(20, 1.0, 4.0, 7.5, True, 1)),
        (reports("grad_norm", 1.0, 0.0, 0.0), Divergence(10, 1.0, None, None, False, 2)),
        (reports("grad_norm", 1.0, 0.0, 2.0), None),
        (reports("grad_norm", 1.0, None), Divergence(10, 1.0, None, None, False, 1)),
    ],
)
def test_training_has_diverged_where_it_never_came_back(
    records: list[dict[str, Any]], expected: Divergence | None
) -> None:
    assert find_divergence(records, 100, 1.0) == expected


def test_two_reports_above_are_noise_where_nothing_else_speaks() -> None:
    two = find_divergence(reports("loss", 4.0, 9.0, 9.0), 100, 1.0)
    assert two is not None
    assert not two.is_certain
    skipped = find_divergence(reports("loss", 4.0, None), 100, 1.0)  # one step without a loss
    assert skipped is not None
    assert not skipped.is_certain
    lost = find_divergence(reports("loss", 4.0, None, None, None), 100, 1.0)
    assert lost is not None
    assert lost.is_certain


@pytest.mark.slow("trains and judges a run of its own")
def test_logits_that_differ_after_a_divergence_are_no_other_configuration(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite
) -> None:
    def halve(state: dict[str, Any]) -> None:
        state["logits"]["values"] = [[x / 2 for x in row] for row in state["logits"]["values"]]

    rewrite(change_state=halve)
    assert codes(judge_run(config, run)) == ["config_mismatch"]
    last = json.loads(run.metrics.read_text().splitlines()[-1])
    with run.metrics.open("a") as file:
        file.write(json.dumps(last | {"val_loss": 50.0}) + "\n")
    vouch(run, checkpoint_path(run.checkpoints, STEPS))
    (reason,) = judge_run(config, run).reasons
    assert reason.code == "loss_regressed"
    assert "at learning_rate 0.002: the loss left by step 8: 50 after 7.96" in reason.message


def test_a_configuration_that_differs_is_told_whatever_the_loss_did(
    config: FineTuneConfig, run: RunDirectory, rewrite: Rewrite
) -> None:
    rewrite(change_config=lambda meaning: meaning["lora_parameters"].update(scale=20.0))
    last = json.loads(run.metrics.read_text().splitlines()[-1])
    with run.metrics.open("a") as file:
        file.write(json.dumps(last | {"val_loss": 50.0}) + "\n")
    vouch(run, checkpoint_path(run.checkpoints, STEPS))
    assert "config_mismatch" in codes(judge_run(config, run))
