"""What follows from each key's line in the schema: one place to ask about all keys at once."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nested_core.config.section_base import Affects, PathRule, Section
from nested_core.config.sections import LINEAGE, SPLITS_BY_HELD_OUT_CHOICE

SectionType = TypeVar("SectionType", bound=Section)


@dataclass(frozen=True)
class Key:
    """One key: its dotted name in YAML, such as `training.max_grad_norm`, and its declaration.

    `section` is the section whose keys the value holds, itself or in a list.
    """

    name: str
    field: FieldInfo
    affects: Affects
    section: type[BaseModel] | None

    @property
    def is_section(self) -> bool:
        """Whether the value is one section: neither a list of them nor a section or null."""
        return self.section is not None and self.field.annotation is self.section

    @property
    def changes_adapter(self) -> bool:
        """Whether another value, under the same model and data, can give another adapter."""
        return self.affects in ("training", "length", "ranks")


def iterate_keys(
    section: type[BaseModel], prefix: str = "", affects: Affects = "training"
) -> Iterator[Key]:
    """Every key of a section and of the sections in it, each section before its keys."""
    for name, field in section.model_fields.items():
        extra: Any = field.json_schema_extra or {}
        inner = section_in_annotation(field.annotation)
        key = Key(prefix + (field.alias or name), field, extra.get("affects", affects), inner)
        yield key
        if inner is not None:
            yield from iterate_keys(inner, f"{key.name}.", key.affects)


def iterate_configured_paths(section: Section) -> list[tuple[str, PathRule, str]]:
    """Every path that a configuration gives: the key's name, what it may name, its value."""
    paths: list[tuple[str, PathRule, str]] = []

    def keep(key: str, rule: PathRule, value: str) -> str:
        """Note the path and leave it."""
        paths.append((key, rule, value))
        return value

    replace_configured_paths(section, keep)
    return paths


def replace_configured_paths(
    section: SectionType, replace: Callable[[str, PathRule, str], str], prefix: str = ""
) -> SectionType:
    """A copy with what `replace` makes of each path, by its key's name, rule and value."""
    changes: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        value, extra = getattr(section, name), field.json_schema_extra
        rule: Any = extra.get("path") if isinstance(extra, dict) else None

        def replace_in(value: Any, key: str, rule: Any = rule) -> Any:
            """The value with other paths in it."""
            if isinstance(value, Section):
                return replace_configured_paths(value, replace, f"{key}.")
            if isinstance(value, tuple):
                return tuple(replace_in(item, f"{key}[{n}]") for n, item in enumerate(value))
            is_path = rule is not None and value is not None
            return replace(key, rule, value) if is_path and value not in words(rule) else value

        changes[name] = replace_in(value, prefix + (field.alias or name))
    given = set(section.model_fields_set)
    copy = section.model_copy(update=changes)
    copy.model_fields_set.intersection_update(given)
    return copy


def words(rule: PathRule) -> Collection[str]:
    """The values that are no path where a key's value may be one."""
    return {"local_or_split": SPLITS_BY_HELD_OUT_CHOICE, "local_or_lineage": (LINEAGE,)}.get(
        rule, ()
    )


def section_in_annotation(annotation: Any) -> type[BaseModel] | None:
    """The section in a field's type: `Section`, `Section | None` or `tuple[Section, ...]`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    sections = (section_in_annotation(part) for part in get_args(annotation))
    return next((section for section in sections if section is not None), None)


def settings_that_shape_adapter(config: Section) -> dict[str, Any]:
    """The values of the keys that can change the adapter, as JSON; data and model left out."""
    keys = {key.name: key for key in iterate_keys(type(config))}

    def select(values: dict[str, Any], prefix: str) -> dict[str, Any]:
        """Those of one section, whose keys begin with `prefix`."""
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
