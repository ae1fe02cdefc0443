"""The data store of a name: the examples of its versions' training and held-out sets, once each.

REGISTRY/NAME/data/VERSION.json lists the digests of a version's examples. SHA256.jsonl (a pack)
holds rows, one JSON line each; its name is the hash of its content, and the digest of a row is the
hash of its line. An altered row has another digest, so it counts as missing. Rows are written
before the list that names them, and a list before its version: a crash leaves at most rows that no
list names, which gc removes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import SpooledTemporaryFile
from typing import Any
from weakref import finalize

from pydantic import BaseModel, ConfigDict, ValidationError

from nested_core.errors import DamagedError, describe_first_problem, quote_path
from nested_core.records.verdict_file import GATE_NAME, read_verdict
from nested_core.registry.folders import (
    DATA_FOLDER_NAME,
    VERSIONS_FOLDER_NAME,
    find_name_folder,
    shared_folder_lock,
)
from nested_core.registry.judgements import read_facts
from nested_core.registry.versions import read_provenance, version_folder
from nested_core.storage.atomic import Confirm, private_mode, sync_path, write_bytes
from nested_core.storage.untrusted_files import UNBOUNDED, file_type, open_regular, read_regular

LIST_SUFFIX = ".json"
PACK_SUFFIX = ".jsonl"
SETS: tuple[str, ...] = ("train", "held_out", "kept_out")  # of DigestList
GIVEN_UP = '{"train": [], "held_out": [], "dropped": 1}'  # a list without rows, which lacks some
MAX_BYTES_IN_MEMORY = 2**24  # of a run's rows; more of them are in a temporary file


@dataclass(frozen=True)
class StoredRow:
    """An example of the data store.

    digest: SHA-256 of its line in the store, as 64 hexadecimal digits.
    row: `messages` (and `tools`), `prompt` and `completion`, or `text`; and a `loss_mask` if some
        turns are not learnt.
    """

    digest: str
    row: dict[str, Any]


@dataclass(frozen=True)
class StoredData:
    """The examples of one version, in the order of its data set, without duplicates.

    held_out: the examples that the gate judged the version by.
    kept_out: further held-out examples, which later runs must not train on.
    missing: how many examples are altered, lost, or dropped for want of room.
    """

    train: tuple[StoredRow, ...]
    held_out: tuple[StoredRow, ...]
    kept_out: tuple[StoredRow, ...]
    missing: int = 0


class DigestList(BaseModel):
    """The digests of a version's examples, as VERSION.json has them, each once a set.

    dropped: how many examples were left out, since the store may have so many bytes and no more.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    train: list[str]
    held_out: list[str]
    kept_out: list[str] = []  # older lists have none
    dropped: int = 0

    def all(self) -> set[str]:
        """Return the digests of all examples of the version."""
        return {*self.train, *self.held_out, *self.kept_out}

    def select(self, is_kept: Callable[[str], bool], dropped: int = 0) -> DigestList:
        """Return the list with the digests for which `is_kept` is true, and `dropped` more."""
        kept = {name: [*filter(is_kept, getattr(self, name))] for name in SETS}
        return self.model_copy(update=kept | {"dropped": self.dropped + dropped})


Rows = Iterable[Mapping[str, Any]]
Lines = Iterator[tuple[str, bytes]]  # the digest of each row, and its line with the end


class RunExamples:
    """The rows of a run's training and held-out sets, to be stored with its version.

    Memory holds their digests; the rows themselves are in a temporary file.

    max_bytes: the limit for the whole store; None for no limit.
    kept_out: held-out rows that the gate did not judge by.
    """

    def __init__(
        self, train: Rows, held_out: Rows, max_bytes: int | None = None, kept_out: Rows = ()
    ) -> None:
        self.max_bytes = max_bytes
        self.listed = DigestList(train=[], held_out=[])
        self.rows: dict[str, str] = {}  # digest: the last set with it; in the order of the file
        self._file = SpooledTemporaryFile[bytes](MAX_BYTES_IN_MEMORY)
        finalize(self, self._file.close)
        self._compared: list[str] | None = None
        for name, rows in zip(SETS, (train, held_out, kept_out), strict=True):
            self.add(name, rows)

    def add(self, name: str, rows: Rows) -> None:
        """Add rows to a set, equal ones once; no other set's may come in between."""
        for row in rows:
            line = render_row(row)
            digest = hashlib.sha256(line).hexdigest()
            if digest not in self.rows:
                self._file.write(line + b"\n")
            if self.rows.get(digest) != name:
                self.rows[digest] = name
                getattr(self.listed, name).append(digest)

    def compare_with_store(self, folder: Path) -> None:
        """Find the rows that no pack of the store has, after all rows were added.

        A pack never changes: where there are the same as when this was called before the folder was
        locked, none is read under its lock.

        folder: the adapter's folder in the registry, REGISTRY/NAME.
        """
        packs = [path.name for path in _pack_paths(folder)]
        if packs != self._compared:
            self._compared, self.new = packs, {*self.rows}
            self.new.difference_update(digest for digest, _ in read_packs(folder))

    def lines(self) -> Lines:
        """Return an iterator of each row's digest and line."""
        self._file.seek(0)
        return zip(self.rows, self._file, strict=True)

    def choose(self) -> Collection[str]:
        """Return the digests of as many rows as fit into `max_bytes`, of held-out sets first.

        The rows of a set are chosen in the order of their digests, which is as good as random.
        """
        if (max_bytes := self.max_bytes) is None or self._file.seek(0, 2) <= max_bytes:
            return self.rows  # seek(0, 2) is their size
        sizes = {digest: len(line) for digest, line in self.lines()}
        chosen: set[str] = set()
        for name in ("held_out", "kept_out", "train"):
            for digest in sorted({*getattr(self.listed, name)} - chosen):
                if sizes[digest] <= max_bytes:
                    max_bytes -= sizes[digest]
                    chosen.add(digest)
        return chosen


def read_lineage(registry: Path, name: str, version: str) -> list[str]:
    """Return a version and the versions that it was trained from or followed, newest first.

    The lineage is recorded in each version's provenance, so a version that was collected ends the
    list. Raises DamagedError for a provenance that cannot be read.
    """
    lineage: list[str] = []
    following: str | None = version
    while following is not None and following not in lineage:
        lineage.append(following)
        version_path = version_folder(registry, name, following)
        following = _trained_from(version_path) if version_path.is_dir() else None
    return lineage


def _trained_from(version_path: Path) -> str | None:
    """Return the champion that a version's run followed, or the version it was trained from."""
    provenance = read_provenance(version_path)
    if (start := provenance.get("start")) is not None:
        return str(start["champion"]) if start["champion"] else None
    parent = provenance.get("parent")
    return parent if parent == read_verdict(version_path / GATE_NAME).initial.digest else None


def read_stored_data(registry: Path, name: str, version: str) -> StoredData | None:
    """Read a version's examples, each checked by its digest; None if they are not stored.

    Examples that are listed and whose rows are gone are counted as `missing`.

    Raises ConfigError for an unknown registry or name, DamagedError for an unreadable list.
    """
    folder = find_name_folder(registry, name)
    with shared_folder_lock(folder):
        listed = read_digest_list(folder, version)
        if listed is None:
            return None
        digests = listed.all()
        lines = {digest: line for digest, line in read_packs(folder) if digest in digests}
    rows = {digest: StoredRow(digest, json.loads(line)) for digest, line in lines.items()}
    return StoredData(
        train=tuple(rows[digest] for digest in listed.train if digest in rows),
        held_out=tuple(rows[digest] for digest in listed.held_out if digest in rows),
        kept_out=tuple(rows[digest] for digest in listed.kept_out if digest in rows),
        missing=len(digests) - len(rows) + listed.dropped,
    )


def has_store(folder: Path) -> bool:
    """Return whether a name has a data store; DamagedError for anything else in its place.

    folder: the adapter name's folder in the registry.
    """
    found = file_type(folder / DATA_FOLDER_NAME)
    if found not in ("missing", "directory"):
        raise DamagedError(
            f"{folder / DATA_FOLDER_NAME} is not the folder of the stored examples. Restore that "
            f"from a backup, if no row was forgotten since; or remove what is there."
        )
    return found == "directory"


def keeps_examples(folder: Path, version: str) -> bool:
    """Return whether the data store lists examples of a version; DamagedError for its list.

    folder: the adapter name's folder in the registry.
    """
    listed = read_digest_list(folder, version)
    return listed is not None and bool(listed.all())


def find_lost_lists(folder: Path, versions: Iterable[str]) -> list[str]:
    """Return the versions whose rows were to be stored, and whose list of them was lost.

    folder: the adapter name's folder in the registry.
    """
    missing = [one for one in versions if file_type(list_path(folder, one)) == "missing"]
    return [version for version in missing if _keeps_data(folder, version)]


def _keeps_data(folder: Path, version: str) -> bool:
    """Return whether a run had a version's rows stored; True where that cannot be read."""
    try:
        return any((facts.policy or {}).get("keep_data") for facts in read_facts(folder, version))
    except (DamagedError, LookupError, ValueError):
        return True


def how_to_mend_list(path: Path) -> str:
    """Return what to do where the list of a version's rows or some of them are lost."""
    return (
        f"from a backup, if no row was forgotten since; or `echo '{GIVEN_UP}' > "
        f"{quote_path(path)}` gives its rows up till it is registered again"
    )


def find_incomplete_lists(folder: Path, versions: Collection[str]) -> list[str]:
    """Return the versions that had rows which are not known: not listed, or no longer stored.

    folder: the adapter name's folder in the registry.
    """
    stored = {digest for digest, _ in read_packs(folder)}
    lists = {version: read_digest_list(folder, version) for version in versions}
    gone = [v for v, one in lists.items() if one and (one.dropped or not one.all() <= stored)]
    return [*gone, *find_lost_lists(folder, versions)]


def render_row(row: Mapping[str, object]) -> bytes:
    """Encode a row as a JSON line, its keys in the given order.

    The order matters because chat templates print tools as they are written.
    """
    return json.dumps(row, separators=(",", ":"), allow_nan=False).encode()


def store_examples(
    folder: Path, version: str, examples: RunExamples, *, forgot: bool, confirm: Confirm
) -> None:
    """Store a run's examples for a version; call under the lock of the adapter name's folder.

    A version has a list of the digests of its rows; the rows themselves are in packs, files that
    all versions of the name share.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    forgot: some of the run's rows may have been forgotten: only those are listed that the
        store has.
    confirm: called before each write; it raises if the lock was lost.

    Of a version that is larger than `max_bytes` alone, a subset of the examples is stored, chosen
    by their digests. A version that has stored examples already is left as it is; so is one that
    was registered before, if the run's examples are gone.
    """
    store = folder / DATA_FOLDER_NAME
    if not has_store(folder):
        store.mkdir(mode=private_mode(folder / VERSIONS_FOLDER_NAME))
        sync_path(folder)
    listed = read_digest_list(folder, version)
    if listed is not None and (listed.all() or not listed.dropped):
        return  # it has its rows, or all were forgotten
    if not examples.rows and (folder / VERSIONS_FOLDER_NAME / version).is_dir():
        return
    examples.compare_with_store(folder)
    chosen = examples.choose()
    if forgot:
        chosen = {*chosen}.difference(examples.new)
    # The rows come first: a crash in between leaves no list that names missing rows
    new = examples.new if chosen is examples.rows else examples.new.intersection(chosen)
    _write_pack(store, examples.lines, new, confirm)
    listed = examples.listed.select(chosen.__contains__, len(examples.rows) - len(chosen))
    _write_list(folder, version, listed, confirm)


def bound_store(
    folder: Path, max_bytes: int, versions: Collection[str], heads: list[str], *, confirm: Confirm
) -> None:
    """Remove examples until the store has `max_bytes` at most; call under the name's lock.

    Versions that no run will follow lose their examples first, the oldest first of all. Then the
    heads and their ancestors lose the examples that they were trained on, and last the held-out
    ones. A version's list stays, so that nothing of it is read from its files instead: some of
    those rows may have been forgotten. Nothing is removed while a list is lost.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    versions: all versions of the name, oldest first.
    heads: the versions that a run may follow: the champion, and those that may still become it.
    confirm: called before each write; it raises if the lock was lost.
    """
    lineages = [read_lineage(folder.parent, folder.name, version) for version in heads]
    needed = [*dict.fromkeys(old for lineage in lineages for old in reversed(lineage))]
    steps = [(version, SETS) for version in versions if version not in needed]
    steps += [(version, sets) for sets in (SETS[:1], SETS) for version in needed]
    if find_lost_lists(folder, versions):
        return
    for version, sets in steps:
        if sum(path.stat().st_size for path in _pack_paths(folder)) <= max_bytes:
            return
        listed = read_digest_list(folder, version)
        if listed is not None and listed.all():
            left = listed.model_copy(update=dict.fromkeys(sets, []))
            dropped = listed.all() - left.all()
            left.dropped += len(dropped)
            _write_list(folder, version, left, confirm)
            remove_unneeded_rows(folder, versions, confirm=confirm)


def count_unneeded_rows(folder: Path, versions: Collection[str]) -> int:
    """Count the rows of the store that none of the given versions lists.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    needed = _needed_rows(folder, versions)
    return sum(digest not in needed for digest, _ in read_packs(folder))


def remove_unneeded_rows(
    folder: Path, versions: Collection[str], *, confirm: Confirm, dropped: Collection[str] = ()
) -> None:
    """Keep the examples of the given versions, and remove all others from the data store.

    The store has a list of digests for each version, and the rows in packs, files that the versions
    share. The lists of other versions are removed, and rows that none of the given ones lists. Call
    under the lock of the name's folder. A pack with unneeded rows is replaced by a new one
    without them. A crash in between leaves some rows in two packs, and the next call removes the
    duplicates. A new pack may have the content, and so the name, of an existing one.

    confirm: called before each write; it raises if the lock was lost.
    dropped: digests of rows that are removed in any case, unless a version lists them.
    """
    store = folder / DATA_FOLDER_NAME
    if not has_store(folder):
        return
    needed = _needed_rows(folder, versions, dropped)
    # Lists of other versions
    for path in store.glob(f"[!.]*{LIST_SUFFIX}"):
        if path.stem not in versions:
            confirm()
            path.unlink()
    # Packs with unneeded rows, each rewritten without them
    replaced: set[Path] = set()
    written: set[Path | None] = set()
    for pack in _pack_paths(folder):
        digests = [digest for digest, _ in _read_pack(pack)]
        kept = needed.intersection(digests)
        needed -= kept  # so that a later pack drops the same rows
        if len(kept) < len(digests):
            written.add(_write_pack(store, partial(_read_pack, pack), kept, confirm))
            replaced.add(pack)
    for pack in sorted(replaced - written):
        confirm()
        pack.unlink()
    sync_path(store)


def _needed_rows(folder: Path, versions: Collection[str], drop: Collection[str] = ()) -> set[str]:
    """Return the digests of all examples of the given versions.

    Where the list of one was lost these are all rows but those to drop that no version lists.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    lists = [read_digest_list(folder, version) for version in versions]
    needed = {digest for listed in lists if listed for digest in listed.all()}
    if find_lost_lists(folder, versions):
        needed.update(digest for digest, _ in read_packs(folder) if digest not in drop)
    return needed


def find_rows(folder: Path, is_wanted: Callable[[dict[str, object]], bool]) -> set[str]:
    """Return the digests of the stored rows for which `is_wanted` returns True.

    Raises DamagedError for a pack with a line that is no row.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    found = set[str]()
    for pack in _pack_paths(folder):
        try:
            found |= {digest for digest, line in _read_pack(pack) if is_wanted(json.loads(line))}
        except ValueError as error:
            said = "is no row. `nested-tune audit` says what is lost; `gc` alone removes the line."
            raise DamagedError(f"{pack} has a line that {said}") from error
    return found


def drop_rows(folder: Path, version: str, digests: Collection[str], *, confirm: Confirm) -> None:
    """Remove rows from a version's list.

    The rows themselves stay until `remove_unneeded_rows`, if no other version lists them.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    confirm: called before each write; it raises if the lock was lost.
    """
    listed = read_digest_list(folder, version)
    if listed is not None:
        left = listed.select(lambda digest: digest not in digests)
        _write_list(folder, version, left, confirm)


def list_path(folder: Path, version: str) -> Path:
    """Return the path of a version's list of digests.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    return folder / DATA_FOLDER_NAME / f"{version}{LIST_SUFFIX}"


def read_digest_list(folder: Path, version: str) -> DigestList | None:
    """Read the digests of a version's examples; None if they are not stored.

    Raises DamagedError for a file of another form.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    path = list_path(folder, version)
    if file_type(path) == "missing":
        return None
    try:
        return DigestList.model_validate_json(read_regular(path))
    except ValidationError as error:
        raise DamagedError(
            f"{path}: {describe_first_problem(error)}. Restore it {how_to_mend_list(path)}."
        ) from error


def _write_list(folder: Path, version: str, listed: DigestList, confirm: Confirm) -> None:
    """Write the digests of a version's examples.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    confirm: called before each write; it raises if the lock was lost.
    """
    parts = json.JSONEncoder(separators=(",", ":")).iterencode(listed.model_dump())
    write_bytes(list_path(folder, version), map(str.encode, parts), confirm=confirm)


def read_packs(folder: Path) -> Lines:
    """Yield the digest and the line of each row of the store.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    for path in _pack_paths(folder):
        yield from _read_pack(path)


def _read_pack(path: Path) -> Lines:
    """Yield the digest and the line of each row of a pack; memory holds one at a time."""
    with open_regular(path, UNBOUNDED) as (file, _):
        for line in file:
            yield hashlib.sha256(line.removesuffix(b"\n")).hexdigest(), line


def _pack_paths(folder: Path) -> list[Path]:
    """Return the paths of the store's packs, sorted.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    return sorted((folder / DATA_FOLDER_NAME).glob(f"[!.]*{PACK_SUFFIX}"))


def _write_pack(
    store: Path, read: Callable[[], Lines], digests: Collection[str], confirm: Confirm
) -> Path | None:
    """Write rows to a file named by the hash of its content; return its path, None without rows.

    read: yields rows, among them those with the given digests; called for the name, and to write.
    confirm: called before each write; it raises if the lock was lost.
    """
    if not digests:
        return None
    hasher = hashlib.sha256()
    for line in _select(read(), digests):
        hasher.update(line)
    path = store / f"{hasher.hexdigest()}{PACK_SUFFIX}"
    write_bytes(path, _select(read(), digests), confirm=confirm)
    return path


def _select(rows: Lines, digests: Collection[str]) -> Iterator[bytes]:
    """Yield the lines of the rows with the given digests."""
    return (line for digest, line in rows if digest in digests)
