"""What a mirror of a registry holds in object storage, below its address:

    NAME/champion.json                                  the pointer, replaced conditionally
    NAME/history/<sha256>.jsonl                         history.jsonl as the pointer means it
    NAME/versions/<version>/<manifest's hash>/<file>    the files of a version
    NAME/judgements/<version>/<sha256>.json             a later verdict on it

Every object but the pointer is named by its content, never changed, and put before the pointer that
needs it. The pointer decides: what it does not need is not there for a reader.
"""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, ValidationError

from nested_core.errors import DamagedError
from nested_core.registry.ledger import Ledger
from nested_core.registry.versions import OPTIONAL_FILES, VERSION_FILES, VERSION_PATTERN
from nested_core.rooms.mirror.object_storage import ObjectStorage
from nested_core.storage.untrusted_files import parse_json

MAX_POINTER_BYTES = 64 * 1024
_HEX = VERSION_PATTERN.pattern
_FILES = "|".join(map(re.escape, (*VERSION_FILES, *OPTIONAL_FILES)))
FOLDERS = ("history", "versions", "judgements")  # of a name
# The keys of all that an author may delete: of whatever else lies below NAME/, nothing is ours
LAYOUT_PATTERN = re.compile(
    rf"[^/]{{1,255}}/(history/{_HEX}[.]jsonl|versions/{_HEX}/{_HEX}/({_FILES})|"
    rf"judgements/{_HEX}/{_HEX}[.]json)"
)
Sha256 = Annotated[str, Field(pattern=f"^{_HEX}$")]


class Pointer(BaseModel):
    """The content of NAME/champion.json: the state of a name that readers take.

    champion: the version in use; None before the first promotion.
    lines, size: the length of the history, in lines and bytes.
    history: its SHA-256. No two registries have the same, so it tells the author, too.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    layout: Literal[1] = 1
    champion: Sha256 | None
    lines: PositiveInt
    size: PositiveInt
    history: Sha256


def read_pointer(storage: ObjectStorage, name: str) -> tuple[Pointer, str]:
    """Read the pointer of a name and its entity tag; ObjectMissing or DamagedError without one."""
    content, tag = storage.read(pointer_key(name), MAX_POINTER_BYTES)
    try:
        return Pointer.model_validate(parse_json(content)), tag
    except (ValidationError, ValueError) as error:
        raise DamagedError(
            f"{storage.address}/{pointer_key(name)} is no pointer of a mirror that this release "
            f"reads. It may be of a newer nested-tune, or something else writes there."
        ) from error


def pointer_key(name: str) -> str:
    """Return the key of the pointer of a name."""
    return f"{name}/champion.json"


def history_key(name: str, digest: str) -> str:
    """Return the key of the history with this SHA-256."""
    return f"{name}/history/{digest}.jsonl"


def version_key(name: str, version: str, ledger: Ledger) -> str:
    """Return what the keys of a version's files begin with, less the slash.

    ledger: the history, which records the version and the hash of its manifest.
    """
    manifest = next(e.manifest for _, e in reversed(ledger.by_version[version]) if e.manifest)
    return f"{name}/versions/{version}/{manifest}"


def judgement_key(name: str, version: str, digest: str) -> str:
    """Return the key of a verdict on a version after its first."""
    return f"{name}/judgements/{version}/{digest}.json"
