"""The program of the process that runs what a suite brings along: functions, patterns, schemas.

It reads a request, a JSON file, and writes one JSON line an answer on standard output. It imports
nothing of this project, and prints nothing: what a scorer prints goes nowhere. Who started it ends
it when an answer takes too long.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

Scorer = Callable[[str, dict[str, Any]], float]


def score_regex(answer: str, question: dict[str, Any]) -> float:
    """1 where one of the expected regular expressions is found anywhere in the answer."""
    expected = question["expected"]
    patterns = expected if isinstance(expected, list) else [expected]
    return float(any(re.search(pattern, answer) for pattern in patterns))


def score_json(answer: str, question: dict[str, Any]) -> float:
    """1 where the answer's first JSON value fits the schema and has the expected fields."""
    from jsonschema import Draft202012Validator
    from jsonschema.validators import validator_for
    from referencing import Registry

    try:
        value = first_json_value(answer)
    except ValueError:
        return 0.0
    schema = question["schema"]
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
    if not 0 <= score <= 1:
        raise ValueError(f"it returned {score}, not a number from 0 to 1")
    return float(score)


def main(request_path: str) -> None:
    """Score the answers of a request in turn, until one raises."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    nowhere = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):
        os.dup2(nowhere, descriptor)
    with open(request_path, encoding="utf-8") as file:
        request = json.load(file)

    def write(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        signal.alarm(request["most_seconds"])  # should who started it be gone
        own: dict[str, Scorer] = {"regex": score_regex, "json": score_json}
        scorer = own.get(request["score"]) or load_scorer_function(
            request["function"], request["folder"]
        )
        write(ready=True)
        for item in request["items"]:
            signal.alarm(request["most_seconds"])
            write(score=require_valid_score(scorer(item["answer"], item["question"])))
    except BaseException as error:  # a scorer may raise SystemExit or KeyboardInterrupt
        write(error=f"{type(error).__name__}: {error}"[:300])


if __name__ == "__main__":
    main(sys.argv[1])
