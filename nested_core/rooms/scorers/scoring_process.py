"""The program of the process that runs a suite's functions, patterns and schemas.

It receives items: an answer to score, or a question whose pattern or schema to check. It imports
nothing of this project, and discards what a scorer prints. The process that started it ends it when
an item takes too long.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

Scorer = Callable[[str, dict[str, Any]], float]


def find_regex_problem(question: dict[str, Any]) -> str | None:
    """Return why one of the expected regular expressions does not compile, or None."""
    for pattern in _as_list(question["expected"]):
        try:
            re.compile(pattern)
        except (re.error, RecursionError, OverflowError) as error:
            return f"expected: {_shorten(repr(pattern), 60)} is no regular expression: {error}"
    return None


def find_schema_problem(question: dict[str, Any]) -> str | None:
    """Return why the question's schema is no valid JSON Schema; None if it is, or is missing."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import SchemaError
    from jsonschema.validators import validator_for
    from jsonschema_specifications import REGISTRY
    from referencing.exceptions import Unresolvable
    from referencing.jsonschema import specification_with

    schema = _schema_of(question)
    dialect = schema.get("$schema") if isinstance(schema, dict) else None
    if dialect is not None and validator_for({"$schema": str(dialect)}, default=None) is None:
        return f"schema: {_shorten(repr(dialect), 60)} is no JSON Schema that is known"
    validator = validator_for(schema, default=Draft202012Validator)
    try:
        validator.check_schema(schema)
        whole = specification_with(validator.META_SCHEMA["$schema"]).create_resource(schema)
        _look_up_references(whole, REGISTRY.resolver_with_root(whole))
        validator(schema).is_valid(None)
    except Unresolvable as error:
        reference = _shorten(repr(error.ref), 80)
        return f"schema: $ref {reference} leads to nothing; other schemas are not loaded"
    except RecursionError:
        return "schema: a $ref leads back to itself, or it is nested too deep"
    except SchemaError as error:
        key = ".".join(["schema", *map(str, error.absolute_path)])
        return f"{_shorten(key, 80)} is no JSON schema: {_shorten(error.message, 160)}"
    return None


def _look_up_references(schema: Any, resolver: Any) -> None:
    """Look up each `$ref` of a schema (a resource of `referencing`); may raise Unresolvable."""
    if isinstance(schema.contents, dict) and "$ref" in schema.contents:
        resolver.lookup(schema.contents["$ref"])
    for part in schema.subresources():
        _look_up_references(part, resolver.in_subresource(part))


def _schema_of(question: dict[str, Any]) -> Any:
    """Return the question's JSON schema; without one True, the schema that every value fits."""
    schema = question.get("schema")
    return True if schema is None else schema


def _as_list(value: Any) -> list[Any]:
    """Wrap a value in a list unless it is a list."""
    return value if isinstance(value, list) else [value]


def _shorten(text: str, characters: int) -> str:
    """Cut a text to at most `characters` characters."""
    return text if len(text) <= characters else text[: characters - 3] + "..."


def score_regex(answer: str, question: dict[str, Any]) -> float:
    """Return 1 if one of the expected regular expressions is found anywhere in the answer."""
    return float(any(re.search(pattern, answer) for pattern in _as_list(question["expected"])))


def score_json(answer: str, question: dict[str, Any]) -> float:
    """Return 1 if the answer's first JSON value fits the schema and has the expected fields.

    Otherwise, and without a JSON value, it is 0. Both conditions are checked as JSON schemas.
    """
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
    # With an empty registry, a reference to another schema is an error instead of a download.
    registry: Registry[Any] = Registry()
    validator = validator_for(schema, default=Draft202012Validator)
    checks = validator(schema, registry=registry), Draft202012Validator(expected)
    return float(all(check.is_valid(value) for check in checks))


def first_json_value(text: str) -> Any:
    """Return the first JSON object or array in a text, or else its first other JSON value.

    Objects and arrays come first because in "The 2 items: [...]" the number belongs to the
    sentence. Raises ValueError if there is no JSON value.
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
    """Raise ValueError for NaN or Infinity in JSON."""
    raise ValueError(f"{word} is no JSON")


def load_scorer_function(module_and_name: str, folder: str) -> Scorer:
    """Import the function named as "module:function", of a file in `folder` if there is one.

    No installed or loaded module of that name hides the file, and it hides none.
    """
    module, _, name = module_and_name.partition(":")
    sys.path.append(folder)
    file = Path(folder, *module.split(".")).with_suffix(".py")
    own_name = re.sub(r"\w+$", r"scorer:\g<0>", module)  # no other module's, in the same package
    spec = spec_from_file_location(own_name, file) if file.is_file() else None
    if spec is None or spec.loader is None:
        function: Scorer = getattr(import_module(module), name)
    else:
        sys.modules[spec.name] = loaded = module_from_spec(spec)  # where data classes look
        spec.loader.exec_module(loaded)
        function = getattr(loaded, name)
    if not callable(function):
        raise TypeError(f"{module_and_name} is not callable")
    return function


def require_valid_score(score: Any) -> float:
    """Return a score from 0 to 1 as a float; TypeError or ValueError for anything else."""
    if not isinstance(score, int | float):
        raise TypeError(f"it returned a {type(score).__name__}, not a number from 0 to 1")
    value = float(score)  # a subclass of int or float may override comparison
    if not 0 <= value <= 1:
        raise ValueError(f"it returned {value:g}, not a number from 0 to 1")
    return value


def answer(request: dict[str, Any]) -> Any:
    """Process one request of the parent: score or check its item; None if there is no item.

    A request without an item only loads the scorer.
    """
    signal.alarm(request["most_seconds"])  # ends this process if its parent is gone
    do_item = prepare(request["work"], request["score"], request["function"], request["folder"])
    return None if request["item"] is None else do_item(request["item"])


@lru_cache(maxsize=1)
def prepare(
    work: str, score: str, function: str | None, folder: str
) -> Callable[[dict[str, Any]], Any]:
    """Return the function that checks or scores an item.

    work: "check" for questions, "score" for answers. score: the configured way of scoring.
    function: a person's own scorer, importable from `folder`; None for a built-in one.

    Also silences the process's output.
    """
    null_device = os.open(os.devnull, os.O_RDWR)
    for descriptor in (1, 2):
        os.dup2(null_device, descriptor)
    if score == "json":
        import_module("jsonschema")  # now, so that it does not count against the first question
    if work == "check":
        return _make_check(score)
    builtin: dict[str, Scorer] = {"regex": score_regex, "json": score_json}
    scorer = builtin.get(score) or load_scorer_function(str(function), folder)
    return lambda item: require_valid_score(scorer(item["answer"], item["question"]))


def _make_check(score: str) -> Callable[[dict[str, Any]], str | None]:
    """Return a function that gives the problem of an item's question, or None."""
    find_problem = {"regex": find_regex_problem, "json": find_schema_problem}[score]
    problems: dict[str, str | None] = {}  # cached: most suites repeat one schema in all lines

    def check(item: dict[str, Any]) -> str | None:
        """Return what is wrong with the item's question, or None."""
        checked = {name: item["question"].get(name) for name in ("expected", "schema")}
        key = json.dumps(checked if score == "regex" else checked["schema"])
        if key not in problems:
            problems[key] = find_problem(item["question"])
        return problems[key]

    return check
