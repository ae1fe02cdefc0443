"""A JSON file of a run: the type that it holds, read strictly and replaced whole."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from nested_core.errors import naming_damaged_file
from nested_core.storage.atomic import Confirm, finite_or_none, write_json
from nested_core.storage.untrusted_files import read_json

if TYPE_CHECKING:
    from pydantic import TypeAdapter

Value = TypeVar("Value")


@dataclass(frozen=True)
class JsonFile(Generic[Value]):
    """How files of one kind are read and written.

    type: what they hold, for pydantic; a dataclass where the file is written by `write`.
    max_bytes: the largest file that is read; None is what fits into this machine's memory.
    """

    type: type[Value]
    max_bytes: int | None

    @cached_property
    def _validator(self) -> TypeAdapter[Value]:
        from pydantic import TypeAdapter

        return TypeAdapter(self.type)

    def read(self, path: Path) -> Value:
        """The value in a file; DamagedError where it is missing, too large or of another form."""
        values = read_json(path, self.max_bytes)
        with naming_damaged_file(path):
            return self._validator.validate_json(json.dumps(values), strict=True)

    def write(self, path: Path, value: Any, *, confirm: Confirm | None = None) -> None:
        """Replace a file; a number that is not finite becomes null.

        `confirm` is called just before the file takes its place; what it raises leaves the old one.
        """
        write_json(path, finite_or_none(asdict(value)), confirm=confirm)
