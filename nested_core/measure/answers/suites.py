"""Read a suite's questions strictly; mistakes are reported with their lines, grouped by kind.

A question has "prompt" (a plain text) or "messages" (sent through the chat template), "expected",
keys that its score needs, and optionally "id". Patterns and schemas are not compiled here:
scorers.py does that in another process.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from nested_core.config.sections import Score
from nested_core.data.lines.json_decoding import LineProblem, decode_json_object
from nested_core.data.lines.line_rows import fold_text
from nested_core.data.sources.file_formats import RestOfFileUnreadable
from nested_core.errors import DatasetError, join_first_values, list_first, shorten
from nested_core.measure.answers.suite_files import TABLE_SUFFIXES, read_question_lines
from nested_core.storage.untrusted_files import iterate_scalars
from nested_core.text.groups import grouped

Turn = dict[str, str]
MAX_QUESTIONS = 100_000
MAX_QUESTION_BYTES = 2**20
MAX_ACCEPTED_ANSWERS = 1_000
MAX_PROBLEMS = 1_000  # reading ends after this many
MAX_LISTED_PROBLEMS = 8
MAX_EXPECTED_CHARACTERS = 1_000  # of the expected answers, as shown beside the models' answers


@dataclass(frozen=True)
class Question:
    """One question of a suite.

    line: its line in the file, counted from 1.
    name: its "id", or the line number as text.
    prompt: a plain text, or the messages of a chat.
    accepted: the right answers: texts, numbers, or for `json` at most one object of fields.
    tolerance: how far the answer to a `number` question may be off.
    choices: the answers to choose from, for `choice`.
    fields: the line as it was read, which a Python scorer receives.
    """

    line: int
    name: str
    prompt: str | tuple[Turn, ...]
    accepted: tuple[Any, ...]
    tolerance: float
    choices: tuple[str, ...]
    fields: dict[str, Any]


def _require_text(question: str) -> str:
    """Return the text of a question; ValueError if there is nothing to answer in it."""
    if not question.strip():
        raise ValueError("the question has no text")
    return question


class _SuiteLine(BaseModel):
    """The fields that a line of any suite may have; subclasses add those of a score."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    id: str | int | None = None
    prompt: Annotated[str, AfterValidator(_require_text)] | None = None
    messages: Annotated[list[_Turn], Field(min_length=1, fail_fast=True)] | None = None
    expected: Any = None

    @model_validator(mode="after")
    def _has_one_prompt(self) -> Self:
        """Require a prompt or messages, not both, and a last message that a model can answer."""
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected a prompt or messages, and not both")
        if self.messages and self.messages[-1].role not in ("user", "tool"):
            raise ValueError("the last message is what is answered, and must be the user's")
        if self.messages and self.messages[-1].role == "user":  # a tool may have no answer
            _require_text(self.messages[-1].content)
        return self

    def parse_accepted_answers(self) -> tuple[object, ...]:
        """Return the right answers; raises _Mistake if `expected` is not valid for the score."""
        raise NotImplementedError


class _Turn(BaseModel):
    """One turn of a question in a suite's file."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class _TextLine(_SuiteLine):
    """A line of `exact` or `contains`."""

    def parse_accepted_answers(self) -> tuple[str, ...]:
        """Return the accepted texts; a number becomes the text that JSON writes for it."""
        texts = [
            value if isinstance(value, str) else json.dumps(value)
            for value in _accepted_answers(self.expected, (str, int, float), "a text")
        ]
        if not all(text.strip() for text in texts):
            raise _Mistake("expected: a text without any letter is no answer")
        return tuple(texts)


class _RegexLine(_SuiteLine):
    """A line of a suite whose answers are matched with regular expressions."""

    def parse_accepted_answers(self) -> tuple[str, ...]:
        """Return the accepted patterns, in the syntax of Python's re."""
        return tuple(_accepted_answers(self.expected, (str,), "a regular expression"))


class _NumberLine(_SuiteLine):
    """A line of a suite whose answers are numbers, equal within `tolerance`."""

    tolerance: Annotated[float, Field(ge=0)] = 0.0

    def parse_accepted_answers(self) -> tuple[float, ...]:
        """Return the accepted numbers."""
        return tuple(_accepted_answers(self.expected, (int, float), "a number"))


class _ChoiceLine(_SuiteLine):
    """A line of a suite with multiple-choice answers."""

    choices: Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=2)]

    def parse_accepted_answers(self) -> tuple[str, ...]:
        """Return the accepted choices, each of which must be in `choices`."""
        accepted = tuple(_accepted_answers(self.expected, (str,), "one of the choices"))
        if len(set(self.choices)) < len(self.choices):
            raise _Mistake("choices: one is there twice")
        if unknown := [text for text in accepted if text not in self.choices]:
            raise _Mistake("expected: none of the choices is ", repr(shorten(unknown[0])))
        return accepted


class _JsonLine(_SuiteLine):
    """A line of a suite whose answers are JSON, checked by a schema or by equal fields."""

    # pydantic's BaseModel has an attribute `schema`
    json_schema: dict[str, object] | bool | None = Field(default=None, alias="schema")

    def parse_accepted_answers(self) -> tuple[dict[str, object], ...]:
        """Return the object of fields that must be equal; empty if only a schema is given."""
        if not isinstance(self.expected, dict | None):
            raise _Mistake("expected: for a json score, an object of fields that must be equal")
        if not self.expected and self.json_schema is None:
            raise _Mistake(
                "for a json score, expected `expected`, an object of fields that must be equal, or "
                "`schema`, a JSON schema, or both"
            )
        return () if self.expected is None else (self.expected,)


class _PythonLine(_SuiteLine):
    """A line of a suite whose answers a Python function scores."""

    def parse_accepted_answers(self) -> tuple[object, ...]:
        """Return `expected` unchanged: the Python function interprets it."""
        return (self.expected,)


_LINE_MODEL_BY_SCORE: dict[Score, type[_SuiteLine]] = {
    "exact": _TextLine,
    "contains": _TextLine,
    "regex": _RegexLine,
    "number": _NumberLine,
    "json": _JsonLine,
    "choice": _ChoiceLine,
    "python": _PythonLine,
}


@dataclass(frozen=True)
class BadQuestion:
    """A mistake in a suite; mistakes of the same `kind` are reported together.

    line: of the file, counted from 1; None for the whole file.
    """

    line: int | None
    kind: str
    problem: str


class _Mistake(ValueError):
    """A mistake in a question. The details are shown, but do not distinguish kinds of mistakes."""

    def __init__(self, kind: str, details: str = "") -> None:
        """Create it from the kind of mistake, and details that are only shown."""
        super().__init__(f"{kind}{details}")
        self.kind = kind


def read_suite(path: Path, score: Score) -> tuple[Question, ...]:
    """Return the questions of a suite's file, in order; blank lines are skipped.

    Raises ConfigError if there is no such file. Raises DatasetError, with the bad lines, if it is
    no suite for this score or too large.
    """
    questions: list[Question] = []
    problems = list(islice(_find_problems(path, score, questions), MAX_PROBLEMS + 1))
    summary = f"{path} is no eval set of {score} questions."
    if not questions and not problems:
        problems = [BadQuestion(None, "empty", "there is no question in it")]
    if len(problems) > MAX_PROBLEMS:
        summary += f" More than {MAX_PROBLEMS:,} lines are bad; the rest was not read."
    if problems:
        raise DatasetError(describe_bad_questions(path, problems[:MAX_PROBLEMS], summary))
    return tuple(questions)


def _find_problems(path: Path, score: Score, questions: list[Question]) -> Iterator[BadQuestion]:
    """Read a suite's file: append good questions to `questions` and yield each bad line.

    Ends early after MAX_QUESTIONS questions, and where the rest of a damaged file is unreadable.
    Questions with the same name are reported at the end.
    """
    is_table = path.suffix.lower() in TABLE_SUFFIXES
    try:
        for line, body, problem in read_question_lines(path, score):
            if problem is not None:
                yield BadQuestion(line, *problem)
            elif body and len(questions) == MAX_QUESTIONS:
                yield BadQuestion(
                    line, "many", f"an eval set has at most {MAX_QUESTIONS:,} questions"
                )
                return
            elif body:
                try:
                    questions.append(_read_question(body, line, score, is_table=is_table))
                except LineProblem as line_problem:
                    yield BadQuestion(line, line_problem.check, line_problem.message)
                except _Mistake as mistake:
                    yield BadQuestion(line, mistake.kind, str(mistake))
    except RestOfFileUnreadable as error:
        yield BadQuestion(error.number, "unreadable", error.message)
    yield from _find_repeated_names(questions)


def describe_bad_questions(path: Path, problems: Sequence[BadQuestion], summary: str) -> str:
    """Return one message on a suite: a line for each kind of mistake, naming the bad lines."""
    listed = [
        f"{path}{'' if first.line is None else f':{first.line}'}: {first.problem}"
        f"{_describe_other_lines([other.line for other in others])}"
        for first, *others in grouped((one.kind, one) for one in problems).values()
    ]
    shown = list_first(listed, MAX_LISTED_PROBLEMS)
    return "\n  ".join([f"gate.tasks: {summary} Nothing was evaluated.", *shown])


def _describe_other_lines(lines: Sequence[int | None]) -> str:
    """Describe further lines for a message: ` (and 3 more: 5, 8, ...)`; "" without any."""
    return f" (and {len(lines):,} more: {join_first_values(lines, 2)})" if lines else ""


def _read_question(body: bytes, line: int, score: Score, *, is_table: bool) -> Question:
    """Parse and check one question of a suite, a file of questions with expected answers.

    body: its JSON. line: its line in the file, which names it if it has no `id`.
    score: how answers are scored, which decides what fields a question needs.
    is_table: whether the file is a table, where an empty cell is a missing field.

    Raises LineProblem for what is not JSON, _Mistake for a question that cannot be used.
    """
    if len(body) > MAX_QUESTION_BYTES:
        raise _Mistake(f"the line is longer than {MAX_QUESTION_BYTES:,} bytes")
    fields = decode_json_object(body)
    if is_table:  # an empty cell counts as a missing field
        fields = {key: value for key, value in fields.items() if value != ""}
    expected = fields.get("expected")
    if isinstance(expected, list) and len(expected) > MAX_ACCEPTED_ANSWERS:
        raise _Mistake(f"expected: more than {MAX_ACCEPTED_ANSWERS:,} answers")
    try:
        # JSON integers have no limit, but must fit a float. Floats were checked while decoding.
        numbers = (value for value in iterate_scalars(fields) if isinstance(value, int))
        if any(abs(number) > sys.float_info.max for number in numbers):
            raise _Mistake("a number in it is beyond any float")
        parsed = _LINE_MODEL_BY_SCORE[score].model_validate(fields)
        accepted = parsed.parse_accepted_answers()
    except ValidationError as error:
        raise _describe_first_problem(error) from None
    except RecursionError:
        raise _Mistake("it is nested too deeply") from None
    turns = tuple(turn.model_dump() for turn in parsed.messages or ())
    return Question(
        line=line,
        name=str(line if parsed.id is None else parsed.id),
        prompt=parsed.prompt or turns or "",
        accepted=accepted,
        tolerance=getattr(parsed, "tolerance", 0.0),
        choices=tuple(getattr(parsed, "choices", ())),
        fields=fields,
    )


def _accepted_answers(value: object, types: tuple[type, ...], what: str) -> list[Any]:
    """Return `expected` as a list of answers; raises _Mistake if one is of another type.

    `what` says in the message what an answer should be, such as "a number".
    """
    values = value if isinstance(value, list) else [value]
    fits = [isinstance(item, types) and not isinstance(item, bool) for item in values]
    if not values or not all(fits):
        actual = "an empty list" if not values else shorten(json.dumps(values[fits.index(False)]))
        raise _Mistake(f"expected: {what} or a list of them", f", found {actual}")
    return values


def _describe_first_problem(error: ValidationError) -> _Mistake:
    """Return the first of pydantic's errors as a _Mistake, with the number of further errors."""
    problems = error.errors(include_url=False)
    first = problems[0]
    key = ".".join(str(part) for part in first["loc"])
    others = f" (and {len(problems) - 1} more in this line)" if len(problems) > 1 else ""
    if first["type"] == "extra_forbidden":
        return _Mistake(
            f"{key}: there is no such key in a question of this score",
            f"{others}; expected `prompt` (or `messages`) and `expected`: docs/gate.md#answers",
        )
    if first["type"] == "missing":
        return _Mistake(f"{key} is missing", others)
    message = first["msg"].removeprefix("Value error, ")
    return _Mistake(f"{key}: {message}" if key else message, others)


def _find_repeated_names(questions: Iterable[Question]) -> Iterator[BadQuestion]:
    """Yield each question whose id was already used on an earlier line."""
    first: dict[str, int] = {}
    for question in questions:
        if question.fields.get("id") is None:
            continue
        line = first.setdefault(question.name, question.line)
        if line != question.line:
            problem = f"the id {shorten(question.name)!r} is that of line {line}"
            yield BadQuestion(question.line, "id", problem)


def fold_prompt(question: Question) -> bytes:
    """Return a key that is equal for prompts that `fold_text` makes equal.

    A plain text has the key of a user's turn, as which the chat template asks it.
    """
    prompt = question.prompt
    turns = [["user", prompt]] if isinstance(prompt, str) else [turn.values() for turn in prompt]
    return b"\0".join(fold_text(p.encode(errors="surrogatepass")) for turn in turns for p in turn)


def question_label(question: Question) -> str:
    """Return a question's id or line and the beginning of its text: `line 3 ("Where is ...")`."""
    prompt = question.prompt
    text = shorten(prompt if isinstance(prompt, str) else prompt[-1]["content"], 60)
    name = f"line {question.line}" if question.fields.get("id") is None else question.name
    return f'{shorten(name)} ("{text}")'


def expected_label(question: Question) -> str | None:
    """Return the accepted answers on one line, joined by "or"; None if no answer is expected."""
    texts = list_expected_texts(question)
    return shorten(" or ".join(texts), MAX_EXPECTED_CHARACTERS) if texts else None


def list_expected_texts(question: Question) -> list[str]:
    """Return the accepted answers as texts; empty if no answer is expected."""
    answers = [answer for answer in question.accepted if answer is not None]
    return [answer if isinstance(answer, str) else json.dumps(answer) for answer in answers]


def strip_pattern(pattern: str) -> list[str]:
    """Return the alternatives of a regular expression: often texts that it matches.

    They are without anchors, flags and groups: `(?i)^(Oslo|Bergen)$` gives `Oslo` and `Bergen`.
    """
    bare = re.sub(r"\(\?[a-zA-Z]+\)|\(\?:|\\[bBAZ]|(?:\\[sW.]|\.)[*+?]|(?<!\\)[\^$()]", "", pattern)
    return [re.sub(r"\\(\W)", r"\1", text) for text in re.split(r"(?<!\\)\|", bare)]
