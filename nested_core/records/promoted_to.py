"""promoted-to.json: registries that a run was promoted to by hand and config.yaml does not name.

The file protects the run from being pruned while such a registry depends on it.
"""

from __future__ import annotations

from pathlib import Path

from nested_core.errors import DamagedError
from nested_core.storage.atomic import write_json
from nested_core.storage.untrusted_files import file_type, read_json

MAX_BYTES = 2**20


def read_promoted_to(path: Path) -> tuple[tuple[str, str], ...]:
    """Read the registries, each with the name in it; empty without the file.

    A registry is the folder as it was given. Raises DamagedError for a file of another form.
    """
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
