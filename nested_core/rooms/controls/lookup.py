"""The control of a lookup: what a search in the training rows, without any model, answers.

Each held-out question gets the answer of the training row whose words are most alike, rare words
counting most. Where that is nearly always right, held-out rows have siblings in train (articles,
customers, threads that were split by rows), and right answers say nothing about new questions.
"""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import numpy as np

from nested_core.gate.checks.judged import CheckedRun
from nested_core.measure.answers.suite_answers import read_suites
from nested_core.measure.answers.suites import list_expected_texts
from nested_core.records.verdict import SCORE_ROUNDING, CheckRow
from nested_core.rooms.controls.answer_rows import NO_ANSWERS, AnswerRow, Rows, RunRows
from nested_core.rooms.controls.results import ControlWarning, Told, share_interval
from nested_core.text.groups import grouped
from nested_core.text.words import fold, is_given_away, list_words

NAME = "a lookup in the training rows"
MAX_TRAIN_ROWS, MAX_HELD_OUT_ROWS = 20_000, 500
MIN_QUESTIONS = 10
SIBLING_SHARE = 0.9  # of held-out questions that the lookup answers right
MIN_ABOVE_CONSTANT = 0.3
FEW_CLASSES = 5  # different answers, that are never facts of a group
SIBLINGS = 5  # rows that one article, customer or country may have in train; a class has more
UNEVEN = 0.75  # of questions, that one fixed answer answers right: few ask for another
MIN_MORE = 5  # right answers than that: fewer come by luck, once in twenty times or more


class Lookup:
    """Training rows that can be looked up by the words of their prompts."""

    def __init__(self, rows: Rows, least: int = 1, most: int | None = None) -> None:
        """List the rows that have a word, for each word that so many rows have.

        least, most: the number of rows; None is half of them.
        """
        self.rows, most = rows, len(rows) // 2 if most is None else most
        words = ((word, i) for i, row in enumerate(rows) for word in list_words(row.asked))
        rare = {word: at for word, at in grouped(words).items() if least <= len(at) <= most}
        self._rows_by_word = {word: np.array(indices) for word, indices in rare.items()}

    def find_row(self, question: str) -> AnswerRow | None:
        """Return the row whose prompt shares the rarest words; None if none shares a rare one.

        The score of a row is the sum of 1 / (rows with the word)^2 over the listed words that it
        shares: one rare word counts more than many common ones.
        """
        scores = np.zeros(len(self.rows))
        for word in list_words(question):
            if (indices := self._rows_by_word.get(word)) is not None:
                scores[indices] += 1 / len(indices) ** 2
        return self.rows[int(scores.argmax())] if scores.any() else None

    def find_right(self, asked: Rows) -> list[tuple[AnswerRow, AnswerRow]]:
        """Return the rows whose questions it answers right, each with the row that it found."""
        found = ((row, self.find_row(row.asked)) for row in asked)
        return [(row, own) for row, own in found if own and fold(own.given) == fold(row.given)]


def measure_lookup(run: RunRows) -> Told:
    """Answer the held-out questions, and those of the suites, by a lookup in the training rows."""
    lookup = Lookup(run.read_train(MAX_TRAIN_ROWS, 0))
    held_out = run.read_held_out(MAX_HELD_OUT_ROWS) if lookup.rows else []
    if len(held_out) >= MIN_QUESTIONS:
        yield from look_for_siblings(lookup, held_out)
    else:
        few = f"fewer than {MIN_QUESTIONS} held-out questions" if lookup.rows else NO_ANSWERS
        yield CheckRow(NAME, verdict=f"not applicable: {few}")
    yield from _compare_suites(lookup, run.judged)


def look_for_siblings(lookup: Lookup, held_out: Rows) -> Told:
    """Answer the held-out questions by a lookup, and warn if it is nearly always right.

    Where answers are classes, with more than SIBLINGS rows each, a word of theirs may decide them,
    in new questions too: there only questions count that share a word with at most SIBLINGS rows,
    and the lookup has to be wrong without such words. They have to be half of all questions.
    """
    asked, right = held_out, lookup.find_right(held_out)
    [(usual, _)] = Counter(fold(row.given) for row in lookup.rows).most_common(1)
    constant = sum(fold(row.given) == usual for row in held_out)
    name, bound = f"{NAME}, {len(asked)} held-out questions", f"one fixed answer {constant}"
    after, most = f"{len(right)} right", max(FEW_CLASSES, len(lookup.rows) / SIBLINGS)
    if len({row.given for row in lookup.rows}) <= most:
        near, far = (Lookup(lookup.rows, *n) for n in ((1, SIBLINGS), (SIBLINGS + 1,)))
        asked = [row for row in held_out if near.find_row(row.asked)]
        right, constant = near.find_right(asked), max(len(far.find_right(asked)), constant)
    total = len(asked)
    is_told = 2 * total >= len(held_out) and are_siblings(len(right), constant, total)
    verdict = "siblings in train" if is_told else "passed"
    yield CheckRow(name, after=after, bound=bound, verdict=verdict)
    if is_told:
        lines = [row.tell(f"answered by {own.file}:{own.line}") for row, own in right]
        yield ControlWarning.of_share("siblings_in_train", len(right), total, lines)


def are_siblings(right: int, constant: int, total: int) -> bool:
    """Return whether a lookup is right so often that held-out rows must have siblings in train.

    right, constant: how many of `total` questions the lookup, and one fixed answer, answer right.
    """
    is_nearly_always = right >= SIBLING_SHARE * total > 0 and share_interval(right, total)[0] > 0.7
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
        named: dict[str, Any] = {"suite": task.name, "right": right}
        if constant >= UNEVEN and 0 < more < MIN_MORE:
            named["score"] = task.count(constant)
            yield ControlWarning.told("no_better_than_constant", constant, **named)
        lines = {a.line for a in judged.answers if (a.task, a.model) == (suite.name, "candidate")}
        if not known or len(lines) < MIN_QUESTIONS:
            continue
        prompts = [question.prompt for question in suite.questions]
        texts = [one if isinstance(one, str) else one[-1]["content"] for one in prompts]
        found = [row.given if row else "" for row in map(lookup.find_row, texts)]
        others = {"lookup": found}
        if not is_given_away(known):
            labels = {fold(t) for one in suite.questions for t in list_expected_texts(one)} - {""}
            names = [*map(match_label, labels)]
            # A question that lists labels is no answer, though a score may find the right one there
            listed = [sum(bool(y.search(x)) for y in names) for x in map(fold, texts)]
            others["echo"] = ["" if n > 1 else x for x, n in zip(texts, listed, strict=True)]
        for kind, answers in others.items():
            asked = zip(suite.questions, suite.score(answers), strict=True)
            score = sum(one for question, one in asked if question.line in lines) / len(lines)
            # A suite without any right answer, and one that a constant answers as well, are told
            # anyway
            is_shown = task.candidate > score + SCORE_ROUNDING or score <= constant
            figures = f"{kind} {task.count(score)}", f"adapter {right} answers right"
            if kind == "lookup" or not is_shown:
                verdict = "passed" if is_shown else f"no better than the {kind}"
                yield CheckRow(f"{NAME}, {task.name}", *figures, verdict=verdict)
            if not is_shown:
                named["score"] = task.count(score)
                yield ControlWarning.told(f"no_better_than_{kind}", score, **named)


def match_label(label: str) -> re.Pattern[str]:
    """Return a pattern that finds a folded label, but not as a part of a Latin word or number."""
    ends = r"(?:(?<![0-9a-z])|(?![0-9a-z]))", r"(?:(?![0-9a-z])|(?<![0-9a-z]))"
    return re.compile(re.escape(label).join(ends))
