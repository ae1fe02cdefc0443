"""Messages for a configuration that is refused: every problem, its place, and what was meant."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_origin

from pydantic import BaseModel, ValidationError

from nested_core.config.key_properties import iterate_keys, section_in_annotation
from nested_core.config.section_base import SectionProblemsError
from nested_core.errors import list_first
from nested_core.seams import load_all
from nested_core.text.foreign_text import escape

MAX_SHOWN_PROBLEMS = 10
_WORD_PATTERN = re.compile(r"\w+")


@dataclass(frozen=True)
class OtherTrainersKeys:
    """A room's table of what other trainers call our keys.

    ours: our key for each of theirs, with a remark after "; " if the meaning differs.
    hints: what to do in place of a key of theirs that has none here, as the end of a sentence.
    """

    ours: Mapping[str, str] = field(default_factory=dict)
    hints: Mapping[str, str] = field(default_factory=dict)


def read_keys_of_other_trainers() -> OtherTrainersKeys:
    """Return the keys of other trainers; empty if the room other_trainers is not installed."""
    return next(load_all(OtherTrainersKeys), OtherTrainersKeys())


class Problem(NamedTuple):
    """What is wrong with one key, or with a section's keys together; "" is the top level."""

    key: str
    message: str


def explain_problems(problems: list[Problem], source: str, places: Mapping[str, str]) -> str:
    """Build the error message: one line a problem, with the line or the flag of its key.

    source: the configuration's file; it is not named if only flags are wrong.
    places: where each key was given, such as `line 9`.
    """
    given = [_find_place(problem, places) for problem in problems]
    are_flags = all(place.startswith("--") for place in given)
    what = "The command line" if are_flags else f"The configuration in {escape(source)}"
    lines = [escape(_format_problem(*pair)) for pair in zip(problems, given, strict=True)]
    shown = (f"\n  {line}" for line in list_first(lines, MAX_SHOWN_PROBLEMS))
    return f"{what} cannot be used:{''.join(shown)}"


def _find_place(problem: Problem, places: Mapping[str, str]) -> str:
    """Return where a key was given; for a key in a list without a place, that of the list.

    For a section's keys together it is that of the first key of it that the message names.
    """
    key = problem.key
    named = (f"{key}.{word}" for word in _WORD_PATTERN.findall(problem.message))
    key = next((name for name in named if key and name in places), key)
    while key and key not in places:
        key = key.rpartition(".")[0]
    return places.get(key, "")


def _format_problem(problem: Problem, place: str) -> str:
    """Format a problem as `key: message (place)`."""
    at = f" ({place})" if place else ""
    return f"{problem.key}: {problem.message}{at}" if problem.key else problem.message


def find_problems(schema: type[BaseModel], values: Mapping[str, object]) -> list[Problem]:
    """Return every problem that a pydantic model finds in values; empty if they are valid.

    Checks across keys only run if each key is valid by itself. So the values are validated again
    without the keys that were refused, and further problems count unless they name a refused key,
    because they may be about the default in its place.
    """
    problems: list[Problem] = []
    refused: set[str] = set()
    while True:
        try:
            schema.model_validate(dict(values))
            return problems
        except ValidationError as error:
            details: list[dict[str, Any]] = [dict(d) for d in error.errors(include_url=False)]
        # `refused` holds the keys of earlier rounds, in whose place a default was checked now
        found = (one for detail in details for one in _describe_pydantic_error(detail, schema))
        for problem in found:
            if refused.isdisjoint(_WORD_PATTERN.findall(f"{problem.key} {problem.message}")):
                problems.append(problem)
        # Without the refused values, further checks can run
        paths = {_longest_existing_path(values, one["loc"]): one["type"] for one in details}
        paths.pop((), None)  # a problem of the whole, which cannot be left out
        if not paths:
            return problems
        for path, cause in paths.items():
            values = _remove_at(values, path)
            if cause != "extra_forbidden":  # an unknown key has no default
                refused.add(path[-1])


def _longest_existing_path(values: Mapping[str, Any], location: tuple[Any, ...]) -> tuple[str, ...]:
    """Return the keys of a problem's location that exist in the values, to the last mapping."""
    path: list[str] = []
    inner: object = values
    for part in location:
        if not isinstance(inner, Mapping) or part not in inner:
            break
        path.append(part)
        inner = inner[part]
    return tuple(path)


def _remove_at(values: Mapping[str, Any], path: tuple[str, ...]) -> dict[str, object]:
    """Return the values without the one at a path of keys."""
    first, *rest = path
    others = {key: value for key, value in values.items() if key != first}
    if rest and first in values:
        return others | {first: _remove_at(values[first], tuple(rest))}
    return others


def _describe_pydantic_error(detail: dict[str, Any], schema: type[BaseModel]) -> Iterator[Problem]:
    """Yield the problems in one entry of pydantic's list of errors."""
    location = detail["loc"]
    key = ".".join(str(part) for part in location)
    cause = detail.get("ctx", {}).get("error")
    if detail["type"] == "extra_forbidden":
        yield Problem(key, f"unknown key{_suggest_known_key(location, schema)}")
    elif isinstance(cause, SectionProblemsError):
        yield from (Problem(key, message) for message in cause.problems)
    elif detail["type"] == "model_type" and isinstance(detail["input"], list):
        yield Problem(key, _describe_list_for_section(location, detail["input"], schema))
    else:
        message = detail["msg"].removeprefix("Value error, ").replace("a valid tuple", "a list")
        value = "" if detail["type"] == "value_error" else f"; found {detail['input']!r:.80}"
        yield Problem(key, f"{message}{value}{_suggest_value(detail)}")


def _describe_list_for_section(
    location: tuple[object, ...], given: list[object], schema: type[BaseModel]
) -> str:
    """Describe a list given in place of a section, with the section's key that takes a list."""
    section = _section_at(location, schema)
    fields = {} if section is None else section.model_fields
    lists = [name for name, field in fields.items() if get_origin(field.annotation) is tuple]
    meant = f"; did you mean {{{lists[0]}: {given!r:.60}}}?" if lists else ""
    return f"expected keys with their values, not a list{meant}"


def _suggest_value(detail: Mapping[str, Any]) -> str:
    """Suggest what was meant by a value: a similarly spelt word, or a list with its brackets."""
    given = detail["input"]
    if not isinstance(given, str):
        return ""
    if detail["type"] == "literal_error":
        words = re.findall(r"'([^']*)'", str(detail["ctx"]["expected"]))
        close = difflib.get_close_matches(given, words, n=1)
        return f"; did you mean {close[0]}?" if close else ""
    if detail["type"] == "tuple_type" and "," in given:
        return f"; did you mean [{given:.60}]?"
    return ""


def _suggest_known_key(location: tuple[Any, ...], schema: type[BaseModel]) -> str:
    """Suggest what to write for an unknown key: it may be another tool's, misplaced or a typo.

    location: the names and indices that lead to the key, itself last.

    Returns the end of a message, such as `; did you mean ITERS?`; empty if nothing is like it.
    """
    name = str(location[-1])
    others = read_keys_of_other_trainers()
    if name in others.hints:
        return f"; {name} {others.hints[name]}"
    if name in others.ours:
        meant, _, remark = others.ours[name].partition("; ")
        return f"; did you mean {meant}?{remark and f' ({remark})'}"
    section = _section_at(location[:-1], schema)
    if section is None:
        return ""
    known_names = [one.alias or name for name, one in section.model_fields.items()]
    typo_of = difflib.get_close_matches(name, known_names, n=1, cutoff=0.8)
    elsewhere = [key.name for key in iterate_keys(schema) if key.name.endswith(f".{name}")]
    if name in schema.model_fields:
        elsewhere = [f"{name} at the top level", *elsewhere]
    similar = difflib.get_close_matches(name, known_names, n=1, cutoff=0.5)
    # The best first: a name that differs by a letter, the same name elsewhere, a name that is alike
    suggestions = [*typo_of, *elsewhere, *similar]
    return f"; did you mean {suggestions[0]}?" if suggestions else ""


def _section_at(path: tuple[object, ...], schema: type[BaseModel]) -> type[BaseModel] | None:
    """Return the section that a location's keys lead to; None if they lead to no section."""
    section: type[BaseModel] | None = schema
    for part in path:
        if isinstance(part, str) and section is not None:
            fields = {one.alias or name: one for name, one in section.model_fields.items()}
            section = section_in_annotation(fields[part].annotation) if part in fields else None
    return section
