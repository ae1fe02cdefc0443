"""promoted-to.json: registries that a run was promoted to by hand and config.yaml does not name.

The file protects the run from being pruned while such a registry depends on it.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

from nested_core.errors import DamagedError
from nested_core.storage.atomic import write_json
from nested_core.storage.untrusted_files import file_type, read_json

MAX_BYTES = 2**20
RegistryName: TypeAlias = tuple[str, str]  # the folder as it was given, and the name in it


def read_promoted_to(path: Path) -> tuple[RegistryName, ...]:
    """Read the registries and names; empty without the file, DamagedError for another form."""
    if file_type(path) == "missing":
        return ()
    try:
        return tuple((str(one["registry"]), str(one["name"])) for one in read_json(path, MAX_BYTES))
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path} holds no list of registries: {error!r}.") from error


def add_promoted_to(path: Path, registry: str, name: str) -> None:
    """Add a registry folder and a name in it to the file, unless they are listed already."""
    listed = dict.fromkeys([*read_promoted_to(path), (registry, name)])
    write_json(path, [{"registry": one, "name": its_name} for one, its_name in listed])
