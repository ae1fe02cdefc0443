"""The control of a lookup: what a search in the training rows, without any model, answers.

Each held-out question gets the answer of the training row whose words are most alike, rare words
counting most. Where that is nearly always right, held-out rows have siblings in train (articles,
customers, threads that were split by rows), and right answers say nothing about new questions.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.gate.checks.judged import CheckedRun
from nested_core.measure.answers.suite_answers import read_suites
from nested_core.records.paired_difference import Indices, Vector
from nested_core.records.verdict import SCORE_ROUNDING, TaskResult
from nested_core.rooms.controls.answer_rows import (
    decode,
    find_training_row,
    fold,
    read_answer_rows,
)
from nested_core.rooms.controls.results import (
    ControlFigure,
    ControlResult,
    ControlWarning,
    SuspectLine,
    not_applicable,
    share_interval,
)

CONTROL = "lookup"
NAME = "a lookup in the training rows"
MAX_TRAIN_ROWS = 20_000
MAX_HELD_OUT_ROWS = 500
MIN_QUESTIONS = 10
SIBLING_SHARE = 0.9  # of held-out questions that the lookup answers right
MIN_ABOVE_CONSTANT = 0.3
LISTED_LINES = 10
_WORD = re.compile(r"\w+")


@dataclass(frozen=True, eq=False)
class Lookup:
    """Training rows that can be looked up by the words of their prompts.

    prompts, answers: of each row, as text.
    """

    prompts: Sequence[str]
    answers: Sequence[str]

    @cached_property
    def rows_by_word(self) -> dict[str, Indices]:
        """The rows whose prompt has a word, int64 [rows], by the word."""
        rows: dict[str, list[int]] = {}
        for index, prompt in enumerate(self.prompts):
            for word in list_words(prompt):
                rows.setdefault(word, []).append(index)
        return {word: np.array(indices, np.int64) for word, indices in rows.items()}

    def find_row(self, question: str) -> int | None:
        """Return the row whose prompt shares the rarest words; None if none shares a rare one.

        The score of a row is the sum of 1 / (rows with the word)^2 over the words that it shares
        and that at most half of the rows have: one rare word counts more than many common ones.
        """
        scores: Vector = np.zeros(len(self.prompts))
        for word in list_words(question):
            rows = self.rows_by_word.get(word)
            if rows is not None and 2 * len(rows) <= len(self.prompts):
                scores[rows] += 1 / len(rows) ** 2
        return int(scores.argmax()) if len(scores) and scores.max() > 0 else None

    def answer(self, question: str) -> str | None:
        """Return the answer of the row that `find_row` finds; None without one."""
        row = self.find_row(question)
        return None if row is None else self.answers[row]

    @cached_property
    def most_frequent_answer(self) -> str:
        """The constant answer that is right for the most training rows, of which there are some."""
        return Counter(map(fold, self.answers)).most_common(1)[0][0]


def list_words(text: str) -> list[str]:
    """Return the distinct words of a text without case, in their order."""
    return list(dict.fromkeys(_WORD.findall(text.casefold())))


def measure_lookup(judged: CheckedRun, train: TokenizedSplit) -> ControlResult:
    """Answer the held-out questions, and those of the suites, by a lookup in the training rows."""
    if judged.held_out is None or judged.losses is None:
        return not_applicable(CONTROL, NAME, "there are no held-out rows")
    counted = set(judged.losses.counted().lines.tolist())
    sample = read_answer_rows(judged.held_out.split, MAX_HELD_OUT_ROWS)
    held_out = [row for row in sample if row.line in counted]
    known = read_answer_rows(train, MAX_TRAIN_ROWS)
    if len(held_out) < MIN_QUESTIONS or not known:
        return not_applicable(CONTROL, NAME, f"fewer than {MIN_QUESTIONS} held-out questions")
    tokenizer = judged.base.tokenizer
    lookup = Lookup(
        decode(tokenizer, (row.prompt for row in known)),
        decode(tokenizer, (row.answer for row in known)),
    )
    questions = decode(tokenizer, (row.prompt for row in held_out))
    expected = [fold(text) for text in decode(tokenizer, (row.answer for row in held_out))]
    found = [lookup.find_row(question) for question in questions]
    is_right = [
        row is not None and fold(lookup.answers[row]) == text
        for row, text in zip(found, expected, strict=True)
    ]
    constant = expected.count(lookup.most_frequent_answer)
    siblings = [
        SuspectLine(
            file=judged.held_out.file,
            line=row.line,
            text="answered by {}:{}".format(*find_training_row(judged, known[index])),
        )
        for row, index, right in zip(held_out, found, is_right, strict=True)
        if right and index is not None
    ]
    total, right = len(held_out), sum(is_right)
    of_rows = f"{NAME}, {total} held-out questions"
    row = ControlFigure(
        control=CONTROL,
        name=of_rows,
        after=f"{right} right",
        bound=f"one fixed answer {constant}",
        result="siblings in train" if are_siblings(right, constant, total) else "passed",
    )
    results = list(_compare_suites(lookup, judged))
    warnings = [warning for _, warning in results if warning is not None]
    if are_siblings(right, constant, total):
        warnings.insert(0, _warn_of_siblings(right, total, siblings))
    return ControlResult(figures=(row, *(row for row, _ in results)), warnings=warnings)


def are_siblings(right: int, constant: int, total: int) -> bool:
    """Return whether a lookup is right so often that held-out rows must have siblings in train.

    right, constant: how many of `total` questions the lookup, and one fixed answer, answer right.
    """
    is_nearly_always = right >= SIBLING_SHARE * total and share_interval(right, total)[0] > 0.7
    return is_nearly_always and right - constant >= MIN_ABOVE_CONSTANT * total


def _warn_of_siblings(right: int, total: int, lines: Sequence[SuspectLine]) -> ControlWarning:
    """Return a warning that a lookup in train answers `right` of `total` held-out questions."""
    return ControlWarning(
        control=CONTROL,
        kind="siblings_in_train",
        figure=right / total,
        interval=share_interval(right, total),
        lines=tuple(lines[:LISTED_LINES]),
        words=(
            f"held-out rows are answered by their siblings in train: looking up the rarest words "
            f"of a question there answers {right} of {total} right, without a model. What is "
            f"measured here says little about new questions. Split by the group of a row (its "
            f"article, customer or thread), not by rows"
        ),
    )


def _compare_suites(
    lookup: Lookup, judged: CheckedRun
) -> Iterator[tuple[ControlFigure, ControlWarning | None]]:
    """Yield a row, and maybe a warning, for each suite of enough questions."""
    tasks = {task.name: task for task in judged.verdict.tasks}
    for suite in read_suites(judged.config.gate):
        lines = {a.line for a in judged.answers if (a.task, a.model) == (suite.name, "candidate")}
        prompts = [question.prompt for question in suite.questions]
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in prompts]
        scores = suite.score([lookup.answer(text) or "" for text in texts])
        asked = zip(suite.questions, scores, strict=True)
        counted = [score for question, score in asked if question.line in lines]
        if len(counted) >= MIN_QUESTIONS:
            yield _compare_suite(tasks[suite.name], sum(counted) / len(counted))


def _compare_suite(task: TaskResult, lookup: float) -> tuple[ControlFigure, ControlWarning | None]:
    """Compare the adapter's score of a suite with the lookup's, both from 0 to 1."""
    # A suite without any right answer, and one that a constant answers as well, are told already
    is_shown = task.candidate > lookup + SCORE_ROUNDING or lookup <= (task.constant or 0.0)
    scores = f"{task.count(task.candidate)} of {task.questions} answers"
    row = ControlFigure(
        control=CONTROL,
        name=f"{NAME}, {task.name}",
        before=f"lookup {task.count(lookup)}",
        after=f"adapter {scores} right",
        result="passed" if is_shown else "no better than a lookup",
    )
    if is_shown:
        return row, None
    warning = ControlWarning(
        control=CONTROL,
        kind="no_better_than_lookup",
        figure=lookup,
        words=(
            f"{task.name}: nothing was shown about new questions: {scores} are right, and looking "
            f"up the rarest words of each question in train gives {task.count(lookup)}"
        ),
    )
    return row, warning
