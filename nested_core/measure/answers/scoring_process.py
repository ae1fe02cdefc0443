"""The process that runs what a suite brings along: functions, patterns, schemas.

Its answer to an item is the score of an answer, or what is wrong with a question's pattern or
schema. It imports nothing of this project, and what a scorer prints goes nowhere. Who started it
ends it when an item takes too long.
"""

from __future__ import annotations

import json
import os
import re
import resource
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib import import_module
from typing import Any

Scorer = Callable[[str, dict[str, Any]], float]
MAX_MEMORY_BYTES = 2 * 2**30  # of patterns and schemas; a Python scorer may load a model


def find_regex_problem(question: dict[str, Any]) -> str | None:
    """Why one of the expected regular expressions does not compile."""
    for pattern in _as_list(question["expected"]):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return f"expected: {_shorten(repr(pattern), 60)} is no regular expression: {error}"
    return None


def find_schema_problem(question: dict[str, Any]) -> str | None:
    """Why the schema is no JSON Schema; None without one."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for

    schema = _schema_of(question)
    named = schema.get("$schema") if isinstance(schema, dict) else None
    if named is not None and validator_for({"$schema": str(named)}, default=None) is None:
        return f"schema: {_shorten(repr(named), 60)} is no JSON Schema that is known"
    try:
        validator_for(schema, default=Draft202012Validator).check_schema(schema)
    except SchemaError as error:
        place = ".".join(["schema", *map(str, error.absolute_path)])
        return f"{_shorten(place, 80)} is no JSON schema: {_shorten(error.message, 160)}"
    return None


def _schema_of(question: dict[str, Any]) -> Any:
    """The question's JSON schema; without one, the schema that every value fits."""
    schema = question.get("schema")
    return True if schema is None else schema


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _shorten(text: str, characters: int) -> str:
    return text if len(text) <= characters else text[: characters - 3] + "..."


def score_regex(answer: str, question: dict[str, Any]) -> float:
    """1 where one of the expected regular expressions is found anywhere in the answer."""
    return float(any(re.search(pattern, answer) for pattern in _as_list(question["expected"])))


def score_json(answer: str, question: dict[str, Any]) -> float:
    """1 where the answer's first JSON value fits the schema and has the expected fields."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry

    try:
        value = first_json_value(answer)
    except ValueError:
        return 0.0
    schema = _schema_of(question)
    fields = question.get("expected") or {}
    equal = {name: {"const": field} for name, field in fields.items()}
    expected = {"type": "object", "required": list(fields), "properties": equal} if fields else True
    # An empty registry of its own: a reference to another place is an error, never a download.
    registry: Registry[Any] = Registry()
    validator = validator_for(schema, default=Draft202012Validator)
    checks = validator(schema, registry=registry), Draft202012Validator(expected)
    return float(all(check.is_valid(value) for check in checks))


def first_json_value(text: str) -> Any:
    """The first object or array in a text; in one without any, the first other JSON value.

    A number or a quoted word before it, as in "The 2 items: [...]", belongs to the sentence.
    Raises ValueError if there is no JSON value.
    """
    decoder = json.JSONDecoder(parse_constant=_refuse_nan_and_infinity)
    for starts in (r"[{\[]", r'["\-0-9tfn]'):
        for match in re.finditer(starts, text):
            try:
                return decoder.raw_decode(text, match.start())[0]
            except RecursionError:
                raise ValueError("it is nested too deeply") from None
            except ValueError:
                continue
    raise ValueError("no JSON value")


def _refuse_nan_and_infinity(word: str) -> None:
    raise ValueError(f"{word} is no JSON")


def load_scorer_function(module_and_name: str, folder: str) -> Scorer:
    """The function that "module:function" names; modules are found in `folder` too."""
    module, _, name = module_and_name.partition(":")
    sys.path.append(folder)
    function: Scorer = getattr(import_module(module), name)
    if not callable(function):
        raise TypeError(f"{module_and_name} is not callable")
    return function


def require_valid_score(score: Any) -> float:
    """A share from 0 to 1, of a number or a boolean; TypeError or ValueError for anything else."""
    if not isinstance(score, int | float):
        raise TypeError(f"it returned a {type(score).__name__}, not a number from 0 to 1")
    value = float(score)  # of a subclass, which may compare otherwise
    if not 0 <= value <= 1:
        raise ValueError(f"it returned {value:g}, not a number from 0 to 1")
    return value


def answer(request: dict[str, Any]) -> Any:
    """What comes of an item; None for a request without an item, which only loads the scorer."""
    signal.alarm(request["most_seconds"])  # should who started it be gone
    do_item = prepare(request["work"], request["score"], request["function"], request["folder"])
    return None if request["item"] is None else do_item(request["item"])


@lru_cache(maxsize=1)
def prepare(
    work: str, score: str, function: str | None, folder: str
) -> Callable[[dict[str, Any]], Any]:
    """What is done with each item: a question is checked, or an answer scored."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(nowhere, descriptor)
    if function is None:
        _limit_memory()
    if score == "json":
        import_module("jsonschema")  # now, and not in the time of the first question
    if work == "check":
        return _make_check(score)
    own: dict[str, Scorer] = {"regex": score_regex, "json": score_json}
    scorer = own.get(score) or load_scorer_function(str(function), folder)
    return lambda item: require_valid_score(scorer(item["answer"], item["question"]))


def _limit_memory() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = MAX_MEMORY_BYTES if hard == resource.RLIM_INFINITY else min(MAX_MEMORY_BYTES, hard)
    with suppress(ValueError, OSError):  # macOS does not keep this limit
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))


def _make_check(score: str) -> Callable[[dict[str, Any]], str | None]:
    """What says of an item what is wrong with its question, or None."""
    find_problem = {"regex": find_regex_problem, "json": find_schema_problem}[score]
    known: dict[str, str | None] = {}  # most suites have one schema in all their lines

    def check(item: dict[str, Any]) -> str | None:
        """What is wrong with the item's question, or None."""
        checked = {name: item["question"].get(name) for name in ("expected", "schema")}
        key = json.dumps(checked if score == "regex" else checked["schema"])
        if key not in known:
            known[key] = find_problem(item["question"])
        return known[key]

    return check
