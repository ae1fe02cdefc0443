"""Answers that training broke: found on sample prompts, and no promotion by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nested_core.config.sections import GateSection
from nested_core.data.data_settings import DataSettings
from nested_core.data.held_out_rows import read_held_out_prompts
from nested_core.errors import GateRejected
from nested_core.gate.checks.samples import find_damage, mark_same_answers
from nested_core.measure.answers.answer_bounds import judge_samples
from nested_core.models.generation import Answer, _count_repeated_tokens
from nested_core.pipeline import steps
from nested_core.pipeline.publishing import register_run
from nested_core.records.answers import BrokenHow, SampleAnswers
from nested_core.records.judged_run import read_judged_run
from nested_core.records.run_status import list_runs
from nested_core.report.outcome import describe_outcome
from nested_core.report.run_report import read_report
from nested_core.seams import is_there
from tests.core.registry.states import promote_by_policy
from tests.example import ANSWERS, Finished, train_example, train_until_answers_are_broken
from tests.gate_files import read_gate


class Words:
    """A tokenizer whose tokens are words."""

    def encode(self, text: str, **_: Any) -> list[str]:
        return text.split()


WORDS: Any = Words()


def answer(text: str, *, endless: bool = False) -> Answer:
    words = text.split()
    ids = [sorted(set(words)).index(word) for word in words]
    return Answer(text, len(words), endless, False, _count_repeated_tokens(ids))


@pytest.mark.parametrize(
    ("text", "endless", "expected", "damage"),
    [
        ("the the the the the the the the", True, "In Norway.", "repeated"),
        ("In Norway and so and so and so and so", True, "In Norway.", "repeated"),
        ("  ", False, "In Norway.", "empty"),
        ("a b c d e f g h", True, "In Norway.", "endless"),
        ("a b c d e f g", True, "In Norway.", None),  # not four times as long
        ("a b c d e f g h", False, "In Norway.", None),  # it ended
        ("a b c d e f g h", True, None, None),  # nobody knows how long it should be
        ("ha ha ha ha ha ha", False, "ha ha ha ha ha ha", None),  # what the data expects
        ("", False, "", None),
        ("one two three four five six seven ha ha ha ha ha ha", False, "x", None),  # below half
        ("A day day day day day day day day .", False, "In Norway.", "repeated"),  # and a full stop
        ("x x x x x y z z z z z", False, "In Norway.", None),  # neither row is half of it
        (".", False, "In Norway.", "no_words"),
        (" ....", False, None, "no_words"),
        ("B", False, "In Norway.", "no_words"),
        ("B", False, "C.", None),  # a choice that is wrong
        ("B", False, None, None),  # it may be one
        ("是", False, "不是", None),
        ("-", False, "+", None),
        (".,,..,.", False, "In Norway.", "no_words"),
        (". . .", True, "In Norway.", None),  # cut off before it can tell
        (". , . , , .", True, "In Norway.", "no_words"),
    ],
)
def test_how_an_answer_is_broken(text, endless, expected, damage) -> None:
    assert find_damage(answer(text, endless=endless), expected, WORDS) == damage


def rows(*pairs: tuple[BrokenHow | None, BrokenHow | None]) -> list[SampleAnswers]:
    return [SampleAnswers("p", None, "b", None, "a", "x:1", *pair) for pair in pairs]


def same(
    *rows: tuple[str, str | None, str], are_cut_off: bool = False, tokens: int = 8
) -> list[BrokenHow | None]:
    """How answers of "Hm." are broken, to prompts with what is expected and what the base said."""
    given = [SampleAnswers(p, e, b, None, "Hm.", "x:1") for p, e, b in rows]
    answers = [Answer("Hm.", tokens, are_cut_off, False)] * len(rows)
    return [row.adapter_broken for row in mark_same_answers(given, answers)]


def test_the_same_answer_to_different_prompts_is_broken_where_others_would_differ() -> None:
    assert same(("p", "A.", "b"), ("q", "B.", "b"), ("r", "C.", "b")) == ["same"] * 3
    assert same(("p", None, "a"), ("q", None, "b"), ("r", None, "c")) == ["same"] * 3


@pytest.mark.parametrize(
    "rows",
    [
        [("p", "A.", "a"), ("q", "B.", "b")],  # two may be chance
        [("p", "A.", "a"), ("p", "B.", "b"), ("q", "C.", "c")],  # two prompts
        [("p", "spam", "a"), ("q", "spam", "b"), ("r", "spam", "c")],  # a class: wrong, not broken
        [("p", "Hm.", "a"), ("q", "Ham.", "b"), ("r", "Ham.", "c")],  # right once
        [("p", None, "a"), ("q", None, "a"), ("r", None, "a")],  # the base did so
    ],
)
def test_one_answer_may_be_right_for_all(rows: list[tuple[str, str | None, str]]) -> None:
    assert same(*rows) == [None] * len(rows)


def test_answers_that_differ_in_one_are_not_the_same() -> None:
    rows = [
        SampleAnswers(p, p.upper(), "b", None, a, "x:1") for p, a in zip("pqr", "aab", strict=True)
    ]
    assert mark_same_answers(rows, [answer(row.adapter) for row in rows]) == rows


def test_answers_that_were_cut_off_are_compared_as_far_as_they_go() -> None:
    alike = (("p", "See A.", "b"), ("q", "See B.", "b"), ("r", "See C.", "b"))
    assert same(*alike) == ["same"] * 3
    assert same(*alike, are_cut_off=True) == [None] * 3  # they begin alike
    others = (("p", "A.", "b"), ("q", "B.", "b"), ("r", "C.", "b"))
    assert same(*others, are_cut_off=True) == ["same"] * 3
    assert same(*others, are_cut_off=True, tokens=6) == ["same"] * 3
    assert same(*others, are_cut_off=True, tokens=5) == [None] * 3  # only begun: "In", of all three
    assert same(*others, tokens=5) == ["same"] * 3  # short, and ended


SOUND, BROKEN = (None, None), (None, "repeated")


@pytest.mark.parametrize(
    ("pairs", "judged", "broken", "are_broken"),
    [
        ([BROKEN, BROKEN, SOUND], 3, 2, True),
        ([BROKEN, SOUND, SOUND], 3, 1, False),
        ([BROKEN, BROKEN, SOUND, SOUND], 4, 2, False),  # half is not most
        ([BROKEN, BROKEN], 0, 0, False),  # too few to judge
        ([BROKEN, BROKEN, ("empty", "repeated")], 0, 0, False),  # a base that is broken itself
        ([("endless", "endless")] * 3, 3, 0, False),  # no end before, no end after
        ([("endless", "repeated")] * 3, 3, 3, True),
        ([(None, "same")] * 3, 3, 3, True),
        ([("no_words", "no_words")] * 3, 0, 0, False),
        ([], 0, 0, False),
    ],
)
def test_most_answers_of_a_sound_base_have_to_be_broken(pairs, judged, broken, are_broken) -> None:
    found = judge_samples(rows(*pairs))
    assert (found.asked, found.judged, found.broken) == (len(pairs), judged, broken)
    assert found.are_broken is are_broken


@pytest.fixture(scope="module")
def destroyed(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Trained so that the loss falls and the model ends in one word for ever."""
    folder = tmp_path_factory.mktemp("destroyed")
    registry = {"path": str(folder / "registry"), "name": "capitals", "promote": "always"}
    return train_until_answers_are_broken(folder / "runs" / "one", registry=registry)


def test_a_destroyed_model_is_said_to_be_that_and_is_not_promoted_by_itself(destroyed) -> None:
    config, run = destroyed.config, destroyed.run
    verdict = steps.judge(config, run)
    assert verdict.validation is not None
    assert verdict.validation.conclusion == "better"  # the loss alone would have promoted it
    assert verdict.summary().startswith("passed, answers broken: ")
    (note,) = verdict.notes()
    assert verdict.samples is not None
    assert (verdict.samples.judged, verdict.samples.broken) == (3, 3)
    told = "3 of 3 sample answers are broken"
    assert note.startswith(f"{told} (")
    assert "do not promote it" in note
    (listed,) = list_runs(run.path.parent)
    assert describe_outcome(listed) == "Verified: passed, answers broken"
    page = read_report(run.path).to_html()
    assert "Verified: passed, answers broken" in page
    assert told in page

    version = register_run(config, read_judged_run(run.path), None).version
    refusal = f"{verdict.samples.describe()}: a person decides"
    assert promote_by_policy(config.registry, version, None).sentence == refusal
    if is_there("approval"):
        asked = config.registry.model_copy(update={"promote": "approve"})
        assert "waiting for approval" in str(promote_by_policy(asked, version, None))


def test_with_fail_broken_answers_are_a_reason(destroyed: Finished) -> None:
    strict = destroyed.config.model_copy(update={"gate": GateSection(samples="fail")})
    with pytest.raises(GateRejected, match=r"answers_broken: 3 of 3 sample answers are broken"):
        steps.judge(strict, destroyed.run)
    assert [r["code"] for r in read_gate(destroyed.run.gate)["reasons"]] == ["answers_broken"]


@pytest.mark.slow("trains and judges a run of its own")
def test_a_healthy_adapter_is_not_flagged(tmp_path: Path) -> None:
    done = train_example(tmp_path / "run", iters=30, training=ANSWERS)
    verdict = steps.judge(done.config, done.run)
    assert verdict.samples is not None
    assert (verdict.samples.asked, verdict.samples.judged, verdict.samples.broken) == (3, 3, 0)
    assert verdict.summary().startswith("passed, better loss; no questions asked: ")
    assert verdict.notes() == []
    answers = [json.loads(line) for line in done.run.sample_answers.read_text().splitlines()]
    assert [row["adapter_broken"] for row in answers] == [None] * 3


@pytest.mark.slow("trains and judges a run of its own")
def test_a_model_that_cannot_be_asked_is_no_verdict_and_under_fail_an_error(
    destroyed: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no cache for this model")

    monkeypatch.setattr("nested_core.gate.checks.samples.answer_prompts", fail)
    verdict = steps.judge(destroyed.config, destroyed.run)
    assert verdict.samples is not None
    assert verdict.samples.not_asked == "RuntimeError: no cache for this model"
    assert not verdict.broken_answers
    strict = destroyed.config.model_copy(update={"gate": GateSection(samples="fail")})
    with pytest.raises(Exception, match="no cache for this model"):
        steps.judge(strict, destroyed.run)


@pytest.mark.slow("asks two models for a dozen answers")
def test_more_prompts_are_asked_where_the_bases_own_answers_are_broken(
    destroyed: Finished, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = iter(["empty", "empty", None, *[None] * 20])
    monkeypatch.setattr("nested_core.gate.checks.samples.find_damage", lambda *_: next(found))
    verdict = steps.judge(destroyed.config, destroyed.run)
    assert verdict.samples is not None
    assert (verdict.samples.asked, verdict.samples.judged) == (5, 3)


@pytest.mark.parametrize(
    ("held_out", "file"),
    [("auto", "test"), ("test", "test"), ("valid", "valid"), ("kept.jsonl", "valid")],
)
def test_prompts_are_of_the_split_that_judges_and_test_is_not_read_for_another(
    tmp_path: Path, held_out: str, file: str
) -> None:
    for split in ("train", "valid", "test"):
        row = {"prompt": f"Of {split}?", "completion": "Yes."}
        (tmp_path / f"{split}.jsonl").write_text(json.dumps(row) + "\n")
    (prompt,) = read_held_out_prompts(DataSettings(str(tmp_path)), 3, held_out)
    assert (prompt.file, prompt.text) == (f"{file}.jsonl", f"Of {file}?")
