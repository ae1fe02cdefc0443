"""A local copy of a mirrored registry: read as any other, brought up to date before it is read.

It lies in the user's cache, a folder for each address. What comes from object storage is checked as
a registry is, hash by hash, before the copy takes it: whatever is torn, older than the copy, or of
another registry is refused, and the copy stays as it was.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from nested_core.errors import ConfigError, DamagedError
from nested_core.registry.folders import (
    VERSIONS_FOLDER_NAME,
    check_name,
    exclusive_folder_lock,
)
from nested_core.registry.judgements import judgement_path, read_judgement
from nested_core.registry.ledger import LEDGER_NAME, Ledger, read_ledger
from nested_core.registry.link_and_views import NameFolder
from nested_core.registry.mirroring import (
    ADDRESS_NOTE_NAME,
    EVERY_VERSION,
    MAX_NOTE_BYTES,
    RegistryMirror,
)
from nested_core.registry.versions import (
    OPTIONAL_FILES,
    VERSION_FILES,
    inspect_version,
    registered_versions,
    resolve_version,
)
from nested_core.rooms.mirror.author import publish_after_change
from nested_core.rooms.mirror.mirror_layout import (
    MAX_HISTORY_BYTES,
    MAX_POINTER_BYTES,
    Pointer,
    first_line_sha256,
    judgement_key,
    parse_pointer,
    pointer_key,
    recorded_manifest,
    version_folder_key,
)
from nested_core.rooms.mirror.object_storage import ObjectMissing, ObjectStorage
from nested_core.storage.atomic import write_bytes, write_json
from nested_core.storage.lock_file import exclusive_lock
from nested_core.storage.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, read_manifest
from nested_core.storage.untrusted_files import file_type, read_json_object
from nested_core.storage.user_cache import UserCache, cache_folder
from nested_core.text.digest_format import shorten_digest
from nested_core.text.stages import stages

CACHE_FOLDER_NAME = "mirrors"
MAX_JUDGEMENT_BYTES = 64 * 1024 * 1024
ATTEMPTS = 4  # where the author moves the pointer meanwhile


def open_copy(address: str) -> Path:
    """Return the folder in the user's cache that stands for the registry at an address."""
    cache = UserCache(
        cache_folder() / CACHE_FOLDER_NAME,
        "copies of registries in object storage",
        "put another adapter in the place of the champion",
    )
    cache.remove_unused()
    folder = cache.entry(address.rstrip("/"))
    folder.mkdir(mode=0o700, exist_ok=True)
    write_json(folder / ADDRESS_NOTE_NAME, {"address": address.rstrip("/")})  # its use renews it
    return folder


def update_copy(registry: Path, name: str, version: str | None) -> None:
    """Bring a name of a copy up to date; `nested_core.registry.mirroring.update_copy` says how."""
    check_name(name)
    note = registry / ADDRESS_NOTE_NAME
    address = str(read_json_object(note, MAX_NOTE_BYTES).get("address"))
    note.parent.touch()
    with exclusive_lock(registry / f".{name}.lock"):
        copy = _Copy(registry / name, ObjectStorage(address))
        copy.finish_interrupted()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                copy.update(version)
                return
            except ObjectMissing as error:
                copy.require_moved_pointer(error, is_last=attempt == ATTEMPTS)


class _Copy:
    """The copy of one name, while this process alone brings it up to date."""

    def __init__(self, folder: Path, storage: ObjectStorage) -> None:
        self.folder, self.storage, self.name = folder, storage, folder.name
        self.place = f"{storage.address}/{folder.name}"
        self.staging = folder.parent / f".staging-{folder.name}"
        self.pointer: Pointer | None = None

    def finish_interrupted(self) -> None:
        """Remove what a killed process left, and have the link say what the history says."""
        shutil.rmtree(self.staging, ignore_errors=True)
        if self.folder.is_dir():
            try:
                with exclusive_folder_lock(self.folder) as lock:
                    NameFolder(self.folder, lock, read_ledger(self.folder)).write_views()
            except DamagedError as error:
                raise DamagedError(
                    f"The local copy of {self.place} is damaged ({error}). Remove "
                    f"{self.folder.parent}, and give the command again."
                ) from error

    def update(self, version: str | None) -> None:
        """Take the mirror's history, with a version's files; raises ObjectMissing if it is torn."""
        self.pointer = self._read_pointer()
        ledger = read_ledger(self.folder) if self.folder.is_dir() else Ledger()
        is_news = ledger.end_sha256 != self.pointer.end
        if not is_news and not self._list_missing(ledger, version):
            return
        self.staging.mkdir(mode=0o700)
        try:
            history, ledger = self._fetch_history(self.pointer)
            for one in self._list_missing(ledger, version):
                self._fetch_version(one, ledger)
            if version == EVERY_VERSION:
                self._fetch_judgements(ledger)
            self._take(history, ledger)
        finally:
            shutil.rmtree(self.staging, ignore_errors=True)

    def require_moved_pointer(self, error: ObjectMissing, *, is_last: bool) -> None:
        """Raise DamagedError for a torn mirror, unless the author has moved the pointer since.

        error: what is not there.
        """
        if self.pointer is None or is_last or self._read_pointer() == self.pointer:
            raise DamagedError(
                f"{self.place} is torn: {error} Its pointer needs it. On the author's machine "
                f"`nested-tune registry mirror` puts what is missing."
            ) from error

    def _read_pointer(self) -> Pointer:
        """Read the mirror's pointer; ConfigError without one."""
        key = pointer_key(self.name)
        try:
            content, _ = self.storage.read(key, MAX_POINTER_BYTES)
        except ObjectMissing:
            if self.folder.is_dir():
                raise DamagedError(f"{self.place} is torn: {key} is gone.") from None
            raise ConfigError(
                f"{self.storage.address} has no adapter named {self.name}: {key} is not there. "
                f"Check the address and the name. The author's machine puts it with `registry.mirror`, "
                f"or by `nested-tune registry mirror REGISTRY --to {self.storage.address}`."
            ) from None
        return parse_pointer(content, f"{self.storage.address}/{key}")

    def _fetch_history(self, pointer: Pointer) -> tuple[bytes, Ledger]:
        """Return the mirror's history, checked line by line, which goes on from the copy's."""
        path = self.folder / LEDGER_NAME
        known = path.read_bytes() if file_type(path) == "file" else b""
        if known and first_line_sha256(known) != pointer.registry:
            raise DamagedError(
                f"{self.place} is the mirror of another registry than the one that was read here "
                f"before. If that is right, remove {self.folder.parent} and give the command again."
            )
        if pointer.history_bytes > MAX_HISTORY_BYTES:
            raise DamagedError(f"{self.place} has a history beyond {MAX_HISTORY_BYTES} bytes.")
        content = known
        for number, stretch in enumerate(s for s in pointer.history if s.end > len(known)):
            if number == 0:
                content = known[: stretch.start]
            size, target = stretch.end - stretch.start, self.staging / str(stretch.start)
            found = self.storage.fetch(stretch.key(self.name), target, size=size)
            if found != stretch.sha256:
                raise DamagedError(f"{self.place}/{stretch.key(self.name)} has other content.")
            content += target.read_bytes()
        if len(content) > pointer.history_bytes or not content.startswith(known):
            raise DamagedError(
                f"{self.place} is older than what was read here before, or goes on from there "
                f"otherwise: it ends at line {pointer.lines}. If that is right (the registry was "
                f"restored from a backup), remove {self.folder.parent} and give the command again."
            )
        (self.staging / LEDGER_NAME).write_bytes(content)
        try:
            ledger = read_ledger(self.staging)
        except DamagedError as error:
            raise DamagedError(f"{self.place} is damaged: {error}") from error
        says = (pointer.registry, pointer.lines, pointer.end, pointer.champion)
        is_so = (
            first_line_sha256(content),
            len(ledger.entries),
            ledger.end_sha256,
            ledger.champion,
        )
        if says != is_so or ledger.torn:
            raise DamagedError(
                f"{self.place}: the pointer does not say what the history says (line {pointer.lines} "
                f"or champion). Something else than nested-tune writes there."
            )
        return content, ledger

    def _list_missing(self, ledger: Ledger, wanted: str | None) -> list[str]:
        """Return the versions whose files the copy needs and does not have as they are recorded.

        wanted: as of `update_copy`.
        """
        if wanted == EVERY_VERSION:
            versions: Iterable[str] = sorted(ledger.by_version)
        elif wanted is not None:
            self.folder.joinpath(VERSIONS_FOLDER_NAME).mkdir(parents=True, exist_ok=True)
            versions = [resolve_version(self.folder, wanted, ledger)]
        else:
            versions = [] if ledger.champion is None else [ledger.champion]
        return [v for v in versions if not self._has_version(v, ledger)]

    def _has_version(self, version: str, ledger: Ledger) -> bool:
        """Return whether the copy has a version with the manifest that the history records.

        Its files are checked by whoever reads them.
        """
        place = self.folder / VERSIONS_FOLDER_NAME / version
        try:
            return read_manifest(place)["digest"] == recorded_manifest(ledger, version)
        except DamagedError:
            return False

    def _fetch_version(self, version: str, ledger: Ledger) -> None:
        """Fetch a version into the staging folder, and check it against the history there."""
        manifest = recorded_manifest(ledger, version)
        if manifest is None:
            raise DamagedError(f"{self.place}: the history has no manifest of {version}.")
        stages.info(f"fetching {self.name}, version {shorten_digest(version)}")
        key, place = version_folder_key(self.name, version, manifest), self.staging / version
        place.mkdir()
        size = min(self.storage.find(f"{key}/{MANIFEST_NAME}").size, MAX_MANIFEST_BYTES)
        self.storage.fetch(f"{key}/{MANIFEST_NAME}", place / MANIFEST_NAME, size=size)
        files = read_manifest(place)["files"]
        if unknown := files.keys() - {*VERSION_FILES, *OPTIONAL_FILES}:
            raise DamagedError(f"{self.place}/{key}: {min(unknown)} belongs to no version.")
        for name, entry in files.items():
            self.storage.fetch(f"{key}/{name}", place / name, size=int(entry["bytes"]))
        findings, _ = inspect_version(place, version, {manifest})
        if findings:
            problems = "; ".join(f"{one.file.name} {one.message}" for one in findings)
            raise DamagedError(f"{self.place}/{key} is not what the history records: {problems}.")

    def _fetch_judgements(self, ledger: Ledger) -> None:
        """Fetch the later verdicts that the copy lacks, and check them against the history."""
        for version in ledger.by_version:
            for number, digest in ledger.judgements(version):
                if judgement_path(self.folder, version, digest).is_file():
                    continue
                target = judgement_path(self.staging, version, digest)
                target.parent.mkdir(parents=True, exist_ok=True)
                key = judgement_key(self.name, version, digest)
                size = min(self.storage.find(key).size, MAX_JUDGEMENT_BYTES)
                self.storage.fetch(key, target, size=size)
                read_judgement(self.staging, version, digest, number)

    def _take(self, history: bytes, ledger: Ledger) -> None:
        """Move what was fetched into the copy, then take the history, then the champion."""
        versions = self.folder / VERSIONS_FOLDER_NAME
        versions.mkdir(mode=0o700, parents=True, exist_ok=True)
        with exclusive_folder_lock(self.folder) as lock:
            locked = NameFolder(self.folder, lock, ledger)
            for version in registered_versions(self.folder):
                is_replaced = (self.staging / version).is_dir()
                if version not in ledger.by_version or is_replaced:
                    locked.delete_version(version)
            for fetched in sorted(self.staging.iterdir()):
                if fetched.name in ledger.by_version:
                    fetched.rename(versions / fetched.name)
            for judgement in self.staging.glob("judgements/*/*.json"):
                target = self.folder / judgement.relative_to(self.staging)
                target.parent.mkdir(parents=True, exist_ok=True)
                judgement.rename(target)
            path = self.folder / LEDGER_NAME
            if file_type(path) != "file" or path.read_bytes() != history:
                write_bytes(path, history)
            locked.write_views()


MIRROR = RegistryMirror(publish_after_change, open_copy, update_copy)
