"""Questions that are asked while an adapter is trained, and what choosing a step by them costs."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import load

from nested_core.config.sections import TaskSection
from nested_core.errors import ConfigError, TrainingStopped
from nested_core.gate.checks.tasks import _select_judging_answers
from nested_core.measure.answers import questions_in_training
from nested_core.measure.answers.answer_bounds import judge_answers
from nested_core.measure.answers.questions_in_training import (
    QuestionsInTraining,
    choose_questions,
    lines_that_chose,
)
from nested_core.measure.answers.suite_answers import EncodedSuite, encode_suites, read_suites
from nested_core.pipeline import steps
from nested_core.records.answers import AnsweringRole, AnswerRecord, read_answers
from nested_core.records.dataset import PromptFormat
from nested_core.storage.adapter import read_adapter
from nested_core.training.training_state import TrainingState
from tests.example import DATA, MODEL, Finished, example_config, prepare, require_refused, train
from tests.left_out import slow_except

pytestmark = pytest.mark.slow("trains, and asks at each evaluation")

HELD_OUT = DATA / "held_out.jsonl"


def settings(file: Path = HELD_OUT, **changes: Any) -> dict[str, Any]:
    task = {"name": "capitals", "file": str(file), "score": "contains", "max_tokens": 8}
    return {
        "iters": 12,
        "steps_per_eval": 4,
        "nested": {"frequencies": [1]},
        "training": {"evaluate_tasks": ["capitals"], "select_by": "capitals"},
        "gate": {"tasks": [task]},
    } | changes


def write_suite(path: Path, count: int, copies: int = 1) -> Path:
    """A suite of so many prompts, those of the example again and again, each with its number.

    Each prompt is there `copies` times, the copies with other spaces and after all others.
    """
    rows = [json.loads(line) for line in HELD_OUT.read_text().splitlines()]
    lines = []
    for copy in range(copies):
        for n in range(count):
            row = rows[n % len(rows)]
            asked = f"{n}:{' ' * (copy + 1)}{row['messages'][0]['content']}"
            row = row | {"id": f"q{n} {copy}", "messages": [{"role": "user", "content": asked}]}
            lines.append(json.dumps(row))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize(
    ("count", "steps_of_run", "asked", "left_out"),
    [
        (15, 1000, 15, 0),  # too few for a part of their own: they choose and judge
        (31, 1000, 31, 0),
        (32, 1000, 8, 8),
        (100, 1000, 25, 25),
        (1000, 1000, 32, 32),
        (1000, 150, 16, 32),  # a short run asks fewer of those that a long one asks
        (1000, 10, 4, 32),
    ],
)
def test_a_quarter_of_a_suite_and_one_batch_at_most_is_asked_and_fewer_in_a_short_run(
    tmp_path: Path, count: int, steps_of_run: int, asked: int, left_out: int
) -> None:
    config = example_config(**settings(write_suite(tmp_path / "suite.jsonl", count)))
    (suite,) = read_suites(config.gate)
    lines = choose_questions(suite, steps_of_run)
    assert len(lines) == len(set(lines)) == asked
    chose = lines_that_chose(suite)
    assert len(chose) == left_out
    assert not chose or {*lines} <= chose


def test_answers_are_those_of_suites_that_there_are_and_choose_in_one_process() -> None:
    require_refused("capital is none of gate.tasks", training={"evaluate_tasks": ["capital"]})
    require_refused("neither loss nor among evaluate_tasks", training={"select_by": "capitals"})
    asked = {"evaluate_tasks": ["capitals"], "select_by": "capitals"}
    require_refused("chooses in one process", **settings(training=asked | {"processes": 2}))
    require_refused("offer is last", **settings(training=asked | {"offer": "last"}))


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    config = example_config(**settings())
    return train(config, prepare(config, tmp_path_factory.mktemp("asked") / "run"))


def test_the_step_with_the_most_right_answers_is_offered(asked: Finished) -> None:
    records = [r for r in asked.metrics() if "val_loss" in r]
    assert [r["step"] for r in records] == [0, 4, 8, 12]
    assert all(r["tasks"]["capitals"]["questions"] == 4 for r in records)
    assert all(r["task_seconds"] > 0 for r in records)
    candidates = [(1 - r["tasks"]["capitals"]["right"], r["val_loss"], r["step"]) for r in records]
    assert asked.result.adapter_step == min(candidates[1:])[2]


def test_right_answers_decide_and_the_loss_where_they_are_equal() -> None:
    state = TrainingState()
    evaluations = [(0.9, 0.1, 1), (0.5, 0.7, 2), (0.5, 0.6, 3), (0.2, math.nan, 4), (0.6, 0.0, 5)]
    for wrong, loss, step in evaluations:
        state.step = step
        state.record_evaluation(loss, is_candidate=True, wrong=wrong)
    assert (state.best_step, state.best_val_loss, state.best_wrong) == (3, 0.6, 0.5)
    assert TrainingState.from_json(state.to_json()).best_wrong == 0.5


class Killed(BaseException):
    """The process ends here: nothing catches it, and nothing is written any more."""


@pytest.mark.slow("trains three times")
@pytest.mark.parametrize(
    "ends_by", slow_except([TrainingStopped, Killed], Killed, reason="trains a run of its own")
)
def test_a_stop_or_a_kill_in_the_middle_of_asking_goes_on_to_the_same_run(
    asked: Finished, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends_by: type[BaseException]
) -> None:
    run = prepare(asked.config, tmp_path / "run")
    whole = EncodedSuite.answer
    asks: list[int] = []
    trainers: list[Any] = []

    def answer(self: EncodedSuite, model: Any, tokenizer: Any, told: Callable[[int], None]) -> Any:
        """At the third evaluation a stop is requested, or the end comes, after two answers."""
        asks.append(len(self.prompts))

        def tell(count: int) -> None:
            if len(asks) == 3 and count == 2:
                if ends_by is Killed:
                    raise Killed
                trainers[0].stop_training()
            told(count)

        return whole(self, model, tokenizer, tell)

    monkeypatch.setattr(EncodedSuite, "answer", answer)
    with pytest.raises(ends_by):
        train(asked.config, run, on_start=trainers.append)
    assert len(asks) == 3
    done = train(asked.config, run)
    assert read_adapter(run.adapter).tensors == read_adapter(asked.run.adapter).tensors
    timed = ("tokens_per_second", "iterations_per_second", "peak_memory_gb", "task_seconds")
    assert done.metrics(without=timed) == asked.metrics(without=timed)


@pytest.mark.parametrize(
    ("select_by", "asked"),
    [
        ("loss", [4, 2]),
        pytest.param("capitals", [4, 4], marks=pytest.mark.slow("trains a run that is asked")),
    ],
)
def test_where_asking_is_slow_fewer_are_asked_unless_answers_choose(
    tmp_path, monkeypatch, select_by, asked
) -> None:
    """A real base took 158 s for 30 answers, and one question was left to choose the step by."""
    ask = QuestionsInTraining.ask

    def slow(self: QuestionsInTraining, *given: Any) -> dict[str, Any]:
        """As if all had taken 20 seconds: twice the bound."""
        return ask(self, *given) | {"task_seconds": 20.0}

    monkeypatch.setattr(QuestionsInTraining, "ask", slow)
    training = {"evaluate_tasks": ["capitals"], "select_by": select_by}
    config = example_config(**settings(iters=4, training=training))
    done = train(config, prepare(config, tmp_path / "run"))
    counts = [r["tasks"]["capitals"]["questions"] for r in done.metrics() if "tasks" in r]
    assert counts == asked


@pytest.mark.slow("trains a run of its own, with questions")
def test_where_answers_only_show_they_are_asked_four_times_in_a_short_run(tmp_path: Path) -> None:
    watched = {"evaluate_tasks": ["capitals"]}
    config = example_config(**settings(iters=16, steps_per_eval=2, training=watched))
    done = train(config, prepare(config, tmp_path / "run"))
    evaluated = {r["step"]: "tasks" in r for r in done.metrics() if "val_loss" in r}
    assert [step for step, has_answers in evaluated.items() if has_answers] == [0, 4, 8, 12, 16]
    assert len(evaluated) == 9
    assert TrainingState.from_json(done.trainer.state.to_json()).asked_step == 16


@pytest.mark.slow("trains a run of its own, with questions")
def test_they_are_asked_at_the_evaluation_that_ends_training_early(tmp_path: Path) -> None:
    watched = {"evaluate_tasks": ["capitals"], "early_stop_patience": 1, "min_delta": 100.0}
    config = example_config(**settings(iters=80, steps_per_eval=2, training=watched))
    done = train(config, prepare(config, tmp_path / "run"))
    assert [r["step"] for r in done.metrics() if "tasks" in r] == [0, 4]  # else at steps 20, 40 ...


def test_questions_are_asked_at_evaluations_alone(tmp_path: Path) -> None:
    config = example_config(**settings(val_batches=0))
    with pytest.raises(ConfigError, match="questions are asked at evaluations"):
        train(config, prepare(config, tmp_path / "run"))


def test_questions_that_chose_judge_where_there_are_no_others_and_are_counted(asked) -> None:
    verdict = steps.judge(asked.config, asked.run)
    (task,) = verdict.tasks
    assert (task.questions, task.chosen_among) == (15, 3)
    assert "these questions also chose the step, among 3" in task.describe()
    rights = [r["tasks"]["capitals"]["right"] for r in asked.metrics() if "tasks" in r][1:]
    ties = rights.count(max(rights))  # among them the loss chose
    judged = verdict.validation
    assert judged is not None
    assert (judged.chosen_among, judged.selected_on_same_data) == (ties, ties > 1)


def test_a_prompt_and_the_chat_as_which_it_is_asked_are_one_question(asked, tmp_path) -> None:
    texts = [f"{n}?" for n in range(40)]
    system = {"role": "system", "content": "Be brief."}
    chats = [{"messages": [system, {"role": "user", "content": text}]} for text in texts]
    lines: list[dict[str, Any]] = [*({"prompt": text} for text in texts), *chats]
    path = tmp_path / "suite.jsonl"
    path.write_text("\n".join(json.dumps(line | {"expected": "a"}) for line in lines))
    config = example_config(**settings(path))
    tokenizer = load(str(MODEL))[1]
    rows = PromptFormat(system="Be brief.")
    encode = partial(encode_suites, tokenizer=tokenizer, base=MODEL, prompt_format=rows)
    (chosen,) = QuestionsInTraining.from_config(config, tokenizer, encode, 1000).suites
    chose = {question.line for question in chosen.suite.questions}
    assert len(chose) == len(set(chosen.prompts)) == 10
    assert chose <= set(range(1, 41))
    answers = [
        replace(records("candidate", [1.0], 1)[0], task="capitals", line=line)
        for line in range(1, 81)
    ]
    suites = [one.suite for one in encode(read_suites(config.gate))]
    judging = _select_judging_answers(answers, suites, config, asked.run)
    copies = {line + 40 for line in chose}
    assert {answer.line for answer in judging} == set(range(1, 81)) - chose - copies


def test_questions_that_chose_are_known_by_their_prompts_in_any_suite(asked, tmp_path) -> None:
    (capitals,) = asked.config.gate.tasks
    lines = Path(capitals.file).read_text().splitlines()
    others_lines = write_suite(tmp_path / "more.jsonl", 40).read_text().splitlines()
    (tmp_path / "copy.jsonl").write_text("\n".join(lines[:6]))
    (tmp_path / "mixed.jsonl").write_text("\n".join(lines[:6] + others_lines))
    others = [
        capitals.model_copy(update={"name": name, "file": str(tmp_path / f"{name}.jsonl")})
        for name in ("copy", "mixed")
    ]
    gate = asked.config.gate.model_copy(update={"tasks": (capitals, *others)})
    config = asked.config.model_copy(update={"gate": gate})
    suites = read_suites(gate)
    answers = [
        replace(records("candidate", [1.0], 1)[0], task=suite.name, line=question.line)
        for suite in suites
        for question in suite.questions
    ]
    judging = _select_judging_answers(answers, suites, config, asked.run)
    seen = Counter((answer.task, answer.chosen_among) for answer in judging)
    assert seen == {("capitals", 3): 15, ("copy", 3): 6, ("mixed", 1): 40}


@pytest.mark.slow("trains and judges a run of its own")
def test_questions_that_chose_do_not_judge_where_there_are_others(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(questions_in_training, "LARGEST_SHARE", 2)  # 40 questions: 20 and 20
    suite = write_suite(tmp_path / "suite.jsonl", 40, copies=2)
    config = example_config(**settings(suite, iters=4))
    run = prepare(config, tmp_path / "run")
    train(config, run)
    verdict = steps.judge(config, run)
    (read,) = read_suites(config.gate)
    judged = {r.line for r in read_answers(run.answers) if r.model == "candidate"}
    chose = lines_that_chose(read.without_copies)
    assert len(chose) == 20
    assert chose <= set(range(1, 41))
    assert judged == set(range(1, 81)) - chose - {line + 40 for line in chose}
    assert (verdict.tasks[0].questions, verdict.tasks[0].chosen_among) == (40, 1)


def records(model: AnsweringRole, scores: Sequence[float], among: int) -> list[AnswerRecord]:
    common: dict[str, Any] = {
        "tokens": 1,
        "empty": False,
        "endless": False,
        "repeated": False,
        "seconds": 0.0,
    }
    return [
        AnswerRecord("t", model, n + 1, f"q{n}", "a", score, **common, chosen_among=among)
        for n, score in enumerate(scores)
    ]


@pytest.mark.parametrize(("among", "is_failed"), [(1, False), (20, True)])
def test_a_gain_that_may_be_luck_of_the_choice_is_no_gain(among: int, is_failed: bool) -> None:
    task = TaskSection(name="t", file="t.jsonl", score="exact", min_gain=0.1)
    gate = example_config(gate={"tasks": [task]}).gate
    before, after = [0.0] * 30, [1.0] * 5 + [0.0] * 25
    answers = [*records("base", before, 1), *records("candidate", after, among)]
    (result,), reasons = judge_answers(gate, answers)
    assert bool(reasons) == is_failed
    assert result.chosen_among == among
    assert result.interval is not None
    assert (result.interval[0] <= 0) == is_failed
