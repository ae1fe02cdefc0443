"""How often the gate refuses a suite whose answers were lost and won as planted, seed after seed.

`python -m benchmarks.planted_suites` prints the tables of answers lost and won in
benchmarks/gate.md, in some minutes; `--suites 100` is enough for a look. Texts are planted, and
everything after them is
the gate's own: they are scored, written to answers.jsonl, read back, and judged as `promote` does.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nested_core.config.sections import GateSection
from nested_core.measure.answers.answer_bounds import judge_answers
from nested_core.measure.answers.scorers import score_answers
from nested_core.measure.answers.suite_answers import Suite, read_suites
from nested_core.measure.answers.suites import question_label
from nested_core.records.answers import AnsweringRole, AnswerRecord, read_answers, write_answers

QUESTIONS = 200
SUITES = 1_000
RIGHT, WRONG = "The answer is yes.", "The answer is no."
NAME = "planted"


@dataclass(frozen=True)
class Exchange:
    """The chances that an answer is lost, and that one is won."""

    lost: float
    won: float


EXCHANGES = (
    Exchange(0.125, 0.025),
    Exchange(0.01, 0.01),
    Exchange(0.025, 0.025),
    Exchange(0.05, 0.05),
    Exchange(0.1, 0.1),
)
FIVE_POINTS = (
    Exchange(0.05, 0.0),
    Exchange(0.06, 0.01),
    Exchange(0.075, 0.025),
    Exchange(0.1, 0.05),
    Exchange(0.15, 0.1),
    Exchange(0.25, 0.2),
)


@dataclass(frozen=True)
class PlantedVerdict:
    """One suite with planted outcomes: how many answers were lost and won, and the gate's word."""

    lost: int
    won: int
    is_refused: bool


class PlantedSuite:
    """A suite of yes-or-no questions in a folder, judged with one set of bounds.

    folder: an existing folder, for the suite and for answers.jsonl.
    bounds: of the suite, and `noise` of the gate; by default those of a configuration without any.
    """

    def __init__(self, folder: Path, *, noise: str = "paired", **bounds: float | None) -> None:
        questions = folder / "questions.jsonl"
        lines = (
            json.dumps({"prompt": f"Question {number}?", "expected": "yes"})
            for number in range(QUESTIONS)
        )
        questions.write_text("\n".join(lines) + "\n", encoding="utf-8")
        task = {"name": NAME, "file": str(questions), "score": "contains"} | bounds
        self.gate = GateSection.model_validate({"tasks": [task], "noise": noise})
        self._answers = folder / "answers.jsonl"
        (self._suite,) = read_suites(self.gate)

    def judge(
        self, exchange: Exchange, seed: int, before: AnsweringRole = "base"
    ) -> PlantedVerdict:
        """Plant which answers are right before and after, and judge them.

        before: who gave the earlier answers. Answers of a champion are held against those of a
            candidate that has lost nothing of its base.
        """
        chances = np.random.default_rng(seed).random(QUESTIONS)
        is_lost = chances < exchange.lost
        is_won = ~is_lost & (chances < exchange.lost + exchange.won)
        is_right = {"base": ~is_lost, before: ~is_won, "candidate": ~is_lost}
        records = [
            record for role in is_right for record in _records_of(self._suite, role, is_right[role])
        ]
        write_answers(self._answers, records)
        _, reasons = judge_answers(self.gate, read_answers(self._answers))
        is_refused = any(reason.code == "task_regressed" for reason in reasons)
        return PlantedVerdict(int(is_lost.sum()), int(is_won.sum()), is_refused)


def _records_of(
    suite: Suite, role: AnsweringRole, is_right: np.ndarray[tuple[int], np.dtype[np.bool_]]
) -> Iterator[AnswerRecord]:
    texts = [RIGHT if right else WRONG for right in is_right]
    scores = score_answers(suite.method, suite.questions, texts)
    for question, text, score in zip(suite.questions, texts, scores, strict=True):
        yield AnswerRecord(
            task=suite.name,
            model=role,
            line=question.line,
            question=question_label(question),
            answer=text,
            score=score,
            tokens=5,
            empty=False,
            endless=False,
            repeated=False,
            seconds=0.01,
        )


def is_refused_by_mcnemar(verdict: PlantedVerdict) -> bool:
    """Whether McNemar's exact test finds more answers lost than won, at 5 %, both sides."""
    from scipy import stats  # takes a second, which whoever collects the tests need not wait

    exchanged = verdict.lost + verdict.won
    chance = stats.binomtest(verdict.lost, exchanged).pvalue if exchanged else 1.0
    return bool(chance < 0.05 and verdict.lost > verdict.won)


def print_table(suite: PlantedSuite, exchanges: Sequence[Exchange], suites: int) -> None:
    """A row an exchange: how often the gate refuses, and how often McNemar's exact test would."""
    print("| lost | won | refused by the gate | exact McNemar | in the first 100 seeds |")
    print("|---|---|---|---|---|")
    for exchange in exchanges:
        verdicts = [suite.judge(exchange, seed) for seed in range(suites)]
        refused = [verdict.is_refused for verdict in verdicts]
        exact = sum(map(is_refused_by_mcnemar, verdicts)) / suites
        print(
            f"| {exchange.lost:.1%} | {exchange.won:.1%} | {sum(refused) / suites:.1%} "
            f"| {exact:.1%} | {sum(refused[:100])} |",
            flush=True,
        )


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--suites", type=int, default=SUITES, help="seeds 0 to this, a row")
    suites = parser.parse_args().suites
    with tempfile.TemporaryDirectory() as folder:
        suite = PlantedSuite(Path(folder))
        for exchanges in (EXCHANGES, FIVE_POINTS):
            print_table(suite, exchanges, suites)


if __name__ == "__main__":
    main()
