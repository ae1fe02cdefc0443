"""A run's tiers.json.

Separate from tier_assignment.py, whose importers (optimizers, benchmarks) need no pydantic.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from nested_core.errors import DamagedError
from nested_core.optim.tier_assignment import TierMap
from nested_core.storage.json_file import JsonFile

TIERS_FILE = JsonFile(TierMap, 2**24)


def write_tiers(path: Path, tiers: TierMap) -> None:
    """Write tiers.json, with the parameters in the order of their names."""
    TIERS_FILE.write(path, replace(tiers, tensors=dict(sorted(tiers.tensors.items()))))


def read_tiers(path: Path) -> TierMap:
    """Read tiers.json; DamagedError if it is not what `write_tiers` writes."""
    tiers = TIERS_FILE.read(path)
    if min(tiers.frequencies, default=1) < 1:
        raise DamagedError(f"{path} has a frequency below 1.")
    if not all(0 <= tier < len(tiers.frequencies) for tier in tiers.tensors.values()):
        raise DamagedError(f"{path} names a tier that has no frequency.")
    return tiers
