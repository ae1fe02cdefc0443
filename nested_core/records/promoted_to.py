"""promoted-to.json: registries that may have versions of a run and config.yaml does not name.

A person promoted the run to them, or it was judged for them and then resumed under another.

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

    Raises DamagedError for a file of another form.
    """
    if file_type(path) == "missing":
        return ()
    try:
        return tuple((str(one["registry"]), str(one["name"])) for one in read_json(path, MAX_BYTES))
    except (KeyError, TypeError) as error:
        raise DamagedError(f"{path} holds no list of registries: {error!r}.") from error


def add_promoted_to(path: Path, registry: Path, name: str) -> None:
    """Add a registry folder, as an absolute path, and a name in it, unless they are listed."""
    listed = dict.fromkeys([*read_promoted_to(path), (str(registry.absolute()), name)])
    write_json(path, [{"registry": one, "name": its_name} for one, its_name in listed])
