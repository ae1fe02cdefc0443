"""tiers.json of a run, read strictly.

Apart from tier_assignment.py, whose importers need no pydantic: the optimizers, the benchmarks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from pydantic import Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic asks for this one below Python 3.12

from nested_core.errors import DamagedError, describe_first_problem
from nested_core.optim.tier_assignment import TierMap
from nested_core.storage.untrusted_files import read_json

MAX_TIERS_BYTES = 16 * 1024 * 1024


class _TiersFile(TypedDict):
    frequencies: list[Annotated[int, Field(ge=1, strict=True)]]
    tensors: dict[str, Annotated[int, Field(ge=0, strict=True)]]


_TIERS_VALIDATOR = TypeAdapter(_TiersFile)


def read_tiers(path: Path) -> TierMap:
    """Read tiers.json; DamagedError if it is not what `TierMap.to_json` gives."""
    value = read_json(path, MAX_TIERS_BYTES)
    try:
        fields = _TIERS_VALIDATOR.validate_python(value)
    except ValidationError as error:
        raise DamagedError(f"{path} holds no tiers ({describe_first_problem(error)}).") from error
    if any(tier >= len(fields["frequencies"]) for tier in fields["tensors"].values()):
        raise DamagedError(f"{path} names a tier that has no frequency.")
    return TierMap.from_json(fields)
