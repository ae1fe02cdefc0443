"""Score the answers to a suite's questions, each from 0 (wrong) to 1 (right).

Texts and numbers are compared here. Regular expressions, JSON schemas and Python functions come
with the suite and may never return. They run in a process of their own, which has a time limit and
whose output is validated.
"""

from __future__ import annotations

import os
import re
import time
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any, Literal

from nested_core.config.sections import Score
from nested_core.errors import ChildFailed, DatasetError, NestedTuneError, shorten
from nested_core.measure.answers.suites import BadQuestion, Question, describe_bad_questions
from nested_core.process.child import Child

SCORING_PROGRAM = Path(__file__).with_name("scoring_process.py")
START_TIMEOUT_SECONDS = 60.0
QUESTION_TIMEOUT_SECONDS = 10.0
SUITE_CHECK_TIMEOUT_SECONDS = 120.0  # to compile all patterns or schemas
MAX_ANSWER_BYTES = 4096
MAX_PROBLEM_CHARACTERS = 300
_SIGN_PATTERN = r"(?:(?<![\d.])[-+\u2212])?"  # the "-" in "3-4" is no sign
_GROUP_PATTERN = "[,\u00a0\u2009\u202f]"  # comma, and the spaces that do not break a number
_NUMBER_PATTERN = re.compile(
    rf"{_SIGN_PATTERN}(?:\d{{1,3}}(?:{_GROUP_PATTERN}\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}(?!\d))?"
    rf"|{_SIGN_PATTERN}\.\d+"
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


def score_answers(
    method: ScoringMethod, questions: Sequence[Question], answers: Sequence[str]
) -> list[float]:
    """Score each answer from 0 to 1, in the order of the questions.

    Raises DatasetError, naming the question, if a pattern, schema or function of the suite raises,
    takes too long, or returns no score.
    """
    pairs = list(zip(questions, answers, strict=True))
    if method.score in ("regex", "json", "python"):
        return _score_in_process(method, pairs)
    scorers = {
        "exact": _equals_accepted_answer,
        "contains": _contains_accepted_answer,
        "number": _is_near_accepted_number,
    }
    is_right = scorers[method.score]
    return [float(is_right(question, answer)) for question, answer in pairs]


def normalise_white_space(text: str) -> str:
    """Normalise a text to Unicode NFC, strip it, and collapse white space to single blanks."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def last_number(text: str) -> Decimal | None:
    """Return the last number in a text, or None: "about 1,234.5 km." gives 1234.5.

    Commas or no-break spaces between groups of three digits and the Unicode minus sign are
    understood; at a plain space a number ends. A point that
    ends the sentence, a unit or a currency is not part of the number.
    """
    matches = _NUMBER_PATTERN.findall(text)
    if not matches:
        return None
    return Decimal(re.sub(_GROUP_PATTERN, "", matches[-1]).replace("\u2212", "-"))


def _equals_accepted_answer(question: Question, answer: str) -> bool:
    """Return whether the answer equals an accepted one, ignoring differences of white space."""
    return normalise_white_space(answer) in {
        normalise_white_space(text) for text in question.accepted
    }


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


def require_usable_scorer(method: ScoringMethod, questions: Sequence[Question]) -> None:
    """Compile the patterns or schemas that came with a suite, or import its function.

    Raises DatasetError, naming the lines, if one does not compile or takes too long.
    """
    if method.score == "python":
        _score_in_process(method, ())
    if method.score in ("regex", "json"):
        problems = [
            BadQuestion(question.line, problem, problem)
            for problem, question in zip(_check_in_process(method, questions), questions)  # noqa: B905
            if problem is not None
        ]
        if problems:
            summary = f"{method.place} is no eval set of {method.score} questions."
            raise DatasetError(describe_bad_questions(method.place, problems, summary))


def _check_in_process(method: ScoringMethod, questions: Sequence[Question]) -> Iterator[str | None]:
    """Yield for each question what is wrong with its pattern or schema, or None.

    Ends early, with the failure as the last problem, if the process fails or takes too long.
    """
    keys = ("expected", "schema")
    items = [
        {"question": {key: question.fields[key] for key in keys if key in question.fields}}
        for question in questions
    ]
    started = time.monotonic()
    try:
        for problem in _run_scoring_process(method, "check", items):
            if time.monotonic() - started > SUITE_CHECK_TIMEOUT_SECONDS:
                limit = f"{SUITE_CHECK_TIMEOUT_SECONDS:g} seconds"
                raise _ScoringFailed(f"those up to here took more than {limit}")
            yield None if problem is None else shorten(problem, MAX_PROBLEM_CHARACTERS)
    except _ScoringFailed as failure:
        yield f"{_describe_scorer(method)}: {failure}"


def _score_in_process(method: ScoringMethod, pairs: Sequence[tuple[Question, str]]) -> list[float]:
    """Score answers in the scoring process, and validate each score it returns.

    Raises DatasetError, naming the question's line, if scoring fails. Without pairs it only checks
    that the scorer can be loaded.
    """
    items = [{"answer": answer, "question": question.fields} for question, answer in pairs]
    scores: list[float] = []
    try:
        for score in _run_scoring_process(method, "score", items):
            if not isinstance(score, float) or not 0 <= score <= 1:
                raise _ScoringFailed(f"it answered {shorten(score)}, not a score")
            scores.append(score)
    except _ScoringFailed as failure:
        line = pairs[len(scores)][0].line if pairs else None
        text = f"{_describe_scorer(method)}: {failure}"
        summary = f"the answers to {method.place} could not be scored."
        problems = [BadQuestion(line, "scorer", text)]
        raise DatasetError(describe_bad_questions(method.place, problems, summary)) from None
    return scores


class _ScoringFailed(Exception):
    """The scoring process failed, or returned something else than a result."""


def _run_scoring_process(
    method: ScoringMethod, work: Literal["check", "score"], items: Sequence[dict[str, Any]]
) -> Iterator[Any]:
    """Yield the scoring process's result for each item; without items only load the scorer.

    Scorers run in a process of their own, because a pattern, a schema or a person's function may
    take forever or all memory.

    method: how answers are scored. work: whether items are questions to check or answers to score.

    Raises _ScoringFailed if an item raises an error or takes too long, or if the process fails.
    """
    request = {
        "work": work,
        "score": method.score,
        "function": method.function,
        "folder": os.getcwd(),
        "most_seconds": int(2 * START_TIMEOUT_SECONDS),  # then it ends itself, if we are gone
    }
    try:
        with Child(SCORING_PROGRAM, max_answer_bytes=MAX_ANSWER_BYTES) as child:
            child.ask(request | {"item": None}, START_TIMEOUT_SECONDS)  # only loads the scorer
            for item in items:
                yield child.ask(request | {"item": item}, QUESTION_TIMEOUT_SECONDS)
    except (NestedTuneError, OSError) as error:  # a scorer's own error may be of these classes
        kind = "" if isinstance(error, ChildFailed) else f"{type(error).__name__}: "
        raise _ScoringFailed(shorten(f"{kind}{error}", MAX_PROBLEM_CHARACTERS)) from None


def _describe_scorer(method: ScoringMethod) -> str:
    """Name what scores a suite, for messages: a regular expression, a schema or a function."""
    names = {"regex": "the regular expression", "json": "the JSON schema"}
    return names.get(method.score, f"the function {method.function}")
