"""Messages for a configuration that is refused, with the nearest known key for an unknown one."""

from __future__ import annotations

import difflib
from typing import Any

from pydantic import BaseModel, ValidationError

from nested_core.config.key_properties import section_in_annotation
from nested_core.config.section import SectionProblems
from nested_core.foreign_text import escape


def explain_validation_error(error: ValidationError, model: type[BaseModel], source: str) -> str:
    """Turn a validation error into lines of "key: what is wrong", with suggestions."""
    problems = error.errors(include_url=False)
    lines = [
        escape(line) for problem in problems for line in _explain_problem(dict(problem), model)
    ]
    shown = lines[:10] + ([f"  and {len(lines) - 10} more"] if len(lines) > 10 else [])
    return f"The configuration in {escape(source)} cannot be used:\n" + "\n".join(shown)


def _explain_problem(problem: dict[str, Any], model: type[BaseModel]) -> list[str]:
    location = problem["loc"]
    key = ".".join(str(part) for part in location)
    if problem["type"] == "extra_forbidden":
        return [f"  {key}: unknown key{_suggest_known_key(location, model)}"]
    prefix = f"  {key}: " if key else "  "
    cause = problem.get("ctx", {}).get("error")
    if isinstance(cause, SectionProblems):
        return [f"{prefix}{message}" for message in cause.problems]
    message = problem["msg"].removeprefix("Value error, ")
    value = "" if problem["type"] == "value_error" else f"; found {problem['input']!r:.80}"
    return [f"{prefix}{message}{value}"]


def _suggest_known_key(location: tuple[Any, ...], model: type[BaseModel]) -> str:
    for part in location[:-1]:
        if isinstance(part, str):
            fields = {field.alias or name: field for name, field in model.model_fields.items()}
            inner = section_in_annotation(fields[part].annotation) if part in fields else None
            if inner is None:
                return ""
            model = inner
    names = [field.alias or name for name, field in model.model_fields.items()]
    close = difflib.get_close_matches(str(location[-1]), names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""
