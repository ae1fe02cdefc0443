"""What a mirror of a registry holds in object storage, below its address:

    NAME/champion.json                                  the pointer, replaced conditionally
    NAME/history/<first byte>-<sha256>.jsonl            a stretch of history.jsonl
    NAME/versions/<version>/<manifest's hash>/<file>    the files of a version
    NAME/judgements/<version>/<sha256>.json             a later verdict on it

Every object but the pointer is named by its content, never changed, and put before the pointer that
needs it. So the pointer decides: what it does not need is not there for a reader.
"""

from __future__ import annotations

import hashlib
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, ValidationError, model_validator

from nested_core.errors import DamagedError, describe_first_problem
from nested_core.registry.ledger import Ledger
from nested_core.storage.atomic import render_json
from nested_core.storage.untrusted_files import parse_json

LAYOUT = 1
MAX_POINTER_BYTES = 256 * 1024
MAX_HISTORY_BYTES = 256 * 1024 * 1024
MAX_STRETCHES = 32  # of the history; beyond it, all of them are put anew as one

Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Stretch(BaseModel):
    """Complete lines of history.jsonl: from byte `start` up to byte `end`, and their SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    start: NonNegativeInt
    end: NonNegativeInt
    sha256: Sha256

    def key(self, name: str) -> str:
        """Return the key of the object with these lines."""
        return f"{name}/history/{self.start:012d}-{self.sha256}.jsonl"


class Pointer(BaseModel):
    """The content of NAME/champion.json: the state of a name that readers take.

    registry: SHA-256 of the history's first line, which no other registry has: the author.
    lines, end: how many lines the history has, and the SHA-256 of the last one.
    champion: the version in use; None before the first promotion.
    history: the stretches that make the history up, in order.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    layout: Literal[1] = LAYOUT
    registry: Sha256
    lines: NonNegativeInt
    end: Sha256
    champion: Sha256 | None
    history: Annotated[tuple[Stretch, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _require_whole_history(self) -> Pointer:
        """Refuse stretches that do not follow one another."""
        ends = [0, *(stretch.end for stretch in self.history)]
        if any(s.start != end or s.end <= end for s, end in zip(self.history, ends, strict=False)):
            raise ValueError("its stretches of the history do not follow one another")
        return self

    @property
    def history_bytes(self) -> int:
        """The length of the history."""
        return self.history[-1].end

    def render(self) -> bytes:
        """Return the object's content."""
        return render_json(self.model_dump())


def pointer_key(name: str) -> str:
    """Return the key of the pointer of a name."""
    return f"{name}/champion.json"


def version_folder_key(name: str, version: str, manifest: str) -> str:
    """Return what the keys of a version's files begin with, less the slash.

    manifest: the hash of its manifest, as the history records it.
    """
    return f"{name}/versions/{version}/{manifest}"


def judgement_key(name: str, version: str, digest: str) -> str:
    """Return the key of a verdict on a version after its first."""
    return f"{name}/judgements/{version}/{digest}.json"


def parse_pointer(content: bytes, address: str) -> Pointer:
    """Read a pointer; DamagedError for anything else.

    address: of the object, for the message.
    """
    try:
        return Pointer.model_validate(parse_json(content))
    except (ValidationError, ValueError) as error:
        reason = describe_first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise DamagedError(
            f"{address} is no pointer of a mirror that this release reads ({reason}). It may be of "
            f"a newer nested-tune, or something else writes there."
        ) from error


def first_line_sha256(history: bytes) -> str:
    """Return the SHA-256 of the history's first line, which identifies its registry."""
    return hashlib.sha256(history.partition(b"\n")[0] + b"\n").hexdigest()


def recorded_manifest(ledger: Ledger, version: str) -> str | None:
    """Return the hash of a version's manifest by the newest history line that has it."""
    hashes = [e.manifest for _, e in ledger.by_version.get(version, ()) if e.manifest is not None]
    return hashes[-1] if hashes else None
