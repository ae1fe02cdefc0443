"""gate.tasks: what a model answers is judged too, from the first line of a suite to promotion."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from flows.flow_runs.allowed_folders import with_trusted_code
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import GateSection
from nested_core.errors import ConfigError, DamagedError, DatasetError, GateRejected
from nested_core.gate.judge import run_gate_checks
from nested_core.measure.answers.answer_bounds import judge_answers
from nested_core.pipeline import steps
from nested_core.records.answers import AnsweringRole, AnswerRecord
from nested_core.records.verdict_file import read_verdict
from nested_core.registry import read_verified_version
from nested_core.storage.atomic import digest_answer, digest_json
from nested_core.storage.canary_file import CANARY_NAME, parse_canary
from nested_core.storage.run_directory import RunDirectory
from tests.builders.candidates import Candidate, train_candidate
from tests.builders.data_sets import write_lines
from tests.builders.registering import register
from tests.builders.suites import KNOWN, WRONG, note_who_is_asked, task, write_suite
from tests.core.gate.pairs import codes
from tests.example import example_config, prepare, require_refused
from tests.left_out import needs_rooms


def with_tasks(config: FineTuneConfig, *tasks: dict[str, Any]) -> FineTuneConfig:
    return config.model_copy(update={"gate": GateSection.model_validate({"tasks": tasks})})


@pytest.fixture(scope="module")
def broken(tmp_path_factory: pytest.TempPathFactory) -> Candidate:
    """A run that was trained on one wrong capital for every country: its loss falls."""
    folder = tmp_path_factory.mktemp("broken")
    for name, countries in (("train", KNOWN[:14]), ("valid", KNOWN[14:20])):
        rows = [{"text": f"The capital of {country} is {WRONG}."} for country, _ in countries]
        write_lines(folder / "data" / f"{name}.jsonl", rows)
    gate = {"tasks": [task(write_suite(folder / "suite.jsonl"))]}
    changes: dict[str, Any] = {"data": str(folder / "data"), "iters": 60, "mask_prompt": False}
    return train_candidate(folder / "run", **changes, gate=gate)


@pytest.fixture(scope="module")
def answers_of_broken(broken: Candidate) -> Sequence[AnswerRecord]:
    """What base and candidate answer to its suite."""
    return run_gate_checks(broken.config, broken.run).answers


@pytest.mark.claim("A significantly worse adapter (loss, answers) passes only within set limits")
def test_a_run_that_lowers_its_loss_and_breaks_its_answers_is_refused(broken: Candidate) -> None:
    with pytest.raises(
        GateRejected, match=r"task_regressed \(capitals\): capitals: (\d+) of 20 right before"
    ):
        broken.judge()
    gate = broken.gate
    assert gate["validation"]["loss_after"] < gate["validation"]["loss_before"]
    (reason,) = gate["reasons"]
    assert reason["code"] == "task_regressed"
    named = [country for country, _ in KNOWN[-20:] if country in reason["message"]]
    assert len(named) == 3
    assert "docs/gate.md#task_regressed" in reason["message"]
    (result,) = gate["tasks"]
    assert result["verdict"] == "failed"
    assert result["questions"] == 20
    assert result["base"] >= 0.9
    assert result["candidate"] <= 0.2
    assert result["parent"] is None
    assert result["difference"] == pytest.approx(result["candidate"] - result["base"])
    low, high = result["interval"]
    assert low <= result["difference"] <= high < 0


def test_one_answer_to_every_question_is_broken_whatever_the_bounds(broken: Candidate) -> None:
    suites = [task(Path(each.file), max_drop=None) for each in broken.config.gate.tasks]
    verdict = steps.judge(with_tasks(broken.config, *suites), broken.run)
    assert verdict.tasks[0].same_answer == digest_json(f"{WRONG}.")[:3]  # proves no guess
    assert WRONG not in json.dumps(verdict.to_json())  # which versions keep, readable by all
    assert verdict.summary().startswith("passed, answers broken: ")
    *_, note = verdict.notes()
    assert note.startswith("capitals: all 20 answers are the same")
    assert "do not promote it, but train longer" in note
    strict = with_tasks(broken.config, *suites)
    gate = strict.gate.model_copy(update={"samples": "fail"})
    with pytest.raises(GateRejected, match="answers_broken: capitals: "):
        steps.judge(strict.model_copy(update={"gate": gate}), broken.run)


@pytest.mark.slow("answers every question with each model")
def test_every_answer_of_every_model_is_in_the_run(broken, answers_of_broken) -> None:
    records = [asdict(record) for record in answers_of_broken]
    with pytest.raises(GateRejected):
        broken.judge()
    written = [json.loads(line) for line in broken.run.answers.read_text().splitlines()]
    assert [r | {"seconds": 0} for r in written] == [r | {"seconds": 0} for r in records]
    assert [r["model"] for r in records] == ["base"] * 20 + ["candidate"] * 20
    assert all(
        WRONG in r["answer"] for r in records if r["model"] == "candidate" and not r["score"]
    )
    assert all(r["seconds"] >= 0 for r in records)


@pytest.mark.parametrize(
    ("bounds", "expected"),
    [
        ({"max_drop": None}, []),
        ({"max_drop": None, "min": 0.5}, ["task_below"]),
        ({"max_drop": None, "min_gain": 0.1}, ["task_below"]),
        ({"max_drop": 1.0}, []),
        ({"min": 0.5}, ["task_below", "task_regressed"]),
    ],
)
def test_the_bounds_of_a_suite(answers_of_broken, bounds, expected) -> None:
    gate = GateSection.model_validate({"tasks": [task(Path("suite.jsonl"), **bounds)]})
    _, reasons = judge_answers(gate, answers_of_broken)
    assert [reason.code for reason in reasons] == expected


def test_what_was_judged_is_judged_again_without_a_model_at_promotion(broken, tmp_path) -> None:
    bounds = task(Path(broken.config.gate.tasks[0].file), max_drop=None)
    copied = broken.copy(tmp_path / "run").resumed(tasks=[bounds])
    verdict = copied.judge()
    assert "; capitals: " in verdict.summary()
    written = copied.gate
    assert json.loads(json.dumps(read_verdict(copied.run.gate).to_json())) == written
    assert written["tasks"] == json.loads(json.dumps(verdict.to_json()))["tasks"]
    copied.confirm()
    answers = copied.run.answers.read_bytes()
    copied.run.answers.write_bytes(answers.replace(b'"score":0.0', b'"score":1.0', 1))
    copied.require_damaged(r"not given on the answers\.jsonl")
    copied.run.answers.unlink()
    copied.require_damaged(r"answers\.jsonl")


def test_a_suite_is_checked_before_the_first_step(tmp_path: Path) -> None:
    config = with_tasks(example_config(), task(tmp_path / "missing.jsonl"))
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ConfigError, match=r"missing\.jsonl is not a file"):
        steps.write_run_config(config, run, resume=False)
    bad = write_lines(tmp_path / "bad.jsonl", [{"prompt": "a", "expected": "b"}, {"prompt": 1}, []])
    with pytest.raises(DatasetError, match=r"(?s)bad\.jsonl:2: .*bad\.jsonl:3: "):
        steps.write_run_config(with_tasks(config, task(bad)), run, resume=False)
    assert not run.path.exists()


def test_a_prompt_that_the_model_cannot_take_is_said_before_the_first_step(tmp_path: Path) -> None:
    line = {"prompt": "one " * 3000, "expected": "b"}
    config = with_tasks(example_config(), task(write_lines(tmp_path / "long.jsonl", [line])))
    with pytest.raises(DatasetError, match=r"long\.jsonl:1: .*tokens or more, and the model sees"):
        prepare(config, tmp_path / "run")


def test_a_suite_that_changed_since_the_run_began_is_refused(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.jsonl")
    config = with_tasks(example_config(), task(suite))
    run = prepare(config, tmp_path / "run")
    steps.write_run_config(config, run, resume=True)
    write_suite(suite, count=10)
    with pytest.raises(ConfigError, match=r"suite\.jsonl changed since .*suites\.json"):
        steps.write_run_config(config, run, resume=True)
    steps.write_run_config(with_tasks(config, task(suite, name="others")), run, resume=True)


@needs_rooms("scorers")
def test_a_scorer_that_fails_gives_no_verdict_and_loses_nothing(
    candidate: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_scorer.py").write_text("def score(answer, question): raise ValueError('no')")
    monkeypatch.chdir(tmp_path)
    suite = write_suite(tmp_path / "suite.jsonl", count=2)
    scored = task(suite, name="own", score="python", function="own_scorer:score", max_tokens=2)
    with pytest.raises(DatasetError, match="own_scorer:score: .*ValueError: no"):
        candidate.bounded(tasks=[scored], allow_python_scorers=True).judge()
    assert not candidate.run.gate.exists()


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ([{"score": "python", "function": "a:b"}], "a:b, which would run with your rights"),
        ([{"score": "python"}], "python needs a function"),
        ([{"function": "a:b"}], "no other score has one"),
        ([{}, {}], "two have the name capitals"),
        ([{"tolerance": 1.0}], "compares no numbers"),
        ([{"score": "vibes"}], r"gate\.tasks\.0\.score: Input should be"),
        ([{"min": 2}], r"gate\.tasks\.0\.min: Input should be"),
    ],
)
def test_a_task_that_makes_no_sense_is_refused(tasks: list[dict[str, Any]], message: str) -> None:
    entries = [task(Path("suite.jsonl"), **changes) for changes in tasks]
    require_refused(message, gate={"tasks": entries})


def test_no_parameter_of_a_flow_lets_python_functions_run() -> None:
    gate = GateSection(allow_python_scorers=True)
    with pytest.raises(ConfigError, match="a flow takes it from no parameter"):
        with_trusted_code(example_config().model_copy(update={"gate": gate}))


@pytest.mark.slow("trains and judges a run of its own")
def test_a_run_that_went_on_from_an_adapter_is_compared_with_it_and_pays_for_itself_alone(
    broken: Candidate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(broken.run.adapter / "adapters.safetensors")
    settings = broken.config.model_dump() | {"resume_adapter_file": file, "iters": 4}
    config = FineTuneConfig.model_validate(settings)
    done = train_candidate(tmp_path / "run", config)
    asked = note_who_is_asked(tmp_path, monkeypatch)
    results = [done.verdict().tasks[0] for _ in range(2)]
    assert asked == ["capitals"] * 4  # base, parent and candidate; then the candidate alone
    for result in results:
        assert result.base >= 0.9
        assert result.parent is not None
        assert result.parent <= 0.2
        assert result.difference == pytest.approx(result.candidate - result.parent)
        assert result.verdict == "passed"
    assert replace(results[0], seconds={}) == replace(results[1], seconds={})


@pytest.mark.slow("trains and judges a run of each kind")
@pytest.mark.parametrize("kind", ["dora", "full"])
def test_other_kinds_of_adapters_begin_as_the_base_too(tmp_path: Path, kind: str) -> None:
    suite = write_suite(tmp_path / "suite.jsonl", count=5)
    rows = [{"text": f"The capital of {country} is {capital}."} for country, capital in KNOWN[:4]]
    write_lines(tmp_path / "data" / "train.jsonl", rows)
    changes: dict[str, Any] = {"data": str(tmp_path / "data"), "mask_prompt": False}
    gate = {"tasks": [task(suite)]}
    done = train_candidate(tmp_path / "run", fine_tune_type=kind, iters=4, gate=gate, **changes)
    (result,) = done.verdict().tasks
    assert result.parent is None
    assert result.base == 1.0


@pytest.mark.slow("trains and judges a run of its own")
def test_answers_of_suites_marked_canary_are_recorded_bound_and_registered(
    candidate: Candidate, tmp_path: Path
) -> None:
    suite = write_suite(tmp_path / "suite.jsonl", count=25)
    marked = task(suite, name="marked", canary=True, max_drop=None)
    unmarked = task(suite, name="unmarked", max_drop=None)
    candidate = candidate.resumed(tasks=[marked, unmarked])
    candidate.judge()
    canary = parse_canary(candidate.run.canary.read_bytes(), candidate.run.canary)
    assert {question.suite for question in canary.questions} == {"marked"}
    assert [question.line for question in canary.questions] == list(range(1, 21))  # at most 20
    candidate.confirm()
    version = register(candidate.run.path, tmp_path / "registry", "capitals", {})
    read = read_verified_version(tmp_path / "registry", "capitals", version)
    assert read.canary == canary
    (kept,) = tmp_path.rglob(f"versions/*/{CANARY_NAME}")
    assert kept.stat().st_mode & 0o007 == 0  # questions, not for all users
    content = candidate.run.canary.read_bytes()
    candidate.run.canary.write_bytes(content.replace(b'"line": 3', b'"line": 4'))
    candidate.require_damaged(r"not given on the canary\.jsonl")
    candidate.run.canary.write_bytes(content)
    candidate.bounded(tasks=[unmarked]).judge()
    assert not candidate.run.canary.exists()


def test_fewer_questions_than_an_interval_needs_are_judged_by_the_bound_alone(
    broken: Candidate, tmp_path: Path
) -> None:
    suite = write_suite(tmp_path / "suite.jsonl", count=3)
    verdict = broken.bounded(tasks=[task(suite, name="few")]).verdict()
    assert codes(verdict) == ["task_regressed"]
    assert "0 of 3 after, too few questions to detect a drop" in verdict.reasons[0].message
    assert verdict.tasks[0].interval is None


def test_a_drop_that_chance_could_bring_is_no_regression_unless_noise_is_none() -> None:
    scores: dict[AnsweringRole, list[float]] = {"base": [1.0] * 10, "candidate": [1.0] * 9 + [0.0]}
    records = [
        AnswerRecord("capitals", role, line, f"line {line}", "", score, 1, False, False, False, 0.0)
        for role, given in scores.items()
        for line, score in enumerate(given, start=1)
    ]
    gate = GateSection.model_validate({"tasks": [task(Path("suite.jsonl"))]})
    (result,), reasons = judge_answers(gate, records)
    assert not reasons
    assert result.verdict == "passed"
    strict = gate.model_copy(update={"noise": "none"})
    (result,), reasons = judge_answers(strict, records)
    assert [reason.code for reason in reasons] == ["task_regressed"]
    assert result.verdict == "failed"
    assert "1 lost: line 10" in reasons[0].message
    with pytest.raises(DamagedError, match="the answers to capitals are not all there"):
        judge_answers(gate, records[:-1])


@pytest.mark.parametrize(
    ("given", "same"),
    [
        (["billing"] * 10, None),  # four are wrong: that may be chance
        (["shipping"] * 9 + ["shipping "], "shipping"),
        (["billing"] + ["shipping"] * 9, None),
    ],
)
def test_equal_answers_are_broken_where_five_of_them_are_wrong(given, same) -> None:
    right = ["billing"] * 6 + ["shipping"] * 4
    roles: dict[AnsweringRole, list[str]] = {"base": right, "candidate": given}
    records = [
        AnswerRecord(
            *("capitals", role, line, f"line {line}", answer, float(answer == expected)),
            *(1, False, False, False, 0.0),
        )
        for role, answers in roles.items()
        for line, (answer, expected) in enumerate(zip(answers, right, strict=True), start=1)
    ]
    gate = GateSection.model_validate({"tasks": [task(Path("suite.jsonl"))]})
    ((result,), _) = judge_answers(gate, records)
    assert result.same_answer == (same and digest_answer(same))
    assert result.describe_cut() is None


@pytest.mark.parametrize(
    ("tokens", "ended", "right", "same", "is_told"),
    [
        (3, 0, 0, None, True),  # as a max_tokens of 3 cuts each "Go and see"
        (3, 1, 0, "shipping", False),
        (8, 0, 0, "shipping", True),
        (3, 0, 10, None, False),  # each has said what is right before it was cut
    ],
)
def test_answers_that_are_all_cut_off_early_are_told_and_not_called_equal(
    tokens: int, ended: int, right: int, same: str | None, is_told: bool
) -> None:
    scores: dict[AnsweringRole, float] = {"base": 0.0, "candidate": right / 10}
    records = [
        AnswerRecord(
            *("capitals", role, line, f"line {line}", "shipping", score),
            *(tokens, False, line > ended, False, 0.0),
        )
        for role, score in scores.items()
        for line in range(1, 11)
    ]
    gate = GateSection.model_validate({"tasks": [task(Path("suite.jsonl"))]})
    ((result,), _) = judge_answers(gate, records)
    assert result.same_answer == (same and digest_answer(same))
    cut = "capitals: all 10 answers were cut off at its max_tokens"
    assert (result.describe_cut() or "").startswith(cut) == is_told
    assert replace(result, base=1.0, candidate=1.0).describe_cut() is None
    worse = replace(
        result, base=0.0, candidate=0.5, parent=1.0
    )  # than the adapter that training started from
    assert (worse.describe_cut() or "").startswith(cut) == (ended == 0)
