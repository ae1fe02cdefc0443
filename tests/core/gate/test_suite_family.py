"""Suites against parent and champion as one family, on answers that are planted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from nested_core.config.sections import GateSection
from nested_core.measure.answers.answer_bounds import ScoreChange, conclude_answers, judge_answers
from nested_core.measure.losses.loss_figures import exchange_mid_p
from nested_core.records.answers import AnsweringRole, AnswerRecord


def answers_of(
    suite: str,
    before: Sequence[float],
    after: Sequence[float],
    *,
    champion: Sequence[float] | None = None,
    copies: int = 1,
) -> list[AnswerRecord]:
    """Answers of base and candidate, and of a champion, with these scores."""
    scores: dict[AnsweringRole, Sequence[float]] = {"base": before, "candidate": after}
    if champion is not None:
        scores["champion"] = champion
    return [
        AnswerRecord(
            suite, role, line, f"line {line}", "", score, 1, False, False, False, 0.0,
            same_prompt_as=None if (line - 1) % copies == 0 else line - (line - 1) % copies,
        )
        for role, own in scores.items()
        for line, score in enumerate(own, 1)
    ]  # fmt: skip


def gate_of(suites: int, **changes: Any) -> GateSection:
    tasks = [{"name": f"s{i}", "file": "q", "score": "exact"} | changes for i in range(suites)]
    return GateSection.model_validate({"tasks": tasks})


def losing(lost: int, won: int = 0, questions: int = 200) -> tuple[list[float], list[float]]:
    before = [1.0] * (questions - won) + [0.0] * won
    after = [0.0] * lost + [1.0] * (questions - lost)
    return before, after


def test_mid_p_is_half_the_chance_of_what_was_seen_and_all_of_what_is_more() -> None:
    assert exchange_mid_p(5, 0) == pytest.approx(1 / 64)
    assert exchange_mid_p(0, 0) == pytest.approx(0.5)
    assert exchange_mid_p(3, 1) == pytest.approx((1 + 4 / 2) / 16)
    assert exchange_mid_p(4_000, 3_900) == pytest.approx(0.13, abs=0.01)


@pytest.mark.parametrize(("suites", "is_refused"), [(1, True), (10, False)])
def test_what_one_suite_shows_is_chance_among_ten(suites: int, is_refused: bool) -> None:
    records = answers_of("s0", *losing(5))
    for number in range(1, suites):
        records += answers_of(f"s{number}", *losing(5, 5))
    results, reasons = judge_answers(gate_of(suites), records)
    assert [reason.code for reason in reasons] == ["task_regressed"] * is_refused
    assert results[0].conclusion == ("worse" if is_refused else "inconclusive")
    assert results[0].interval is not None
    assert results[0].interval[1] < 0


@pytest.mark.parametrize(("won", "is_refused"), [(2, True), (3, False)])
def test_suites_that_could_not_be_worse_are_not_counted(won: int, is_refused: bool) -> None:
    records = answers_of("s0", *losing(5, questions=20))
    for number in range(1, 30):  # all 4 that changed, lost, would be chance; all 5 would not
        records += answers_of(f"s{number}", *losing(2, won, questions=20))
    _, reasons = judge_answers(gate_of(30), records)
    assert [reason.code for reason in reasons] == ["task_regressed"] * is_refused


def test_many_small_suites_rarely_refuse_an_equal_adapter() -> None:
    random = np.random.default_rng(11)
    refused = 0
    for _ in range(200):
        family = []
        for _ in range(30):
            lost, won, _same = random.multinomial(20, [0.2, 0.2, 0.6])
            family.append(planted_change(int(lost), int(won)))
        refused += "worse" in conclude_answers(family)
    assert refused <= 10  # 2.5 % are 5


def test_of_many_equal_models_chance_makes_few_worse_and_few_better() -> None:
    random = np.random.default_rng(5)
    told = {"worse": 0, "better": 0}
    for _ in range(100):
        lost, won = random.multinomial(20, [0.15, 0.15, 0.7], size=20)[:, :2].T
        words = conclude_answers(list(map(planted_change, lost.tolist(), won.tolist())))
        for word in told:
            told[word] += word in words
    assert max(told.values()) <= 6  # 2.5 % are 2 or 3; each by itself made some 30


@pytest.mark.parametrize(("suites", "word"), [(1, "better"), (10, "no_worse")])
def test_what_one_suite_gained_is_chance_among_ten(suites: int, word: str) -> None:
    records = answers_of("s0", *losing(0, 5))
    for number in range(1, suites):
        records += answers_of(f"s{number}", *losing(5, 5))
    results, _ = judge_answers(gate_of(suites), records)
    assert results[0].conclusion == word


@cache
def changed_answers(lost: int, won: int) -> ScoreChange:
    records = answers_of("s0", *losing(lost, won, questions=20))
    return ScoreChange.compare(records[:20], records[20:])


def planted_change(lost: int, won: int) -> ScoreChange:
    """20 answers; a family is told apart by identity, so each is an object of its own."""
    return replace(changed_answers(lost, won))


@pytest.mark.parametrize(
    ("questions", "lost", "won", "word"),
    [(5, 4, 0, "inconclusive"), (10, 4, 0, "inconclusive"), (200, 7, 7, "no_worse")],
)
def test_answers_are_no_worse_only_where_as_many_were_won(questions, lost, won, word) -> None:
    records = answers_of("s0", *losing(lost, won, questions=questions))
    (result,), reasons = judge_answers(gate_of(1), records)
    assert (result.conclusion, reasons) == (word, [])
    (unbounded,), _ = judge_answers(gate_of(1, max_drop=None), records)
    assert unbounded.conclusion == word


def test_a_champion_that_answers_as_the_parent_is_no_second_rival() -> None:
    before, after = losing(5)
    alike = answers_of("s0", before, after, champion=before)
    assert len(judge_answers(gate_of(1), alike)[1]) == 1
    differs = answers_of("s0", before, after, champion=[*after[:-6], *[0.0] * 6])
    results, reasons = judge_answers(gate_of(1), differs)
    assert reasons == []  # 5 of 200 lost to the base is chance among two comparisons
    assert results[0].champion_difference == pytest.approx(6 / 200)


@pytest.mark.parametrize(
    ("max_drop", "lost", "word"),
    [(0.05, 5, "no_worse"), (0.05, 9, "worse"), (0.05, 4, "no_worse"), (0.01, 3, "inconclusive")],
)
def test_a_max_drop_above_0_is_a_margin(max_drop: float, lost: int, word: str) -> None:
    records = answers_of("s0", *losing(lost))
    (result,), reasons = judge_answers(gate_of(1, max_drop=max_drop), records)
    assert result.conclusion == word
    assert len(reasons) == (word == "worse")


def test_questions_with_one_prompt_are_one_question() -> None:
    before, after = losing(6, questions=60)
    (_,), reasons = judge_answers(gate_of(1), answers_of("s0", before, after))
    assert len(reasons) == 1
    (result,), reasons = judge_answers(gate_of(1), answers_of("s0", before, after, copies=6))
    assert reasons == []
    assert result.conclusion == "inconclusive"


def test_shares_are_compared_by_their_interval() -> None:
    random = np.random.default_rng(0)
    before = random.random(80)
    after = np.clip(before - 0.1 - 0.05 * random.random(80), 0, 1)
    (result,), reasons = judge_answers(
        gate_of(1), answers_of("s0", before.tolist(), after.tolist())
    )
    assert (result.conclusion, len(reasons)) == ("worse", 1)
    (result,), _ = judge_answers(gate_of(1), answers_of("s0", after.tolist(), before.tolist()))
    assert result.conclusion == "better"
    same = (before + 0.2 * (random.random(80) - 0.5)).clip(0, 1)
    (result,), reasons = judge_answers(gate_of(1), answers_of("s0", before.tolist(), same.tolist()))
    assert (result.conclusion, reasons) == ("no_worse", [])


@pytest.mark.slow("draws 25 families of ten suites")
def test_equal_adapters_are_rarely_refused_by_ten_suites() -> None:
    refused = 0
    for seed in range(25):
        random = np.random.default_rng(seed)
        records = []
        for number in range(10):
            base = (random.random(200) < 0.5).astype(float)
            champion, after = (np.abs(base - (random.random(200) < 0.1)) for _ in range(2))
            records += answers_of(
                f"s{number}", base.tolist(), after.tolist(), champion=champion.tolist()
            )
        refused += bool(judge_answers(gate_of(10), records)[1])
    assert refused <= 3
