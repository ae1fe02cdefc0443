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
    """Reader and writer of JSON files that hold one type.

    type: the type of the content; a dataclass if `write` is used.
    max_bytes: the largest file that is read; None for the size of main memory.
    """

    type: type[Value]
    max_bytes: int | None

    @cached_property
    def _validator(self) -> TypeAdapter[Value]:
        """The pydantic validator of the type."""
        from pydantic import TypeAdapter

        return TypeAdapter(self.type)

    def read(self, path: Path) -> Value:
        """Read a file; DamagedError if it is missing, too large or of another form."""
        values = read_json(path, self.max_bytes)
        with naming_damaged_file(path):
            return self._validator.validate_json(json.dumps(values), strict=True)

    def write(self, path: Path, value: Any, *, confirm: Confirm | None = None) -> None:
        """Replace a file atomically; a number that is not finite becomes null.

        confirm: called just before the rename; if it raises, the old file stays.
        """
        write_json(path, finite_or_none(asdict(value)), confirm=confirm)
