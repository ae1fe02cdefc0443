"""The data store of a name: the examples of its versions' training and held-out sets, once each.

REGISTRY/NAME/data/VERSION.json lists the digests of a version's examples, and SHA256.jsonl holds
rows, a line of JSON each: its name is the hash of its content, and the digest of a row that of its
line. A row that was altered has another digest, and so is not there any more. Rows are
written before the list that names them, and a list before its version: a crash leaves at most rows
that nothing names, which gc collects.
"""

from __future__ import annotations

import hashlib
import json
import stat
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from nested_core.errors import DamagedError, describe_first_problem
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry.folders import (
    VERSIONS_FOLDER_NAME,
    find_name_folder,
    shared_folder_lock,
)
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.storage.atomic import (
    Confirm,
    remove_leftovers,
    sync_path,
    write_bytes,
)
from nested_core.storage.untrusted_files import file_type, read_regular

DATA_FOLDER_NAME = "data"
LIST_SUFFIX = ".json"
PACK_SUFFIX = ".jsonl"
OWNER_ALONE = 0o700
OWNER_AND_GROUP = 0o770


@dataclass(frozen=True)
class StoredRow:
    """An example as it was kept, which every reader of data sets reads.

    digest: SHA-256 of its line in the store, as 64 hexadecimal digits.
    row: `messages` (and `tools`), `prompt` and `completion`, or `text`.
    """

    digest: str
    row: dict[str, Any]


@dataclass(frozen=True)
class StoredData:
    """The examples of one version, in the order of its data set, each once.

    missing: how many more its list names that are not in the store: they were altered, or lost.
    """

    train: tuple[StoredRow, ...]
    held_out: tuple[StoredRow, ...]
    missing: int = 0


@dataclass(frozen=True)
class RunExamples:
    """The rows of a run's training and held-out sets, to be kept with its version.

    max_bytes: of the whole store; None for no bound.
    """

    train: Iterable[Mapping[str, Any]]
    held_out: Iterable[Mapping[str, Any]]
    max_bytes: int | None = None


class _DigestList(BaseModel):
    """VERSION.json."""

    model_config = ConfigDict(strict=True, extra="forbid")
    train: list[str]
    held_out: list[str]


def read_lineage(registry: Path, name: str, version: str) -> list[str]:
    """A version and those that it was trained from, newest first, through their provenance.

    A version that was collected ends the list: what it was trained from is not known. Raises
    DamagedError for a provenance that cannot be read.
    """
    lineage: list[str] = []
    following: str | None = version
    while following is not None and following not in lineage:
        lineage.append(following)
        place = version_folder(registry, name, following)
        following = _trained_from(place) if place.is_dir() else None
    return lineage


def _trained_from(place: Path) -> str | None:
    """The version that training began with; None for a fresh adapter, whatever it followed."""
    parent = read_provenance(place).get("parent")
    return parent if parent == read_verdict(place / GATE_NAME).initial.digest else None


def read_stored_data(registry: Path, name: str, version: str) -> StoredData | None:
    """The examples of a version, each checked by its digest; None where none are kept.

    Raises ConfigError for an unknown registry or name, DamagedError for a list that is none.
    """
    folder = find_name_folder(registry, name)
    with shared_folder_lock(folder):
        listed = _read_list(_list_path(folder, version))
        if listed is None:
            return None
        wanted = {*listed.train, *listed.held_out}
        lines = {digest: line for _, digest, line in _read_packs(folder) if digest in wanted}
    rows = {digest: StoredRow(digest, json.loads(line)) for digest, line in lines.items()}
    return StoredData(
        train=tuple(rows[digest] for digest in listed.train if digest in rows),
        held_out=tuple(rows[digest] for digest in listed.held_out if digest in rows),
        missing=len(wanted) - len(rows),
    )


def keeps_examples(registry: Path, name: str, version: str) -> bool:
    """Whether the store lists examples of a version."""
    return file_type(_list_path(registry / name, version)) != "missing"


def digest_row(row: Mapping[str, Any]) -> str:
    """The digest by which a row is kept."""
    return hashlib.sha256(_render_row(row)).hexdigest()


def _render_row(row: Mapping[str, Any]) -> bytes:
    """The line of a row, its keys in their order: chat templates show tools as they are written."""
    return json.dumps(row, separators=(",", ":"), allow_nan=False).encode()


def store_examples(folder: Path, version: str, examples: RunExamples, *, confirm: Confirm) -> None:
    """Keep a run's examples for a version; call under the lock of the NAME's folder.

    A version whose examples are kept already keeps those.
    """
    place = folder / DATA_FOLDER_NAME
    if file_type(place) == "missing":
        is_shared = (folder / VERSIONS_FOLDER_NAME).stat().st_mode & stat.S_IWGRP
        place.mkdir(mode=OWNER_AND_GROUP if is_shared else OWNER_ALONE)
        sync_path(folder)
    remove_leftovers(place)
    path = _list_path(folder, version)
    if file_type(path) != "missing":
        return
    held_out = {digest_row(row): _render_row(row) for row in examples.held_out}
    train = {digest_row(row): _render_row(row) for row in examples.train}
    known = {digest for _, digest, _ in _read_packs(folder)}
    new = {digest: line for digest, line in (held_out | train).items() if digest not in known}
    _write_pack(place, new.values(), confirm)
    listed = _DigestList(train=[*train], held_out=[*held_out])
    write_bytes(path, listed.model_dump_json().encode(), confirm=confirm)


def _list_path(folder: Path, version: str) -> Path:
    return folder / DATA_FOLDER_NAME / f"{version}{LIST_SUFFIX}"


def _read_list(path: Path) -> _DigestList | None:
    """The digests of a version's examples; None where none are kept."""
    if file_type(path) == "missing":
        return None
    try:
        return _DigestList.model_validate_json(read_regular(path))
    except ValidationError as error:
        raise DamagedError(
            f"{path}: {describe_first_problem(error)}. Restore it from a backup, or remove it: no "
            f"example of that version is kept then."
        ) from error


def _read_packs(folder: Path) -> Iterator[tuple[Path, str, bytes]]:
    """Each row of the store: the file that it is in, its digest, and its line."""
    for path in sorted((folder / DATA_FOLDER_NAME).glob(f"[!.]*{PACK_SUFFIX}")):
        for line in read_regular(path).splitlines():
            yield path, hashlib.sha256(line).hexdigest(), line


def _write_pack(place: Path, lines: Collection[bytes], confirm: Confirm) -> None:
    """Write rows under the hash of their content; nothing for no rows."""
    if not lines:
        return
    content = b"".join(line + b"\n" for line in lines)
    name = hashlib.sha256(content).hexdigest()
    write_bytes(place / f"{name}{PACK_SUFFIX}", content, confirm=confirm)
