"""Score by what comes with a suite: regular expressions, JSON schemas and Python functions.

Any of them may never return. They run in a process of their own, which has a time limit and whose
output is validated.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from nested_core.errors import ChildFailed, DatasetError, NestedTuneError, shorten
from nested_core.measure.answers.scorers import ScoringMethod, SuiteScorer
from nested_core.measure.answers.suites import BadQuestion, Question, describe_bad_questions
from nested_core.process.child import NO_LIMITS, Child, Limits

SCORING_PROGRAM = Path(__file__).with_name("scoring_process.py")
START_TIMEOUT_SECONDS = 60.0
QUESTION_TIMEOUT_SECONDS = 10.0
SUITE_CHECK_TIMEOUT_SECONDS = 120.0  # to compile all patterns or schemas
MAX_ANSWER_BYTES = 4096
LIMITS = Limits(address_space=2 * 2**30)  # but for a Python scorer, which may load a model
MAX_PROBLEM_CHARACTERS = 300


def find_problems(method: ScoringMethod, questions: Sequence[Question]) -> Iterator[str | None]:
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


def score(method: ScoringMethod, pairs: Sequence[tuple[Question, str]]) -> list[float]:
    """Score answers in the scoring process, and validate each score it returns.

    Raises DatasetError, naming the question's line, if scoring fails. Without pairs it only checks
    that the scorer can be loaded.
    """
    items = [{"answer": answer, "question": question.fields} for question, answer in pairs]
    scores: list[float] = []
    try:
        for given in _run_scoring_process(method, "score", items):
            if not isinstance(given, float) or not 0 <= given <= 1:
                raise _ScoringFailed(f"it answered {shorten(given)}, not a score")
            scores.append(given)
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
        limits = NO_LIMITS if method.function else LIMITS
        with Child(SCORING_PROGRAM, max_answer_bytes=MAX_ANSWER_BYTES, limits=limits) as child:
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


SCORER = SuiteScorer(score, find_problems)
