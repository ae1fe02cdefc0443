"""Strict reader of a run's tiers.json.

Separate from tier_assignment.py, whose importers (optimizers, benchmarks) need no pydantic.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from nested_core.errors import DamagedError
from nested_core.optim.tier_assignment import TierMap
from nested_core.storage.json_file import JsonFile


class _TiersFile(TypedDict):
    """The content of tiers.json."""

    frequencies: list[Annotated[int, Field(ge=1, strict=True)]]
    tensors: dict[str, Annotated[int, Field(ge=0, strict=True)]]


TIERS_FILE = JsonFile(_TiersFile, 2**24)


def read_tiers(path: Path) -> TierMap:
    """Read tiers.json; DamagedError if it is not what `TierMap.to_json` returns."""
    fields = TIERS_FILE.read(path)
    if any(tier >= len(fields["frequencies"]) for tier in fields["tensors"].values()):
        raise DamagedError(f"{path} names a tier that has no frequency.")
    return TierMap.from_json(fields)
