"""How right the answers to a suite's questions are: a share from 0 to 1 each.

Texts and numbers are compared here. A regular expression, a JSON schema and a Python function come
with the suite and may take for ever: they run in a process of their own, which has a time limit.
"""

from __future__ import annotations

import json
import os
import re
import selectors
import signal
import subprocess
import sys
import tempfile
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

from nested_core.config.gate import Score
from nested_core.errors import DatasetError
from nested_core.gate.answers.suites import Question, describe_bad_questions

SCORING_PROGRAM = Path(__file__).with_name("scoring_process.py")
START_TIMEOUT_SECONDS = 60.0
QUESTION_TIMEOUT_SECONDS = 10.0
_SIGN_PATTERN = r"(?:(?<![\d.])[-+\u2212])?"  # in 3-4 there is none
_NUMBER_PATTERN = re.compile(
    rf"{_SIGN_PATTERN}(?:\d{{1,3}}(?:,\d{{3}})+(?!\d)|\d+)(?:\.\d+)?(?:[eE][-+]?\d{{1,3}}(?!\d))?"
    rf"|{_SIGN_PATTERN}\.\d+"
)
_DECIMAL_PRECISION = 50


@dataclass(frozen=True)
class ScoringMethod:
    """How a suite is scored.

    place: the suite's file, for messages.
    score: one of the suite's scores but `choice`, which needs the model.
    function: for `python`, "module:function", called with the answer and the line as a dict.
    """

    place: Path
    score: Score
    function: str | None = None


def score_answers(
    method: ScoringMethod, questions: Sequence[Question], answers: Sequence[str]
) -> list[float]:
    """How right each answer is, from 0 to 1, in the order of the questions.

    Raises DatasetError, naming the question, if a pattern, a schema or a function that came with
    the suite raises, takes too long or returns anything else.
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
    """Unicode NFC with outer white space gone and repeated white space as one blank; case kept."""
    return " ".join(unicodedata.normalize("NFC", text).split())


def last_number(text: str) -> Decimal | None:
    """The last number in a text, or None.

    A comma between groups of three digits and a true minus sign are understood; a point that ends
    the sentence, a unit or a currency is not part of the number.
    """
    matches = _NUMBER_PATTERN.findall(text)
    if not matches:
        return None
    return Decimal(matches[-1].replace(",", "").replace("\u2212", "-"))


def _equals_accepted_answer(question: Question, answer: str) -> bool:
    return normalise_white_space(answer) in {
        normalise_white_space(text) for text in question.accepted
    }


def _contains_accepted_answer(question: Question, answer: str) -> bool:
    normalised = normalise_white_space(answer)
    return any(normalise_white_space(text) in normalised for text in question.accepted)


def _is_near_accepted_number(question: Question, answer: str) -> bool:
    number = last_number(answer)
    if number is None:
        return False
    with localcontext(prec=_DECIMAL_PRECISION):  # in decimal: 0.31 is within 0.01 of 0.3
        tolerance = Decimal(repr(question.tolerance))
        return any(abs(number - Decimal(repr(value))) <= tolerance for value in question.accepted)


def _score_in_process(method: ScoringMethod, pairs: Sequence[tuple[Question, str]]) -> list[float]:
    request = {
        "score": method.score,
        "function": method.function,
        "folder": os.getcwd(),
        "most_seconds": int(2 * START_TIMEOUT_SECONDS),
        "items": [{"answer": answer, "question": question.fields} for question, answer in pairs],
    }
    scores: list[float] = []
    with tempfile.TemporaryDirectory(prefix="nested-tune-scores-") as folder:
        path = Path(folder, "request.json")
        path.write_text(json.dumps(request), encoding="utf-8")
        for outcome in _run_program(path):
            if "score" in outcome:
                scores.append(outcome["score"])
            if "error" in outcome:
                raise DatasetError(
                    _describe_scorer_failure(method, pairs, len(scores), outcome["error"])
                )
            if len(scores) == len(pairs):
                return scores
    what = "ended before it was done"
    raise DatasetError(_describe_scorer_failure(method, pairs, len(scores), what))


def _run_program(request: Path) -> Iterator[dict[str, Any]]:
    """What the process answers, line by line; the last is an error where it hangs or dies.

    It is the head of a process group, all of which is killed in the end.
    """
    with subprocess.Popen(
        [sys.executable, "-P", str(SCORING_PROGRAM), str(request)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    ) as process:
        try:
            yield from _read_lines(process)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def _read_lines(process: subprocess.Popen[bytes]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None  # noqa: S101  # it is a pipe
    unread = b""
    limit = START_TIMEOUT_SECONDS
    deadline = time.monotonic() + limit
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                yield {"error": f"it took more than {limit:g} seconds"}
                return
            more = os.read(process.stdout.fileno(), 65_536)
            if not more:
                yield {"error": _describe_process_end(process)}
                return
            *lines, unread = (unread + more).split(b"\n")
            for line in lines:
                yield json.loads(line)
            if lines:
                limit = QUESTION_TIMEOUT_SECONDS
                deadline = time.monotonic() + limit


def _describe_process_end(process: subprocess.Popen[bytes]) -> str:
    try:
        status = process.wait(QUESTION_TIMEOUT_SECONDS)
    except subprocess.TimeoutExpired:
        return "it closed its output"
    if status < 0:
        return f"its process was ended by {signal.Signals(-status).name}"
    return f"its process ended with exit status {status}"


def _describe_scorer_failure(
    method: ScoringMethod, pairs: Sequence[tuple[Question, str]], done: int, problem: str
) -> str:
    place = f"{method.place}:{pairs[done][0].line}" if done < len(pairs) else str(method.place)
    what = {"regex": "the regular expression", "json": "the JSON schema"}.get(
        method.score, f"the function {method.function}"
    )
    summary = f"the answers to {method.place} could not be scored."
    return describe_bad_questions(summary, [f"{place}: {what}: {problem}"])
