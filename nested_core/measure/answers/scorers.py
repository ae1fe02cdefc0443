"""Score the answers to a suite's questions, each from 0 (wrong) to 1 (right).

Texts and numbers are compared here. Regular expressions, JSON schemas and Python functions come
with the suite, and a room scores by them.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from pathlib import Path

from nested_core.config.sections import Score
from nested_core.errors import DatasetError
from nested_core.measure.answers.suites import BadQuestion, Question, describe_bad_questions
from nested_core.seams import load_only

SCORES_OF_SUITES = ("regex", "json", "python")  # by what comes with a suite
_SIGN_PATTERN = r"(?:(?<![^\W_]|[.%‰°])[-+\u2212])?"  # no "-" in "3-4", "3%-4%", "GPT-4"
_GROUP_PATTERN = "[,\u00a0\u2009\u202f]"  # comma, and the spaces that do not break a number
_WHOLE_PATTERN = rf"{_SIGN_PATTERN}(?:\d{{1,3}}(?:{_GROUP_PATTERN}\d{{3}})+(?!\d)|\d+)"
# A chain, such as a date or a version, is found first and is in no group: it holds no number
_NUMBER_PATTERN = re.compile(
    rf"{_WHOLE_PATTERN}(?:\.\d+){{2,}}\w*(?:[-+.]\w+)*"
    rf"|({_WHOLE_PATTERN}(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}(?!\d))?|{_SIGN_PATTERN}(?<![\d.])\.\d+)"
)
_DECIMAL_PRECISION = 50


@dataclass(frozen=True)
class ScoringMethod:
    """How a suite is scored.

    place: the suite's file, for messages.
    score: the kind of score; `choice` is scored in suite_answers.py, because it needs the model.
    function: for `python`, "module:function", called with the answer and the suite's line as a
        dict.
    """

    place: Path
    score: Score
    function: str | None = None


@dataclass(frozen=True)
class SuiteScorer:
    """A room's scoring by what comes with a suite: a pattern, a schema or a function.

    score: returns a score from 0 to 1 for each pair of a question and its answer. Raises
        DatasetError, naming the question, if the scorer raises, takes too long or gives no score.
    find_problems: yields for each question what is wrong with its pattern or schema, or None. It
        ends at a failure, as the last problem.
    """

    score: Callable[[ScoringMethod, Sequence[tuple[Question, str]]], list[float]]
    find_problems: Callable[[ScoringMethod, Sequence[Question]], Iterator[str | None]]


def score_answers(
    method: ScoringMethod, questions: Sequence[Question], answers: Sequence[str]
) -> list[float]:
    """Score each answer from 0 to 1, in the order of the questions.

    Raises DatasetError as SuiteScorer does, ConfigError if the room of the score is not installed.
    """
    pairs = list(zip(questions, answers, strict=True))
    if method.score in SCORES_OF_SUITES:
        return _load_scorer(method).score(method, pairs)
    is_right = {
        "exact": _equals_accepted_answer,
        "contains": _contains_accepted_answer,
        "number": _is_near_accepted_number,
    }[method.score]
    return [float(is_right(question, answer)) for question, answer in pairs]


def normalise_white_space(text: str) -> str:
    """Normalise a text to Unicode NFC, strip it, and collapse white space to single blanks."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, or None: "about 1,234.5 km." gives 1234.5.

    Commas or no-break spaces between groups of three digits and the Unicode minus sign are
    understood; at a plain space a number ends. A point that ends the sentence, a unit or a
    currency is not part of the number. Digits with two points or more, as in "28.11.2026" or
    "v1.2.3", are no number.
    """
    numbers = [number for number in _NUMBER_PATTERN.findall(text) if number]
    if not numbers:
        return None
    return Decimal(re.sub(_GROUP_PATTERN, "", numbers[-1]).replace("\u2212", "-"))


def _equals_accepted_answer(question: Question, answer: str) -> bool:
    """Return whether the answer equals an accepted one, ignoring differences of white space."""
    return normalise_white_space(answer) in map(normalise_white_space, question.accepted)


def _contains_accepted_answer(question: Question, answer: str) -> bool:
    """Return whether the answer contains an accepted one, ignoring differences of white space."""
    normalised = normalise_white_space(answer)
    return any(normalise_white_space(text) in normalised for text in question.accepted)


def _is_near_accepted_number(question: Question, answer: str) -> bool:
    """Whether the last number in the answer is within the tolerance of an accepted number."""
    number = last_number(answer)
    if number is None:
        return False
    with localcontext(prec=_DECIMAL_PRECISION):  # in decimal: 0.31 is within 0.01 of 0.3
        tolerance = Decimal(repr(question.tolerance))
        return any(abs(number - Decimal(repr(value))) <= tolerance for value in question.accepted)


def _load_scorer(method: ScoringMethod) -> SuiteScorer:
    """Return the room's scorer; ConfigError if it is not installed."""
    return load_only(SuiteScorer, f"score: {method.score}")


def require_usable_scorer(method: ScoringMethod, questions: Sequence[Question]) -> None:
    """Compile the patterns or schemas that came with a suite, or import its function.

    Raises DatasetError, naming the lines, if one does not compile or takes too long; ConfigError if
    the room of the score is not installed.
    """
    if method.score == "python":
        _load_scorer(method).score(method, ())
    if method.score in ("regex", "json"):
        found = _load_scorer(method).find_problems(method, questions)
        problems = [
            BadQuestion(question.line, problem, problem)
            for problem, question in zip(found, questions)  # noqa: B905
            if problem is not None
        ]
        if problems:
            summary = f"{method.place} is no eval set of {method.score} questions."
            raise DatasetError(describe_bad_questions(method.place, problems, summary))
