"""The base class of every configuration section, and `key`, which declares one key on one line."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from nested_core.storage.addresses import is_in_bucket, require_bucket, require_no_address

# What a key has a say in, and so what follows from a change of it:
#   training  the adapter that comes out: fixed on resume; another value means another adapter
#   length    how long a run trains: may differ on resume; another value means another adapter
#   ranks     how many processes share a batch: may differ on resume, and the run says so; another
#             value means another adapter, by the rounding of sums and by dropout
#   source    where something is read from: fixed on resume; its content decides, not its name
#   output    what is reported, kept and judged: may differ on resume; the adapter is the same
Affects = Literal["training", "length", "ranks", "source", "output"]
# What a key makes of a loss, so that losses under two values of it are no comparison:
#   rows   which rows it is of
#   value  what the loss of a row is: its tokens, which of them count, and the function
InLoss = Literal["rows", "value"]
# What a key's value names: a file or folder here, or that or else a repository of the hub, or that
# or else the data set's splits, or that or else the word lineage; an address of object storage, or
# that of the first two.
PathRule = Literal[
    "local", "local_or_hub", "local_or_split", "local_or_lineage", "bucket", "local_hub_or_bucket"
]


def key(
    default: Any,
    description: str,
    *,
    affects: Affects | None = None,
    in_loss: InLoss | None = None,
    path: PathRule | None = None,
    in_form: bool = True,
    **constraints: Any,
) -> Any:
    """Declare a configuration key: its default (`...` for none), its description and properties.

    affects: what a change of the key affects; by default its section's, or "training".
    in_loss: what the key makes of a loss; by default its section's, or nothing.
    path: what kind of path the value is, if it is one.
    in_form: whether Prefect's form shows the key; it can be given everywhere else anyway.
    constraints: further arguments of pydantic's Field.

    The flag, the form, docs/configuration.md, the rules on resume, whether a continual run trains
    again, which losses are compared, and the paths that a deployment may use are derived from this.
    """
    shown = None if in_form else False
    facts = {"affects": affects, "in_loss": in_loss, "path": path, "in_form": shown}
    given: Any = {name: value for name, value in facts.items() if value is not None}
    return Field(default, description=description, json_schema_extra=given or None, **constraints)


class SectionProblemsError(ValueError):
    """The conflicts between the values of one section."""

    def __init__(self, problems: Iterable[str]) -> None:
        """Create the error with one message for each conflict."""
        self.problems = tuple(problems)
        super().__init__("; ".join(self.problems))


def lay_out_form(schema: dict[str, Any]) -> None:
    """Arrange a section's JSON schema as the form that a page shows, in the order of declaration.

    schema: changed in place.

    `position` keeps the order, because databases do not keep that of keys. The description becomes
    a sentence. A key that is not in the form (`in_form` is false) becomes a pattern that matches
    its name alone: pages do not show patterns, and validators use them.
    """
    shown: dict[str, object] = {}
    hidden: dict[str, object] = {}
    for name, field in schema.get("properties", {}).items():
        text = str(field.get("description", ""))
        if text:
            field["description"] = text[0].upper() + text[1:] + ("" if text.endswith(".") else ".")
        if field.pop("in_form", True):
            title = name.replace("_", " ").title()  # which a section's own name would replace
            shown[name] = {"title": title} | field | {"position": len(shown)}
        else:
            hidden[f"^{re.escape(name)}$"] = field
    schema["properties"] = shown
    if hidden:
        schema["patternProperties"] = hidden


class Section(BaseModel):
    """A section of the configuration: immutable, and without unknown keys."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        serialize_by_alias=True,
        json_schema_extra=lay_out_form,
    )

    def find_conflicts(self) -> Iterator[str]:
        """Yield conflicts between the keys of this section; subclasses override it."""
        return iter(())

    @model_validator(mode="after")
    def _refuse_problems(self) -> Self:
        """Raise an error with all conflicts between the keys of the section."""
        problems = tuple(self.find_conflicts())
        if problems:
            raise SectionProblemsError(problems)
        return self

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, value: object, info: ValidationInfo) -> object:
        """Refuse true and false for keys that are not boolean.

        Pydantic would read them as 1 and 0.
        """
        values = value if isinstance(value, list | tuple) else (value,)
        is_switch = cls.model_fields[str(info.field_name)].annotation is bool
        if not is_switch and (found := [item for item in values if isinstance(item, bool)]):
            raise ValueError(f"true and false mean nothing here; found {found[0]}")
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _read_path(cls, value: object, info: ValidationInfo) -> object:
        """Refuse addresses, and expand `~` once, so that the path that is checked is opened."""
        facts = cls.model_fields[str(info.field_name)].json_schema_extra
        rule = facts.get("path") if isinstance(facts, dict) else None
        is_path = rule is not None
        if is_path and isinstance(value, list | tuple):
            return [cls._read_path(one, info) for one in value]
        if is_path and isinstance(value, str):
            if rule == "bucket" or (rule == "local_hub_or_bucket" and is_in_bucket(value)):
                require_bucket(value, ValueError)
                return value
            require_no_address(value, ValueError)
            return os.path.expanduser(value)
        return value

    @field_validator("*", mode="before")
    @classmethod
    def _refuse_nul_in_text(cls, value: object) -> object:
        """Refuse a NUL character, which no path, name or pattern can have."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError("a NUL character is in no path and no name. Take it out")
        return value
