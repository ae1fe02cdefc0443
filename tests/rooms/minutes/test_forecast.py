"""How many steps fit into a time, with what is due between them and the verdict."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.gate.checks.judged import GateWork, RunToJudge
from nested_core.gate.judge import list_checks_with_model
from nested_core.models.session import Session
from nested_core.rooms.minutes.forecast import Forecast, make_forecast, try_steps
from nested_core.storage.run_directory import RunDirectory
from tests.example import example_config, prepare
from tests.left_out import needs_rooms

pytestmark = pytest.mark.slow("measures steps before it forecasts")


def forecast_of(**changes: Any) -> Forecast:
    """Steps of 2 s, an evaluation of 3 and a checkpoint of 1 every tenth of a run, 34 to judge."""
    seconds: dict[str, float] = {"opening": 10, "evaluation": 3, "verdict": 33}
    shares = {"steps_per_eval": 0.1, "save_every": 0.1}
    trial: Any = SimpleNamespace(step=2, checkpoint=1)
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
    assert trial.passes_of_a_step == pytest.approx(2 / 40)
    assert trial.tokens_per_second > 0
    assert trial.opening > 0
    assert trial.checkpoint > 0
    assert trial.step > 0
    assert made.evaluation == pytest.approx(5 * 0.5 * trial.step)  # 10 rows, two a batch
    assert made.verdict > 2 * made.evaluation


@needs_rooms("ranks")
def test_steps_of_several_processes_are_tried(tmp_path: Path) -> None:
    config = example_config(training={"processes": 2})
    run = prepare(config, tmp_path / "run")
    with run.locked(), Session() as session:
        trial = try_steps(config, run, 0.1, session)
    assert trial.step > 0
    assert trial.rows_to_begin == 0


def works_of(config: FineTuneConfig, path: Path) -> dict[str, GateWork]:
    """What each check of the gate that computes something declares of a run."""
    tokenizer = TokenizerSource.from_config(config).load()
    run = RunToJudge(config, prepare(config, path), tokenizer)
    checks = [one for one in list_checks_with_model() if one.is_asked(config.gate_bounds)]
    works = {one.name: one.plan_work(run) for one in checks if one.plan_work is not None}
    return {name: work for name, work in works.items() if work != GateWork()}


@pytest.mark.usefixtures("own_random_state")
def test_each_check_of_the_gate_declares_what_it_computes(tmp_path: Path) -> None:
    suite, general = tmp_path / "suite.jsonl", tmp_path / "general.jsonl"
    question = {"messages": [{"role": "user", "content": "Where to?"}], "expected": "Oslo"}
    suite.write_text((json.dumps(question) + "\n") * 9)
    general.write_text('{"text": "It rains."}\n' * 7)
    task = {"name": "where", "file": str(suite), "score": "exact", "max_tokens": 40}
    gate = {"tasks": [task], "general_data": str(general), "max_general_loss_increase": 0.1}
    config = example_config(gate=gate, training={"sample_tokens": 50})
    works = works_of(config, tmp_path / "run")
    rows = {name: work.rows for name, work in works.items() if work.rows and name != "controls"}
    assert rows == {"losses": 2 * 10, "general text": 2 * 7}
    assert (works["answers"].tokens, works["answers"].answers) == (2 * 40, 9)
    assert 50 < works["sample answers"].tokens < 70  # the adapter's are as long as the data's
    prompted = config.model_copy(update={"samples": ("Where to?",)})
    assert works_of(prompted, tmp_path / "other")["sample answers"].tokens == 2 * 50


@needs_rooms("controls")
@pytest.mark.usefixtures("own_random_state")
def test_controls_declare_what_they_compute(tmp_path: Path) -> None:
    controls = dict.fromkeys(("prompts", "surprises", "probes", "plan", "lookup"), True)
    works = works_of(example_config(gate={"controls": controls}), tmp_path / "run")
    # Other prompts and training rows, training rows again for the surprises, probes
    assert works["controls"].rows == 10 + 40 + 40 + 2 * 30
    whole = example_config(gate={"controls": {"lookup": True}}, mask_prompt=False)
    works = works_of(whole, tmp_path / "whole")
    assert works["controls"].rows == 3 * 10 + 40  # its answers are measured by themselves


def write_pairs(folder: Path, *splits: str) -> FineTuneConfig:
    """Nine pairs in each split, and a run on them."""
    for split in splits:
        pairs = [{"prompt": f"{split} {n}?", "chosen": "yes", "rejected": "no"} for n in range(9)]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return example_config(data=str(folder), training={"loss": "dpo"})


@needs_rooms("preferences")
@pytest.mark.usefixtures("own_random_state")
def test_the_gate_of_pairs_computes_them_once_for_each_adapter_and_the_base(tmp_path: Path) -> None:
    from nested_core.rooms.preferences.gate_check import MAX_REFERENCE_PAIRS

    config = write_pairs(tmp_path, "train", "valid")
    works = works_of(config, tmp_path / "run")
    assert works["losses"].rows == 2 * 9  # the adapter that training begins from is the base
    assert works["preference"].rows == MAX_REFERENCE_PAIRS
    later = config.model_copy(update={"resume_adapter_file": "a"})
    none: Any = None  # the count needs no tokenizer
    run = RunToJudge(later, RunDirectory(tmp_path / "run"), tokenizer=none)
    assert run.count_rows(9, 2, is_base_among=not run.goes_on) == 3 * 9


@needs_rooms("preferences")
def test_a_trial_computes_no_reference_and_forecasts_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = write_pairs(tmp_path, "train")
    run = prepare(config, tmp_path / "run")
    path = "nested_core.rooms.preferences.reference_likelihoods._compute_likelihoods"
    monkeypatch.setattr(path, lambda *_: pytest.fail("computed the reference"))
    with run.locked(), Session() as session:
        trial = try_steps(config, run, 0.1, session)
    assert trial.rows_to_begin == 9
