"""How many steps fit into a time, with what is due between them and the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nested_core.models.session import Session
from nested_core.rooms.minutes.forecast import Forecast, make_forecast
from nested_core.rooms.minutes.trial_run import try_steps
from tests.example import example_config, prepare


def forecast_of(**changes: Any) -> Forecast:
    """Steps of 2 s, an evaluation of 3 and a checkpoint of 1 every tenth of a run, 34 to judge."""
    seconds: dict[str, float] = {"opening": 10, "step": 2, "evaluation": 3, "checkpoint": 1}
    seconds |= {"checkpoint": 1, "verdict": 33}
    shares = {"steps_per_eval": 0.1, "save_every": 0.1}
    trial: Any = None
    return Forecast(config=example_config(**shares | changes), batches=3, trial=trial, **seconds)


def test_a_run_takes_its_steps_what_is_due_between_them_and_the_verdict() -> None:
    assert forecast_of().seconds_of(100) == 10 + 100 * 2 + 11 * 3 + 10 * 1 + 34
    assert forecast_of(steps_per_eval=50).seconds_of(100) == 10 + 200 + 3 * 3 + 10 * 1 + 34
    assert forecast_of(save_every="10m").seconds_of(100) == 10 + 200 + 11 * 3 + 10 + 34
    accumulated = forecast_of(grad_accumulation_steps=4, steps_per_eval=200)
    assert accumulated.seconds_of(100) == 10 + 200 + 3 * 3 + 10 * 1 + 34


@pytest.mark.parametrize("seconds", [53, 60, 100, 283, 300, 1000])
def test_the_most_steps_that_fit_are_counted(seconds: int) -> None:
    forecast = forecast_of()
    steps = forecast.count_steps(seconds)
    assert steps > 0
    assert forecast.seconds_of(steps) <= seconds
    assert all(forecast.seconds_of(more) > seconds for more in range(steps + 1, steps + 20))


@pytest.mark.parametrize("seconds", [-5, 0, 40, 52])
def test_no_step_fits_where_there_is_no_time_for_one_and_its_verdict(seconds: int) -> None:
    assert forecast_of().count_steps(seconds) == 0


def test_a_short_run_evaluates_no_more_often_than_an_evaluation_has_batches() -> None:
    assert forecast_of().seconds_of(5) == 10 + 5 * 2 + 3 * 3 + 5 * 1 + 34  # after steps 3 and 5
    assert forecast_of(steps_per_eval=1).seconds_of(5) == 10 + 5 * 2 + 6 * 3 + 5 * 1 + 34


def test_a_trial_measures_and_changes_nothing_of_the_run(tmp_path: Path) -> None:
    config = example_config(gate={"tasks": []}, samples=("I want to see Norway. Where to?",))
    run = prepare(config, tmp_path / "run")
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    with run.locked(), Session() as session:
        trial = try_steps(config, run, 0.2, session)
        base = session.load_base(config)
        made = make_forecast(config, run, trial, base.model, base.tokenizer)
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    assert {path: after[path] for path in before} == before
    assert after.keys() - before.keys() <= {run.lock}
    assert trial.plan.steps > 1
    assert trial.tokens_per_second > 0
    assert trial.opening > 0
    assert trial.checkpoint > 0
    assert made.step > 0
    assert made.evaluation == pytest.approx(5 * 0.5 * made.step)  # 10 rows, two a batch
    assert made.verdict > 2 * made.evaluation


@pytest.mark.slow("answers for its forecast, twice")
def test_more_tokens_of_answers_take_longer(tmp_path: Path) -> None:
    suite = tmp_path / "suite.jsonl"
    question = {"messages": [{"role": "user", "content": "Where to?"}], "expected": "Oslo"}
    suite.write_text(json.dumps(question) + "\n")

    def answers_of(max_tokens: int) -> float:
        task = {"name": "where", "file": str(suite), "score": "exact", "max_tokens": max_tokens}
        config = example_config(gate={"tasks": [task]})
        run = prepare(config, tmp_path / f"run-{max_tokens}")
        with run.locked(), Session() as session:
            trial = try_steps(config, run, 0.2, session)
            base = session.load_base(config)
            return make_forecast(config, run, trial, base.model, base.tokenizer).verdict

    few, many = answers_of(4), answers_of(4_000)
    assert 0 < 50 * few < many
