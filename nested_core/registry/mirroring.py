"""Where a name is mirrored to object storage, and the extension point of the room that does it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from nested_core import seams
from nested_core.errors import DamagedError, quote_path
from nested_core.storage.atomic import write_json
from nested_core.storage.untrusted_files import file_type, read_json

MIRROR_NOTE_NAME = "mirror.json"
ADDRESS_NOTE_NAME = "address.json"
MAX_NOTE_BYTES = 64 * 1024
EVERY_VERSION = ""


class MirrorNote(BaseModel):
    """REGISTRY/NAME/mirror.json: the mirror's address, and the last history line that it has."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    address: str
    end: str | None = None


@dataclass(frozen=True)
class RegistryMirror:
    """How a room has other machines read a registry, through object storage.

    require_usable: raises ConfigError if nothing could be put to an address, of its client's lack,
        say; asks nobody.
    publish_after_change: brings the mirror of REGISTRY/NAME up to date; raises nothing of it.
    open_copy: returns the local folder that stands for the registry at an address.
    update_copy: brings NAME in such a folder up to date, with one version's files, by default the
        champion's, or with all of them (EVERY_VERSION); takes the folder, the name, the version.
    """

    require_usable: Callable[[str], object]
    publish_after_change: Callable[[Path], None]
    open_copy: Callable[[str], Path]
    update_copy: Callable[[Path, str, str | None], None]


def read_mirror_note(folder: Path) -> MirrorNote | None:
    """Read where a name is mirrored; None if it is not.

    folder: REGISTRY/NAME.
    """
    path = folder / MIRROR_NOTE_NAME
    if file_type(path) == "missing":
        return None
    try:
        return MirrorNote.model_validate(read_json(path, MAX_NOTE_BYTES))
    except (ValidationError, DamagedError) as error:
        raise DamagedError(
            f"{path} does not say where {folder.name} is mirrored. Remove it, and give "
            f"`nested-tune registry mirror {quote_path(folder.parent)} --to ADDRESS`."
        ) from error


def set_mirror(folder: Path, address: str) -> None:
    """Have a name mirrored to an address from now on; the next change of it begins with that.

    folder: REGISTRY/NAME.
    """
    note = read_mirror_note(folder)
    if note is None or note.address != address:
        write_json(folder / MIRROR_NOTE_NAME, MirrorNote(address=address).model_dump())


def write_mirrored_end(folder: Path, address: str, end: str) -> None:
    """Note the last history line that the mirror at `address` has, if it still is the name's."""
    note = read_mirror_note(folder)
    if note is not None and note.address == address and note.end != end:
        write_json(folder / MIRROR_NOTE_NAME, MirrorNote(address=address, end=end).model_dump())


def publish_if_mirrored(folder: Path) -> None:
    """Bring the mirror of a name up to date, if it has one, after its lock was released.

    folder: REGISTRY/NAME.
    """
    if file_type(folder / MIRROR_NOTE_NAME) != "missing":
        for mirror in seams.load_all(RegistryMirror):
            mirror.publish_after_change(folder)


def update_copy(registry: Path, name: str, version: str | None = None) -> None:
    """Bring a name of a local copy of a mirrored registry up to date; do nothing to any other.

    version: first digits of the version whose files are needed; None for the champion's,
        EVERY_VERSION for all.

    Raises ConfigError where the mirror cannot be reached, DamagedError where it is torn, older than
    the copy, or of another registry.
    """
    if file_type(registry / ADDRESS_NOTE_NAME) != "missing":
        wanted = f"{registry}, a copy of object storage"
        seams.load_only(RegistryMirror, wanted).update_copy(registry, name, version)


def open_copy(address: str) -> Path:
    """Return the local folder that stands for the registry at an address; it may be empty yet."""
    return seams.load_only(RegistryMirror, address).open_copy(address)
