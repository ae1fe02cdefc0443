"""The control of a lookup: what a search in the training rows, without any model, answers.

Each held-out question gets the answer of the training row whose words are most alike, rare words
counting most. Where that is nearly always right, held-out rows have siblings in train (articles,
customers, threads that were split by rows), and right answers say nothing about new questions.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from nested_core.gate.checks.judged import CheckedRun
from nested_core.measure.answers.suite_answers import read_suites
from nested_core.measure.answers.suites import list_expected_texts
from nested_core.records.verdict import SCORE_ROUNDING, CheckRow
from nested_core.rooms.controls.answer_rows import (
    GIVEN_AWAY,
    NO_ANSWERS,
    AnswerRow,
    Rows,
    RunRows,
    fold,
    list_words,
    share_given_away,
)
from nested_core.rooms.controls.results import Control, ControlWarning, Told, share_interval

NAME = "a lookup in the training rows"
MAX_TRAIN_ROWS = 20_000
MAX_HELD_OUT_ROWS = 500
MIN_QUESTIONS = 10
SIBLING_SHARE = 0.9  # of held-out questions that the lookup answers right
MIN_ABOVE_CONSTANT = 0.3
MAX_CLASSES = 0.1  # of the training rows: different answers that are classes, not facts of a group,
FEW_CLASSES = 5  # and so many always
UNEVEN = 0.75  # of questions, that one fixed answer answers right: few ask for another
MIN_MORE = 5  # right answers than that: fewer come by luck, once in twenty times or more
LOOKS_UP = "looking up the rarest words of each question in train"


class Lookup:
    """Training rows that can be looked up by the words of their prompts."""

    def __init__(self, rows: Rows) -> None:
        """List the rows that have a word, for each word that at most half of them have."""
        self.rows, by_word = rows, dict[str, list[int]]()
        for index, row in enumerate(rows):
            for word in list_words(row.asked):
                by_word.setdefault(word, []).append(index)
        rare = {word: indices for word, indices in by_word.items() if 2 * len(indices) <= len(rows)}
        self._rows_by_word = {word: np.array(indices) for word, indices in rare.items()}

    def find_row(self, question: str) -> AnswerRow | None:
        """Return the row whose prompt shares the rarest words; None if none shares a rare one.

        The score of a row is the sum of 1 / (rows with the word)^2 over the words that it shares
        and that at most half of the rows have: one rare word counts more than many common ones.
        """
        scores = np.zeros(len(self.rows))
        for word in list_words(question):
            if (indices := self._rows_by_word.get(word)) is not None:
                scores[indices] += 1 / len(indices) ** 2
        return self.rows[int(scores.argmax())] if scores.any() else None


def measure_lookup(run: RunRows) -> Told:
    """Answer the held-out questions, and those of the suites, by a lookup in the training rows."""
    lookup = Lookup(run.read_train(MAX_TRAIN_ROWS))
    held_out = run.read_held_out(MAX_HELD_OUT_ROWS) if lookup.rows else []
    if len(held_out) >= MIN_QUESTIONS:
        yield from look_for_siblings(lookup, held_out)
    else:
        few = f"fewer than {MIN_QUESTIONS} held-out questions" if lookup.rows else NO_ANSWERS
        yield CheckRow(NAME, verdict=f"not applicable: {few}")
    yield from _compare_suites(lookup, run.judged)


def look_for_siblings(lookup: Lookup, held_out: Rows) -> Told:
    """Answer the held-out questions by a lookup, and warn if it is nearly always right.

    Not where answers are a few classes: a word of theirs may decide them, in new questions too.
    """
    matches = [
        (row, own)
        for row in held_out
        if (own := lookup.find_row(row.asked)) is not None and fold(own.given) == fold(row.given)
    ]
    [(usual, _)] = Counter(fold(row.given) for row in lookup.rows).most_common(1)
    constant = sum(fold(row.given) == usual for row in held_out)
    total, right = len(held_out), len(matches)
    most = max(FEW_CLASSES, MAX_CLASSES * len(lookup.rows))
    is_of_classes = len({row.given for row in lookup.rows}) <= most
    is_told = are_siblings(right, constant, total) and not is_of_classes
    name, bound = f"{NAME}, {total} held-out questions", f"one fixed answer {constant}"
    verdict = "siblings in train" if is_told else "passed"
    yield CheckRow(name, after=f"{right} right", bound=bound, verdict=verdict)
    if is_told:
        yield ControlWarning.of_share(
            "siblings_in_train",
            *(right, total),
            f"held-out rows are answered by their siblings in train: looking up the rarest words "
            f"of a question there answers {right} of {total} right, without a model. What is "
            f"measured here says little about new questions. Split by the group of a row (its "
            f"article, customer or thread), not by rows",
            lines=[row.tell(f"answered by {own.file}:{own.line}") for row, own in matches],
        )


def are_siblings(right: int, constant: int, total: int) -> bool:
    """Return whether a lookup is right so often that held-out rows must have siblings in train.

    right, constant: how many of `total` questions the lookup, and one fixed answer, answer right.
    """
    is_nearly_always = right >= SIBLING_SHARE * total and share_interval(right, total)[0] > 0.7
    return is_nearly_always and right - constant >= MIN_ABOVE_CONSTANT * total


def _compare_suites(lookup: Lookup, judged: CheckedRun) -> Told:
    """Yield a row, and maybe a warning, for each suite of enough questions.

    Beside the lookup, the question itself is scored as its answer, unless the training answers too
    are found in their prompts.
    """
    tasks = {task.name: task for task in judged.verdict.tasks}
    suites = [one for one in read_suites(judged.config.gate) if one.name in tasks]
    known = [(row.asked, row.given) for row in lookup.rows if suites]
    for suite, task in ((one, tasks[one.name]) for one in suites):
        constant, right = task.constant or 0.0, f"{task.count(task.candidate)} of {task.questions}"
        more = round((task.candidate - constant) * task.questions)
        if constant >= UNEVEN and 0 < more < MIN_MORE:
            yield ControlWarning(
                "no_better_than_constant",
                constant,
                f"{task.name}: not shown to be better than one fixed answer: {right} are right, "
                f"and one answer to all gives {task.count(constant)}. Ask more questions that have "
                f"other answers",
            )
        lines = {a.line for a in judged.answers if (a.task, a.model) == (suite.name, "candidate")}
        if not known or len(lines) < MIN_QUESTIONS:
            continue
        prompts = [question.prompt for question in suite.questions]
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in prompts]
        found = [row.given if row else "" for row in map(lookup.find_row, texts)]
        others = {"lookup": (LOOKS_UP, found)}
        if share_given_away(known) < GIVEN_AWAY:
            labels = {fold(text) for one in suite.questions for text in list_expected_texts(one)}
            # A question that lists labels is no answer, though a score may find the right one there
            echo = [one if sum(x in fold(one) for x in labels) < 2 else "" for one in texts]
            others["echo"] = ("repeating each question", echo)
        for kind, (what, answers) in others.items():
            asked = zip(suite.questions, suite.score(answers), strict=True)
            score = sum(one for question, one in asked if question.line in lines) / len(lines)
            # A suite without any right answer, and one that a constant answers as well, are told
            # anyway
            is_shown = task.candidate > score + SCORE_ROUNDING or score <= constant
            figures = f"{kind} {task.count(score)}", f"adapter {right} answers right"
            if kind == "lookup" or not is_shown:
                verdict = "passed" if is_shown else f"no better than a {kind}"
                yield CheckRow(f"{NAME}, {task.name}", *figures, verdict=verdict)
            if not is_shown:
                yield ControlWarning(
                    f"no_better_than_{kind}",
                    score,
                    f"{task.name}: nothing was shown about new questions: {right} answers are "
                    f"right, and {what} gives {task.count(score)}",
                )


LOOKUP = Control("lookup", NAME, measure_lookup)
