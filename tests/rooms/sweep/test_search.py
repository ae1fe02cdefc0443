"""A sweep: its plan, its points, its choice, and that it goes on as if it had not been stopped."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from nested_core import FineTuneConfig
from nested_core.config.loading import parse_config
from nested_core.errors import ConfigError, DamagedError, TrainingStopped, go_on_with
from nested_core.pipeline.hooks import Steps
from nested_core.records.answers import AnswerRecord, write_answers
from nested_core.records.metrics import read_metrics
from nested_core.records.paired_difference import PairedDifference
from nested_core.rooms.sweep.search import (
    SWEEP_FILE,
    SWEEP_NAME,
    SweepChoice,
    SweepRequest,
    SweepResult,
    _digest_request,
    compare_answers,
    count_steps,
    is_shown_better,
    plan_rungs,
    refuse_incomparable_keys,
    settings_of_point,
    sweep,
)
from nested_core.storage.run_directory import RunDirectory
from tests.example import DATA, MODEL, example_config, example_settings

pytestmark = pytest.mark.slow("trains several arms")

CONFIG: dict[str, Any] = {"iters": 40, "nested": {"frequencies": [1]}, "batch_size": 4}
REQUEST = SweepRequest({"learning_rate": [1e-6, 1e-4]}, steps=60)


@pytest.mark.parametrize(
    ("arms", "wanted", "budget", "rungs"),
    [
        (2, 100, None, (50, 100)),
        (4, 100, None, (24, 48, 96)),
        (4, 100, 200, (18, 36, 72)),
        (4, 100, 10_000, (24, 48, 96)),
        (16, 1600, None, (200, 400, 800, 1600)),
    ],
)
def test_arms_are_compared_at_halves_of_what_the_budget_gives_a_run(
    arms: int, wanted: int, budget: int | None, rungs: tuple[int, ...]
) -> None:
    assert plan_rungs(arms, wanted, budget) == rungs
    assert budget is None or count_steps(arms, rungs) <= budget


def test_the_steps_of_a_round_are_those_of_the_halves_and_the_configuration_itself() -> None:
    assert count_steps(4, (10, 20, 40)) == 4 * 10 + (2 + 1) * 10 + (1 + 1) * 20


@pytest.mark.parametrize(("wanted", "budget"), [(7, None), (100, 20)])
def test_a_budget_too_short_to_compare_in_is_refused(wanted: int, budget: int | None) -> None:
    with pytest.raises(ConfigError, match="4 settings need runs of 8 steps or more"):
        plan_rungs(4, wanted, budget)


@pytest.mark.parametrize(
    ("point", "rank", "scale"),
    [
        ({"lora_parameters.rank": 32}, 32, 0.5),  # the base has 8 x 2
        ({"lora_parameters.rank": 32, "lora_parameters.scale": 2.0}, 32, 2.0),
        ({"lora_parameters.alpha": 160}, 8, 20.0),
        ({}, 8, 2.0),
    ],
)
def test_another_rank_keeps_rank_x_scale(point: Any, rank: int, scale: float) -> None:
    lora = parse_config(settings_of_point(example_config(), point), source="").lora_parameters
    assert (lora.rank, lora.scale) == (rank, scale)


def test_a_rate_that_a_schedule_decides_is_not_varied() -> None:
    config = example_config(lr_schedule={"name": "cosine_decay", "arguments": [1e-3, 10]})
    with pytest.raises(ConfigError, match="learning_rate would change nothing"):
        refuse_incomparable_keys({"learning_rate"}, config)


@pytest.mark.parametrize(
    "name",
    [
        *("model", "data", "prompt_feature", "data_format", "mask_prompt", "max_seq_length"),
        *("val_batches", "hf_dataset.path", "data_policy", "data_policy.overlong"),
        *("training.loss", "training.loss_config", "training.loss_config.gamma", "training"),
        *("training.supervise", "training.precision", "gate.held_out", "registry.name"),
        *("iters", "training.minutes", "batch_size", "grad_accumulation_steps"),
    ],
)
def test_a_key_under_which_losses_are_no_comparison_is_not_varied(name: str) -> None:
    with pytest.raises(ConfigError, match=f"the grid varies {name}. Settings are compared by one"):
        refuse_incomparable_keys({"seed", name}, example_config())


def test_where_a_run_begins_is_not_varied_under_a_loss_that_may_compare_with_it() -> None:
    config = example_config(training={"loss": "dpo"})
    names = {"resume_adapter_file", "data_policy.duplicates", "lora_parameters.rank"}
    refuse_incomparable_keys(names, example_config())
    with pytest.raises(ConfigError, match="the grid varies resume_adapter_file"):
        refuse_incomparable_keys(names, config)


def run_sweep(folder: Path, hooks: Steps | None = None, **changes: Any) -> SweepResult:
    return sweep(example_config(**CONFIG | changes), folder, REQUEST, hooks)


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> SweepResult:
    return run_sweep(tmp_path_factory.mktemp("swept") / "sweep")


def test_arms_are_compared_by_what_they_have_at_the_rung(swept: SweepResult) -> None:
    for number, arm in enumerate(swept.record.arms):
        metrics = read_metrics(swept.folder / "arms" / f"{number:03d}" / "metrics.jsonl")
        losses = {each["step"]: each["val_loss"] for each in metrics if "val_loss" in each}
        assert arm.scores.keys() <= losses.keys()
        for step, score in arm.scores.items():
            assert score == (min(loss for at, loss in losses.items() if 0 < at <= step),)


def test_the_arm_of_the_lowest_loss_is_trained_to_the_end_and_judged(swept: SweepResult) -> None:
    record = swept.record
    assert record.rungs == (6, 12, 24)
    assert 3 * 6 + 6 + 12 <= record.trained <= count_steps(3, record.rungs) == 60
    last = record.rungs[-1]
    scores = {n: arm.scores[last] for n, arm in enumerate(record.arms) if last in arm.scores}
    assert record.chosen == min(scores, key=lambda number: scores[number] or (99.0,))
    assert last not in record.arms[1].scores  # 1e-6 learns nothing, and is dropped
    assert (swept.verdict.adapter_step or 0) <= last
    best = parse_config_of(swept.folder / "best.yaml")
    assert best.iters == 40  # the whole length, for whoever trains it again


def test_answers_of_two_arms_are_paired_by_their_question(tmp_path: Path) -> None:
    runs = []
    for name, lines in (("a", range(1, 11)), ("b", range(6, 16))):
        run = RunDirectory(tmp_path / name)
        run.path.mkdir()
        write_answers(
            run.answers,
            [
                AnswerRecord(
                    "s", "candidate", n, f"q{n}", "", float(n % 2), 1, False, False, False, 0.0
                )
                for n in lines
            ],
        )
        runs.append(run)
    found = compare_answers(runs[1], runs, "s")
    assert (found.examples, found.mean) == (5, 0.0)


def parse_config_of(path: Path) -> FineTuneConfig:
    from nested_core import load_config

    return load_config(path)


class StopsInTheMiddle(Steps):
    """Asks for a stop in the second arm's second step."""

    def __init__(self) -> None:
        self._trainer: Any = None
        self._starts = 0

    def on_training_start(self, trainer: Any) -> None:
        self._trainer = trainer
        self._starts += 1

    def on_step(self, step: int, steps: int) -> None:
        if self._starts == 2 and step == 2:
            self._trainer.stop_training()


@pytest.mark.slow("trains a sweep's arms again")
def test_a_stopped_sweep_goes_on_to_the_same_figures(swept: SweepResult, tmp_path: Path) -> None:
    with pytest.raises(TrainingStopped) as stopped:
        run_sweep(tmp_path / "sweep", StopsInTheMiddle())
    assert stopped.value.advice == go_on_with(tmp_path / "sweep")
    so_far = SWEEP_FILE.read(tmp_path / "sweep" / SWEEP_NAME)
    assert [len(arm.scores) for arm in so_far.arms] == [1, 0, 0]
    done = run_sweep(tmp_path / "sweep")
    assert done.record == swept.record
    assert done.summary() == swept.summary()


def test_a_sweep_of_other_data_or_of_another_tokenizer_is_another_one(tmp_path: Path) -> None:
    base, data = (shutil.copytree(own, tmp_path / own.name) for own in (MODEL, DATA))
    config = example_config(**CONFIG | {"model": str(base), "data": str(data)})
    digests = [_digest_request(config, REQUEST)]
    for file in (base / "generation_config.json", data / "valid.jsonl"):
        file.write_text(file.read_text() + "\n")
        digests.append(_digest_request(config, REQUEST))
    (data / "valid.jsonl").write_text((DATA / "valid.jsonl").read_text().splitlines()[0])
    digests.append(_digest_request(config, REQUEST))
    first, other_end, same_rows, other_rows = digests
    assert first != other_end == same_rows != other_rows


def test_a_sweep_of_another_request_or_a_damaged_one_is_not_gone_on_with(swept, tmp_path) -> None:
    (tmp_path / "sweep").mkdir()
    shutil.copy(swept.folder / SWEEP_NAME, tmp_path / "sweep")
    with pytest.raises(ConfigError, match="a sweep of another configuration or request"):
        run_sweep(tmp_path / "sweep", learning_rate=1e-5)
    (tmp_path / "sweep" / SWEEP_NAME).write_text('{"rungs": 3}')
    with pytest.raises(DamagedError, match=r"sweep\.json"):
        run_sweep(tmp_path / "sweep")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match="holds no sweep"):
        run_sweep(tmp_path / "other")


def test_without_a_validation_set_nothing_can_be_chosen(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    shutil.copy(DATA / "train.jsonl", tmp_path / "data")
    config = parse_config(example_settings(data=str(tmp_path / "data"), iters=40), source="")
    with pytest.raises(ConfigError, match="chosen by the loss on valid.jsonl"):
        sweep(config, tmp_path / "sweep", REQUEST)


@pytest.mark.parametrize(
    ("mean", "own", "corrected", "among", "is_better"),
    [
        (-0.1, (-0.15, -0.05), (-0.19, -0.01), 20, True),
        (-0.1, (-0.15, -0.05), (-0.21, 0.01), 20, False),  # better alone, not as the best of 20
        (-0.1, (-0.15, -0.05), None, 20, False),
        (-0.1, (-0.15, -0.05), None, 1, True),  # judged on examples that chose nothing
        (-0.004, (-0.005, -0.003), (-0.005, -0.003), 20, False),  # too little to be worth it
        (0.1, (0.05, 0.15), (0.05, 0.15), 20, False),
    ],
)
def test_a_winner_is_better_beyond_chance_luck_and_the_least_improvement(
    mean: float, own: tuple[float, float], corrected: Any, among: int, is_better: bool
) -> None:
    found = PairedDifference(20, mean, 0.02, *own)
    assert is_shown_better(SweepChoice(among, corrected, found), 0.005) == is_better


@pytest.mark.slow("trains two arms that are asked at every rung")
def test_answers_choose_and_are_compared_on_the_questions_that_judge(tmp_path: Path) -> None:
    task = {"name": "capitals", "file": str(DATA / "held_out.jsonl"), "score": "contains"}
    config = example_config(**CONFIG | {"learning_rate": 1e-5, "gate": {"tasks": [task]}})
    request = SweepRequest({"learning_rate": [2e-3]}, "capitals", steps=120)
    done = sweep(config, tmp_path / "sweep", request)
    record = done.record
    assert record.chosen == 1
    wrong = [arm.scores[record.rungs[0]] for arm in record.arms]
    assert all(score is not None and len(score) == 2 for score in wrong)
    assert done.answers is not None
    assert done.answers.mean == pytest.approx(done.verdict.tasks[0].candidate)
    assert done.is_better == (done.answers.low > 0)
    assert "of 15 answers are right" in done.summary()
