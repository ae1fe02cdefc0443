"""A local copy of a mirrored registry: read as any other, brought up to date before it is read.

It lies in the user's cache, a folder for each address. What comes from object storage is checked as
a registry is, hash by hash, before the copy takes it: whatever is torn, older than the copy, or of
another registry is refused, and the copy stays as it was.
"""

from __future__ import annotations

import hashlib
import logging
import shutil
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError, DamagedError
from nested_core.registry.folders import VERSIONS_FOLDER_NAME, check_name, exclusive_folder_lock
from nested_core.registry.judgements import has_all_judgements, judgement_path, read_judgement
from nested_core.registry.ledger import LEDGER_NAME, Ledger, read_ledger
from nested_core.registry.link_and_views import NameFolder
from nested_core.registry.mirroring import (
    ADDRESS_NOTE_NAME,
    EVERY_VERSION,
    MAX_NOTE_BYTES,
    RegistryMirror,
)
from nested_core.registry.versions import (
    CONTENT_FILES,
    HASHED_AGAIN_AFTER_SECONDS,
    OPTIONAL_FILES,
    VERSION_PATTERN,
    inspect_version,
    registered_versions,
    resolve_version,
)
from nested_core.rooms.mirror.author import publish_after_change
from nested_core.rooms.mirror.mirror_layout import (
    Pointer,
    history_key,
    judgement_key,
    pointer_key,
    read_pointer,
    version_key,
)
from nested_core.rooms.mirror.object_storage import ObjectMissing, ObjectStorage
from nested_core.storage.atomic import write_bytes, write_json
from nested_core.storage.lock_file import LockFile, exclusive_lock
from nested_core.storage.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, read_manifest
from nested_core.storage.untrusted_files import file_type, read_json_object, read_regular
from nested_core.storage.user_cache import UserCache, cache_folder
from nested_core.text.digest_format import shorten_digest
from nested_core.text.stages import stages

CACHE_FOLDER_NAME = "mirrors"
MAX_HISTORY_BYTES = 256 * 1024 * 1024
MAX_JUDGEMENT_BYTES = 64 * 1024 * 1024
REMEDY = (
    "`nested-tune registry mirror` on the author's machine puts it again, or says what is damaged "
    "or lost there."
)
_log = logging.getLogger(__name__)


def open_copy(address: str) -> Path:
    """Return the folder in the user's cache that stands for the registry at an address."""
    address = address.rstrip("/")
    cache = UserCache(
        cache_folder() / CACHE_FOLDER_NAME,
        "copies of registries in object storage",
        "put another adapter in the place of the champion",
    )
    cache.remove_unused()
    folder = cache.entry(address)
    folder.mkdir(mode=0o700, exist_ok=True)
    write_json(folder / ADDRESS_NOTE_NAME, {"address": address})
    return folder


def update_copy(registry: Path, name: str, version: str | None) -> None:
    """Bring a name of a copy up to date; `nested_core.registry.mirroring.update_copy` says how."""
    check_name(name)
    note = read_json_object(registry / ADDRESS_NOTE_NAME, MAX_NOTE_BYTES)
    registry.touch()  # the cache keeps what is used
    copy = _Copy(registry / name, ObjectStorage(str(note["address"])))
    copy.update(None if version == EVERY_VERSION else version)
    if version == EVERY_VERSION:
        for one in sorted(read_ledger(registry / name).by_version):
            try:
                copy.update(one)
            except DamagedError as error:  # the other versions can be read, and audit names it
                _log.warning("%s", error)


class _Copy:
    """The copy of one name. Its lock is held while it is changed, not while files are fetched."""

    def __init__(self, folder: Path, storage: ObjectStorage) -> None:
        self.folder = folder
        self.storage = storage
        self.name = folder.name
        self.place = f"{storage.address}/{folder.name}"
        self.staging = folder.parent / ".staging" / folder.name
        self.staging.mkdir(mode=0o700, parents=True, exist_ok=True)

    def update(self, version: str | None) -> None:
        """Take what the mirror's pointer means: history, champion, and the files of `version`.

        Raises DamagedError if the mirror is torn: the pointer needs what is not there.
        """
        with self._locked():
            if self.folder.is_dir():  # a killed process may have left its link behind
                with exclusive_folder_lock(self.folder) as lock:
                    NameFolder(self.folder, lock, read_ledger(self.folder)).write_views()
        tried: Pointer | None = None
        problem: ObjectMissing | None = None
        while (pointer := self.read_pointer()) != tried:
            try:
                if self._is_taken(pointer, version):
                    return
            except ObjectMissing as error:  # the author may have removed what an old pointer needs
                tried, problem = pointer, error
        raise DamagedError(f"{self.place} is torn: {problem} {REMEDY}") from problem

    def _is_taken(self, pointer: Pointer, version: str | None) -> bool:
        """Fetch what is missing and take it; False if the copy's history changed meanwhile.

        A version is fetched by one process at a time, which the others that need it wait for.
        """
        with self._locked():
            known = content = self._read_history()
            is_news = hashlib.sha256(known).hexdigest() != pointer.history
            if is_news:
                content = self._fetch_history(pointer, known)
            ledger = read_ledger(self.staging if is_news else self.folder)
        with ExitStack() as held:
            missing = self._list_missing(ledger, version)
            for one in missing:
                held.enter_context(exclusive_lock(self.staging / f"{one}.lock"))
            fetched = [one for one in missing if not self._has(one, ledger)]
            for one in fetched:
                held.callback(shutil.rmtree, self.staging / one, ignore_errors=True)
                self._fetch_version(one, ledger)
            if not is_news and not fetched:
                return True
            with self._locked():
                if self._read_history() != known:
                    return False
                self._take(fetched, content, ledger)
        return True

    def _locked(self) -> AbstractContextManager[LockFile]:
        return exclusive_lock(self.folder.parent / f".{self.name}.lock")

    def _read_history(self) -> bytes:
        path = self.folder / LEDGER_NAME
        return read_regular(path) if file_type(path) == "file" else b""

    def read_pointer(self) -> Pointer:
        """Read the mirror's pointer; ConfigError without one, DamagedError where it was there."""
        try:
            return read_pointer(self.storage, self.name)[0]
        except ObjectMissing as error:
            kind = DamagedError if self.folder.is_dir() else ConfigError
            raise kind(
                f"{self.storage.address} has no adapter {self.name}: {pointer_key(self.name)} "
                f"is not there. Check address and name. On the author's machine `nested-tune "
                f"registry mirror REGISTRY --to {self.storage.address}` puts it."
            ) from error

    def _fetch_history(self, pointer: Pointer, known: bytes) -> bytes:
        """Fetch the mirror's history, into the staging folder too; DamagedError if it is not sound.

        known: the copy's history, from which it has to go on.
        """
        key = history_key(self.name, pointer.history)
        content, _ = self.storage.read(key, min(pointer.size, MAX_HISTORY_BYTES))
        if not content.startswith(known):
            raise DamagedError(
                f"{self.place} is of another registry than what was read here before, or older "
                f"than that: its history of {pointer.lines} lines does not go on from there. If "
                f"that is right (the registry was restored from a backup), remove "
                f"{self.folder.parent}, and give the command again."
            )
        (self.staging / LEDGER_NAME).write_bytes(content)
        try:
            ledger = read_ledger(self.staging)
        except DamagedError as error:
            raise DamagedError(f"{self.place} has a damaged history: {error}") from error
        ids = [n for e in ledger.entries for n in (e.version, e.previous, e.manifest, e.judgement)]
        if not all(one is None or VERSION_PATTERN.fullmatch(one) for one in ids):
            raise DamagedError(f"{self.place}: its history names what is no digest.")  # a path?
        digest = hashlib.sha256(content).hexdigest()
        if digest != pointer.history or ledger.torn or ledger.champion != pointer.champion:
            raise DamagedError(
                f"{self.place}: its pointer does not say what its history says. Something else "
                f"than nested-tune writes there."
            )
        return content

    def _list_missing(self, ledger: Ledger, wanted: str | None) -> list[str]:
        """Return champion and wanted versions that the copy does not have as the history has them.

        A file that was hashed is hashed again once it is changed, or after a day.
        """
        versions = set() if ledger.champion is None else {ledger.champion}
        if wanted is not None and VERSION_PATTERN.fullmatch(wanted):
            versions.add(wanted)
        elif wanted is not None:
            (self.folder / VERSIONS_FOLDER_NAME).mkdir(mode=0o700, parents=True, exist_ok=True)
            versions.add(resolve_version(self.folder, wanted, ledger))
        known = versions & ledger.by_version.keys()  # one that was collected may still be here
        return [version for version in sorted(known) if not self._has(version, ledger)]

    def _has(self, version: str, ledger: Ledger) -> bool:
        place = self.folder / VERSIONS_FOLDER_NAME / version
        recorded = ledger.manifest_hashes(version)
        findings, _ = inspect_version(place, version, recorded, max_age=HASHED_AGAIN_AFTER_SECONDS)
        return not findings and has_all_judgements(self.folder, version, ledger)

    def _fetch_version(self, version: str, ledger: Ledger) -> None:
        """Fetch a version with its verdicts into the staging folder, and check them there."""
        stages.info(f"fetching {self.name}, version {shorten_digest(version)}")
        key = version_key(self.name, version, ledger)
        staging = self.staging / version
        shutil.rmtree(staging, ignore_errors=True)  # of a killed process
        place = staging / VERSIONS_FOLDER_NAME / version
        place.mkdir(parents=True)
        content, _ = self.storage.read(f"{key}/{MANIFEST_NAME}", MAX_MANIFEST_BYTES)
        (place / MANIFEST_NAME).write_bytes(content)
        files: dict[str, Any] = {**read_manifest(place)["files"]}
        for name in files.keys() & {*CONTENT_FILES, *OPTIONAL_FILES}:  # others are found below
            size = files[name].get("bytes") if isinstance(files[name], dict) else None
            if not isinstance(size, int):
                raise DamagedError(
                    f"{self.storage.address}/{key}: its manifest has no size of {name}."
                )
            self.storage.fetch(f"{key}/{name}", place / name, size=size)
        findings, _ = inspect_version(place, version, ledger.manifest_hashes(version))
        if findings:
            problems = "; ".join(f"{one.file.name} {one.message}" for one in findings)
            raise DamagedError(
                f"{self.storage.address}/{key} is not what its history records: {problems}. "
                f"{REMEDY}"
            )
        for number, digest in ledger.judgements(version):
            verdict = judgement_key(self.name, version, digest)
            content, _ = self.storage.read(verdict, MAX_JUDGEMENT_BYTES)
            target = judgement_path(staging, version, digest)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
            read_judgement(staging, version, digest, number)

    def _take(self, fetched: list[str], history: bytes, ledger: Ledger) -> None:
        """Move what was fetched into the copy, then the history, then the champion."""
        (self.folder / VERSIONS_FOLDER_NAME).mkdir(mode=0o700, parents=True, exist_ok=True)
        with exclusive_folder_lock(self.folder) as lock:
            locked = NameFolder(self.folder, lock, ledger)
            removed = {*registered_versions(self.folder)} - {*ledger.by_version}
            for version in removed.union(fetched):
                locked.delete_version(version)
            for one in fetched:
                for path in [*(self.staging / one).glob(f"*/{one}")]:
                    target = self.folder / path.relative_to(self.staging / one)
                    target.parent.mkdir(mode=0o700, exist_ok=True)
                    path.rename(target)
            write_bytes(self.folder / LEDGER_NAME, history)
            locked.write_views()


MIRROR = RegistryMirror(ObjectStorage, publish_after_change, open_copy, update_copy)
