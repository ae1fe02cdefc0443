"""`evaluate`: the gate's figures of any model, without training; exit 4 for a worse one."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection, TaskSection
from nested_core.errors import ConfigError
from nested_core.measure.answers.suite_answers import Suite, read_suites
from nested_core.measure.answers.suites import expected_label, read_suite
from nested_core.measure.losses.held_out_loss import LoadedBase
from nested_core.pipeline.finetune import finetune
from nested_core.rooms.evaluate import evaluating
from nested_core.rooms.evaluate.evaluating import evaluate
from nested_core.rooms.evaluate.page import AnsweredQuestion, EvaluatedModel, Evaluation, SuiteScore
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.document import Text, to_terminal
from nested_core.text.loss_format import format_loss
from tests.example import DATA, MODEL, example_config
from tests.flows.conftest import called
from tests.rooms.evaluate.conftest import CAPITALS, SUITES, Judged

pytestmark = pytest.mark.slow("trains runs, and asks their models")


@pytest.fixture(scope="module")
def bases() -> list[Path]:
    """The bases that `evaluation` loaded."""
    return []


@pytest.fixture(scope="module")
def evaluation(judged: Judged, bases: list[Path]) -> Evaluation:
    """Every form, beside the base, on both suites and the validation file."""

    def load(config: FineTuneConfig, **how: Any) -> LoadedBase:
        base = LoadedBase(**vars(original(config, **how)))
        bases.append(base.folder)
        return base

    original = LoadedBase.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LoadedBase, "load", load)
        return evaluate(
            [str(MODEL), *judged.forms.values()],
            suites=SUITES,
            data=DATA / "valid.jsonl",
            against=str(judged.run.initial),
            config=example_config(),
        )


def test_models_of_one_base_and_shape_share_one_that_is_loaded(evaluation, bases) -> None:
    assert len(evaluation.models) == 6
    assert bases == [MODEL]


def test_every_form_of_an_adapter_has_the_figures_of_its_verdict(judged, evaluation) -> None:
    before, base, *forms = evaluation.models
    validation = judged.verdict.validation
    assert validation is not None
    assert [model.name for model in forms] == list(judged.forms.values())
    for model in forms:
        for suite, task in zip(model.suites, judged.verdict.tasks, strict=True):
            assert (suite.suite, suite.questions) == (task.name, task.questions)
            assert (suite.score, suite.difference) == (task.candidate, task.difference)
            assert suite.interval == task.interval
            # One of 2 comparisons there and of 15 here, where it takes more to be shown.
            assert (suite.conclusion, task.conclusion) == ("no_worse", "better")
        assert model.loss is not None
        assert (model.loss.loss_before, model.loss.loss_after, model.loss.difference) == (
            validation.loss_before,
            validation.loss_after,
            validation.difference,
        )
        assert (model.loss.interval, model.loss.conclusion) == (
            validation.interval,
            validation.conclusion,
        )
    assert before.loss is not None
    assert base.loss is not None
    assert base.loss.loss_after == before.loss.loss_after == validation.loss_before
    assert [suite.score for suite in base.suites] == [task.base for task in judged.verdict.tasks]
    assert not evaluation.is_worse


def test_each_question_has_every_models_answer_beside_the_expected_one(judged, evaluation) -> None:
    assert len(evaluation.answers) == 2 * 15
    first = evaluation.answers[0]
    assert (first.suite, first.line, first.expected) == ("capitals", 1, "Bratislava")
    assert list(first.answers) == [model.name for model in evaluation.models]
    assert first.answers[str(judged.run.path)] == first.answers[judged.forms["mlx_lm"]]


def test_it_is_a_line_and_rows(judged: Judged, evaluation: Evaluation) -> None:
    assert repr(evaluation).endswith(f"against {judged.run.initial}: none worse)")
    rows = evaluation.rows()
    assert len(rows) == 6 * 3
    assert {row["measured"] for row in rows} == {"capitals", "again", str(DATA / "valid.jsonl")}
    assert len({tuple(row) for row in rows}) == 1  # the same columns everywhere
    assert all(not isinstance(value, (tuple, list, dict)) for row in rows for value in row.values())
    (loss,) = [row for row in rows if row["model"] == str(MODEL) and row["kind"] == "loss"]
    own = evaluation.models[1].loss
    assert own is not None
    assert (loss["value"], loss["examples"], loss["low"]) == (own.loss_after, 10, 0.0)


def test_its_page_and_its_lines_have_every_figure_and_answer(judged, evaluation) -> None:
    page = evaluation.to_html()
    assert page.count("<td>") >= 2 * 15 * 6  # each answer of each model
    assert "<script" not in page
    run = evaluation.models[2]
    assert run.loss is not None
    for text in (str(judged.run.path), "Bratislava", format_loss(run.loss.loss_after)):
        assert text in page
    lines = [part for block in evaluation.describe(2).blocks for part in to_terminal(block)]
    none_worse = f"none worse than {judged.run.initial}"  # losses are better, answers not
    assert lines[0] == f"{none_worse}; no better than one fixed answer: {MODEL}"
    tables = {part.caption: part for part in lines if not isinstance(part, str)}
    scored = "Right answers (score: contains), compared with A; one fixed answer: 0.067"
    assert scored in tables
    assert scored in page
    assert [row[0] for row in tables["Losses in nats/token, compared with A"].rows] == [*"ABCDEF"]
    wrong = [name for name in tables if name.startswith("The first")]
    assert wrong == ["The first 2 that B or C or D or E or F answered wrong"]
    assert evaluation._repr_html_().startswith("<div")


def test_text_of_a_model_is_no_markup_on_the_page(evaluation: Evaluation) -> None:
    first, *others = evaluation.answers
    answers = dict.fromkeys(first.answers, "<b>bold</b>")
    hostile = replace(evaluation, answers=(replace(first, answers=answers), *others))
    assert "<b>bold" not in hostile.to_html()
    assert "&lt;b&gt;bold" in hostile.to_html()


def test_what_is_significantly_worse_is_told_so(judged: Judged) -> None:
    found = evaluate(
        [judged.run.initial],
        suites=[CAPITALS.model_copy(update={"min": 0.5})],
        data=DATA / "valid.jsonl",
        against=judged.run.path,
    )
    _, worse = found.models
    assert worse.loss is not None
    assert worse.loss.conclusion == "worse"
    assert worse.suites[0].is_below_minimum
    assert found.is_worse
    headline = next(to_terminal(found.describe().blocks[0]))
    assert headline == f"worse than {judged.run.path}, or below a minimum: {judged.run.initial}"


def score_of(conclusion: str | None) -> SuiteScore:
    return SuiteScore("labels", "exact", 10, 0.5, conclusion=conclusion)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "headline"),
    [
        (["better"], "better than base: b"),
        (["better", "better"], "better than base: b, c"),
        (["better", "no_worse"], "none worse than base, better: b"),
        (["inconclusive"], "none worse than base"),
    ],
)
def test_the_headline_says_better_where_all_are(words: list[str], headline: str) -> None:
    others = [
        EvaluatedModel(name, (score_of(word),), None)
        for name, word in zip("bc", words, strict=False)
    ]
    base = EvaluatedModel("base", (score_of(None),), None)
    found = Evaluation("base", (base, *others), ())
    assert next(to_terminal(found.describe().blocks[0])) == headline
    shown = [part for block in found.describe().blocks for part in to_terminal(block)]
    verdicts = {row[-1] for part in shown if not isinstance(part, str) for row in part.rows}
    assert {word.replace("_", " ") for word in words} <= verdicts


def test_what_only_the_reference_got_wrong_is_not_listed_and_an_expected_answer_is_whole(
    tmp_path: Path,
) -> None:
    expected = {"category": "billing", "priority": "high", "language": "en"}
    suite = tmp_path / "labels.jsonl"
    row = {"prompt": "Ticket", "expected": expected, "schema": {}}
    suite.write_text(json.dumps(row) + "\n")
    (question,) = read_suite(suite, "json")
    label = expected_label(question)
    assert label == json.dumps(expected)
    models = [EvaluatedModel(name, (score_of(None),), None) for name in ("base", "b")]
    asked = [
        AnsweredQuestion("labels", line, f"line {line}", label, {"base": "?", "b": "!"}, scores)
        for line, scores in enumerate([{"base": 0.0, "b": 1.0}, {"base": 1.0, "b": 0.0}], 1)
    ]
    found = Evaluation("base", tuple(models), tuple(asked))
    lines = [part for block in found.describe().blocks for part in to_terminal(block)]
    (table,) = [p for p in lines if not isinstance(p, str) and p.caption.startswith("The first")]
    assert table.caption == "The first 1 that B answered wrong"
    assert [tuple(row[:2]) for row in table.rows] == [("line 2", label)]


def test_examples_that_a_model_was_trained_on_are_left_out(judged: Judged, tmp_path: Path) -> None:
    data = tmp_path / "mixed.jsonl"
    trained = (DATA / "train.jsonl").read_text().splitlines()[:3]
    data.write_text("\n".join([*trained, (DATA / "valid.jsonl").read_text()]))
    found = evaluate([judged.run.path], data=data)
    assert found.unknown == ()
    loss = found.models[1].loss
    assert loss is not None
    assert (loss.examples, loss.left_out) == (10, 3)
    assert np.isfinite(loss.loss_after or np.nan)


def test_where_every_example_was_trained_on_or_nobody_knows_the_page_says_so(
    judged: Judged, tmp_path: Path
) -> None:
    data = tmp_path / "trained.jsonl"
    data.write_text("\n".join((DATA / "train.jsonl").read_text().splitlines()[:6]))
    page = str(evaluate([judged.run.path], data=data).describe())
    assert "no example left" in page
    assert "not finite" not in page
    found = evaluate([judged.forms["mlx_lm"]], data=data)
    assert found.unknown == (judged.forms["mlx_lm"],)
    assert f"is not recorded, and not left out: {judged.forms['mlx_lm']}" in str(found.describe())


def test_a_base_alone_is_compared_with_nothing(judged: Judged, tmp_path, monkeypatch) -> None:
    suite = CAPITALS.model_copy(update={"min": 1.0})
    alone = evaluate([str(MODEL)], suites=[suite], data=DATA / "valid.jsonl")
    assert [model.name for model in alone.models] == [str(MODEL)]
    page = str(alone.describe())
    assert "below a minimum" in page
    assert alone.is_worse, "a bound is for what was asked for"
    assert "compared with" not in page
    losses = str(evaluate([str(MODEL)], data=DATA / "valid.jsonl").describe())
    assert "nothing is compared" in losses
    assert "worse" not in losses
    beside = evaluate([str(MODEL), judged.run.path], data=DATA / "valid.jsonl")
    assert [model.name for model in beside.models] == [str(MODEL), str(judged.run.path)]


@pytest.mark.parametrize("is_json", [False, True])
def test_where_no_run_says_how_rows_are_read_prompts_count_and_that_is_said(
    judged: Judged, is_json: bool
) -> None:
    asked = ("--data", DATA / "valid.jsonl", *(["--json"] if is_json else []))
    known = called("evaluate", judged.run.path, *asked, cwd=judged.folder)
    done = called("evaluate", MODEL, *asked, cwd=judged.folder)
    said = [
        " ".join(one.document["notes"]) if is_json else " ".join(one.stdout.split())
        for one in (known, done)
    ]
    assert ["prompts, where rows have them, count in the losses too" in text for text in said] == [
        False,
        True,
    ]


def test_a_model_in_a_folder_named_base_is_not_taken_for_the_base_that_it_is_compared_with(
    judged: Judged, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(MODEL, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    found = evaluate(["base"], data=DATA / "valid.jsonl", base_model=str(MODEL))
    assert [model.name for model in found.models] == [f"base {MODEL}", "base"]


@pytest.mark.parametrize(
    ("models", "options", "message"),
    [
        (["none"], {}, "is neither a run directory"),
        ([str(n) for n in range(26)], {"data": "none.jsonl"}, "at most 25 models at once"),
        ([str(MODEL), str(MODEL)], {"data": DATA / "valid.jsonl"}, "named twice"),
        ([str(MODEL)], {}, "nothing to ask"),
        ([str(MODEL)], {"suites": [{"file": "a.jsonl", "score": "guess"}]}, "score"),
        ([str(MODEL)], {"data": "none.jsonl"}, "none.jsonl is not a file"),
    ],
)
def test_what_cannot_be_evaluated_is_refused(models, options, message) -> None:
    with pytest.raises(ConfigError, match=message):
        evaluate(models, **options)


def test_an_adapter_of_another_base_is_refused(judged: Judged, tmp_path: Path) -> None:
    other = Path(shutil.copytree(MODEL, tmp_path / "other"))
    config = json.loads((other / "config.json").read_bytes())
    (other / "config.json").write_text(json.dumps(config | {"note": "another"}))
    with pytest.raises(ConfigError, match="does not fit"):
        evaluate([judged.run.adapter], base_model=str(other), data=DATA / "valid.jsonl")


@pytest.mark.parametrize(
    ("words", "score", "most_tokens"),
    [
        ((), "exact", 1),
        (("--max-tokens", 2), "exact", 2),
        (("--score", "contains"), "contains", 64),
        (("--score", "exact"), "exact", 64),
    ],
)
def test_the_runs_own_suite_is_asked_and_scored_as_the_gate_did(
    judged: Judged, tmp_path: Path, monkeypatch, words, score, most_tokens
) -> None:
    asked: list[TaskSection] = []

    def read(gate: GateSection) -> tuple[Suite, ...]:
        asked.extend(gate.tasks)
        return read_suites(gate)

    monkeypatch.setattr(evaluating, "read_suites", read)
    run = Path(shutil.copytree(judged.run.path, tmp_path / "run"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["gate"]["tasks"][0] |= {"score": "exact", "max_tokens": 1, "min": 1.0}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    file = os.path.relpath(DATA / "held_out.jsonl", tmp_path)
    done = called("evaluate", run, "--suite", file, *words, "--json", cwd=tmp_path)
    assert done.code == 0, done.stderr  # the bound is that of the command, which has none
    assert {s["scored_by"] for m in done.document["models"] for s in m["suites"]} == {score}
    assert {(task.score, task.max_tokens) for task in asked} == {(score, most_tokens)}


def test_the_command_ends_with_4_for_a_worse_one_and_prints_the_same(judged, evaluation) -> None:
    words = ("--suite", DATA / "held_out.jsonl", "--max-tokens", 16, "--json")
    files = (*words, "--data", DATA / "valid.jsonl")
    against = ("--against", judged.run.initial)
    page = judged.folder / "page.html"
    done = called("evaluate", judged.run.path, *against, *files, "-o", page, cwd=judged.folder)
    assert done.code == 0
    assert f"better than {judged.run.initial}" in page.read_text()
    assert done.document["models"][1]["loss"] == json.loads(
        json.dumps(evaluation.to_json()["models"][2]["loss"])
    )
    back = ("--against", judged.run.path)
    assert called("evaluate", judged.run.initial, *back, *files, cwd=judged.folder).code == 4


def test_a_run_is_evaluated_from_another_folder_and_data_alone_asks_no_questions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    project = tmp_path / "project"
    shutil.copytree(MODEL, project / "base")
    shutil.copyfile(DATA / "held_out.jsonl", tmp_path / "project" / "questions.jsonl")
    monkeypatch.chdir(project)
    suite = CAPITALS.model_dump() | {"file": "questions.jsonl", "score": "exact"}
    gate, registry = {"tasks": [suite]}, {"path": "registry", "name": "capitals"}
    config = example_config(model="base", iters=4, gate=gate, registry=registry)
    run = RunDirectory(Path("run"))
    run.path.mkdir()
    version = finetune(config, run).version
    monkeypatch.chdir(tmp_path)
    for what in ("project/run", f"project/registry/capitals@{version}"):
        found = evaluate([what])
        assert [one.scored_by for one in found.models[1].suites] == ["exact"]
        assert found.models[1].suites[0].constant == pytest.approx(1 / 15)
        (project / "questions.jsonl").rename(project / "away")
        assert evaluate([what], data=DATA / "valid.jsonl").models[1].suites == ()
        (project / "away").rename(project / "questions.jsonl")


def test_answers_no_better_than_one_fixed_answer_are_never_a_green_headline() -> None:
    base, other = (
        EvaluatedModel(name, (replace(score_of(word), score=0.0, constant=0.1),), None)
        for name, word in (("base", None), ("b", "no_worse"))
    )
    headline = Evaluation("base", (base, other), ()).describe().blocks[0]
    assert isinstance(headline, Text)
    assert headline.tone == "warn"
    assert headline.text == "none worse than base; no better than one fixed answer: b"


@pytest.mark.parametrize(
    ("constant", "word"), [(0.4, "better"), (0.5, "better than A, no better than one fixed answer")]
)
def test_a_suites_cell_says_that_one_fixed_answer_is_as_good(constant: float, word: str) -> None:
    base, other = (
        EvaluatedModel(name, (replace(score_of(conclusion), constant=constant),), None)
        for name, conclusion in (("base", None), ("b", "better"))
    )
    blocks = Evaluation("base", (base, other), ()).describe().blocks
    lines = [part for block in blocks for part in to_terminal(block)]
    (table,) = [
        one for one in lines if not isinstance(one, str) and one.caption.startswith("Right")
    ]
    assert [row[-1] for row in table.rows] == ["", word]
