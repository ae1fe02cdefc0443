"""Facts derived from the declaration of each key in the schema."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import reduce
from typing import Any, TypeVar, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nested_core.config.section_base import Affects, InLoss, PathRule, Section
from nested_core.config.sections import LINEAGE, SPLITS_BY_HELD_OUT_CHOICE

SectionType = TypeVar("SectionType", bound=Section)


@dataclass(frozen=True)
class Key:
    """One key of the configuration.

    name: its dotted name in YAML, such as `training.max_grad_norm`.
    field: its declaration.
    affects: what a change of it affects, see section_base.py.
    in_loss: what it makes of a loss, see there; None for nothing.
    section: the section that the value is, or contains in a list; None for a plain value.
    """

    name: str
    field: FieldInfo
    affects: Affects
    in_loss: InLoss | None
    section: type[BaseModel] | None

    @property
    def is_section(self) -> bool:
        """Whether the value is exactly one section: no list of sections, and not optional."""
        return self.section is not None and self.field.annotation is self.section

    @property
    def changes_adapter(self) -> bool:
        """Whether another value, with the same model and data, can give another adapter."""
        return self.affects in ("training", "length", "ranks")


def iterate_keys(
    section: type[BaseModel],
    prefix: str = "",
    affects: Affects = "training",
    in_loss: InLoss | None = None,
) -> Iterator[Key]:
    """Yield every key of a section and of the sections in it, each section before its keys."""
    for name, field in section.model_fields.items():
        extra: Any = field.json_schema_extra or {}
        inner = section_in_annotation(field.annotation)
        facts = (extra.get("affects", affects), extra.get("in_loss", in_loss))
        key = Key(prefix + (field.alias or name), field, *facts, inner)
        yield key
        if inner is not None:
            yield from iterate_keys(inner, f"{key.name}.", *facts)


def iterate_configured_paths(section: Section) -> list[tuple[str, PathRule, str]]:
    """List every path in a configuration: the key's name, what it may name, and its value."""
    paths: list[tuple[str, PathRule, str]] = []

    def keep(key: str, rule: PathRule, value: str) -> str:
        """Record the path and return it unchanged."""
        paths.append((key, rule, value))
        return value

    replace_configured_paths(section, keep)
    return paths


def replace_configured_paths(
    section: SectionType, replace: Callable[[str, PathRule, str], str], prefix: str = ""
) -> SectionType:
    """Return a copy of a section of the configuration in which each path is replaced.

    A key is a path if its declaration has a path rule. By some rules the key also takes words in
    place of a path, such as the name of a split; these stay. Inner sections and lists are gone
    through as well.

    replace: called with the key's dotted name, its path rule and its value; returns the new value.
    prefix: what the names of this section's keys begin with, such as `gate.`.
    """
    changes: dict[str, object] = {}
    for name, field in type(section).model_fields.items():
        value, extra = getattr(section, name), field.json_schema_extra
        rule: object = extra.get("path") if isinstance(extra, dict) else None

        # `rule` is a default argument so that each function keeps the rule of its own key
        def replace_in(value: Any, key: str, rule: Any = rule) -> object:
            """Return a value with all paths in it replaced."""
            if isinstance(value, Section):
                return replace_configured_paths(value, replace, f"{key}.")
            if isinstance(value, tuple):
                return tuple(replace_in(item, f"{key}[{n}]") for n, item in enumerate(value))
            is_path = rule is not None and value is not None
            return replace(key, rule, value) if is_path and value not in words(rule) else value

        changes[name] = replace_in(value, prefix + (field.alias or name))
    # model_copy counts each updated key as given; only those that were given before should be
    given = set(section.model_fields_set)
    copy = section.model_copy(update=changes)
    copy.model_fields_set.intersection_update(given)
    return copy


def words(rule: PathRule) -> Collection[str]:
    """Return the values that are words, not paths, for a key that may have either."""
    return {"local_or_split": SPLITS_BY_HELD_OUT_CHOICE, "local_or_lineage": (LINEAGE,)}.get(
        rule, ()
    )


def section_in_annotation(annotation: object) -> type[BaseModel] | None:
    """Return the section in a field's type: `Section`, `Section | None` or `tuple[Section, ...]`.

    Returns None for any other type.
    """
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    sections = (section_in_annotation(part) for part in get_args(annotation))
    return next((section for section in sections if section is not None), None)


def settings_that_shape_adapter(config: Section) -> dict[str, Any]:
    """Return the values of the keys that can change the adapter, as JSON; no data and model."""
    keys = {key.name: key for key in iterate_keys(type(config))}

    def select(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Select those keys of one section whose full names begin with `prefix`."""
        selected = {}
        for name, value in values.items():
            key = keys[prefix + name]
            if not key.is_section:
                if key.changes_adapter:
                    selected[name] = value
            elif inner := select(value, f"{key.name}."):
                selected[name] = inner
        return selected

    return select(config.model_dump(mode="json"), "")


def settings_that_make_loss(schema: type[Section], values: Any) -> dict[str, object]:
    """Return the values of the keys that make the loss of a row what it is, by dotted names.

    Without data and model, whose content decides and not their names.

    schema: the class of the configuration.
    values: the configuration as JSON; a key that it lacks, such as one of a later version, is None.
    """
    return {
        key.name: reduce(lambda at, name: (at or {}).get(name), key.name.split("."), values)
        for key in iterate_keys(schema)
        if key.in_loss == "value" and key.affects != "source"
    }
