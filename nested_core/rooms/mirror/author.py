"""The author of a mirror: puts what object storage lacks of a name, then moves the pointer there.

The local registry decides, and is only read. Each step can be cut off: the pointer moves last, and
what is there of an earlier attempt is not put again.
"""

from __future__ import annotations

import hashlib
import logging
import time
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from nested_core.errors import DamagedError, quote_path
from nested_core.registry.folders import VERSIONS_FOLDER_NAME, shared_folder_lock
from nested_core.registry.judgements import judgement_path
from nested_core.registry.ledger import LEDGER_NAME, read_ledger
from nested_core.registry.link_and_views import require_sound_end
from nested_core.registry.mirroring import read_mirror_note, write_mirrored_end
from nested_core.registry.versions import OPTIONAL_FILES, VERSION_FILES, verify_version
from nested_core.rooms.mirror.mirror_layout import (
    FOLDERS,
    LAYOUT_PATTERN,
    Pointer,
    history_key,
    judgement_key,
    pointer_key,
    read_pointer,
    version_key,
)
from nested_core.rooms.mirror.object_storage import (
    ObjectChanged,
    ObjectMissing,
    ObjectStorage,
    StorageError,
)
from nested_core.storage.atomic import render_json
from nested_core.storage.lock_file import exclusive_lock
from nested_core.storage.untrusted_files import read_regular
from nested_core.text.stages import stages

MIRROR_LOCK_NAME = ".mirror-lock"
SECONDS_AFTER_CHANGE = 60.0  # that a promotion, a night or a reconcile gives to its mirror
LOCK_POLL_SECONDS = 0.2
ATTEMPTS = 8  # where the pointer or the registry changes meanwhile
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What a mirror has now, and how many `files` of versions and verdicts were put for it."""

    address: str
    champion: str | None
    lines: int
    files: int


def publish_after_change(folder: Path) -> None:
    """Bring a name's mirror up to date, if it has one and is behind; what fails is only logged.

    folder: REGISTRY/NAME, which this process has not locked.
    """
    try:
        note = read_mirror_note(folder)
        with shared_folder_lock(folder):
            end = read_ledger(folder).end_sha256
        if note is not None and note.end != end:
            publish(folder, note.address, seconds=SECONDS_AFTER_CHANGE)
    except Exception as error:  # the change here is made, whatever the client or the network does
        _log.warning(
            "The mirror of %s is behind: %s The next promotion or reconcile puts what it lacks, or "
            "`nested-tune registry mirror %s`.",
            folder,
            error,
            folder.parent,
        )


def publish(folder: Path, address: str, *, seconds: float | None = None) -> Published:
    """Put what the mirror of a name lacks, move its pointer, and delete what is not needed.

    folder: REGISTRY/NAME. address: of the registry's mirror, below which NAME gets its folder.
    seconds: after which it gives up. None, by hand, waits as long as it takes, and puts every file
        even where an object of its size is there, which may be damaged.

    Raises StorageError where the storage is away, refuses or is too slow, DamagedError for a mirror
    of another registry, a damaged history, or a damaged champion.
    """
    deadline = time.monotonic() + (float("inf") if seconds is None else seconds)

    def wait() -> None:
        """Wait for another process that publishes the same name; StorageError once it is late."""
        if time.monotonic() > deadline:
            raise StorageError(f"another process was publishing {folder} all the time.")
        time.sleep(LOCK_POLL_SECONDS)

    storage = ObjectStorage(address, seconds=seconds)
    with exclusive_lock(folder / MIRROR_LOCK_NAME, on_busy=wait):
        for _ in range(ATTEMPTS):
            snapshot = _Snapshot(folder)
            try:
                published = snapshot.publish(storage, is_by_hand=seconds is None)
            except (ObjectChanged, FileNotFoundError):  # by a late request of ours, or a gc here
                continue
            write_mirrored_end(folder, address, snapshot.ledger.end_sha256)
            return published
    raise DamagedError(
        f"{address} was changed {ATTEMPTS} times while {folder} was put there: something else "
        f"writes to it. Give each registry a prefix of its own."
    )


class _Snapshot:
    """The history of a name at one moment: parsed, and its bytes."""

    def __init__(self, folder: Path) -> None:
        """Read the history of REGISTRY/NAME; DamagedError if its end is not sound."""
        self.folder = folder
        with shared_folder_lock(folder):
            self.ledger = read_ledger(folder)
            require_sound_end(folder, self.ledger)
            content = read_regular(folder / LEDGER_NAME) if self.ledger.entries else b""
        self.history = content[: self.ledger.whole_bytes]

    def publish(self, storage: ObjectStorage, *, is_by_hand: bool) -> Published:
        """Put what is missing; raises ObjectChanged or FileNotFoundError to be tried again."""
        name, ledger = self.folder.name, self.ledger
        if not ledger.entries:
            return Published(storage.address, None, 0, 0)
        try:
            before, tag = read_pointer(storage, name)
            self._require_own(before, storage)
        except ObjectMissing:
            before, tag = None, None
        listed = chain(*(storage.list_objects(f"{name}/{folder}") for folder in FOLDERS))
        there = {stored.key: stored.size for stored in listed}
        needed = self._list_files()
        files = {key: path for key, path in needed.items() if path.is_file()}
        # Of an equal size it may be damaged there: by hand all is put, and by going back its target
        is_new = before is not None and before.champion != ledger.champion
        is_back = is_new and [e.action for e in ledger.changes()[-1:]] == ["rollback"]
        again = {*ledger.by_version} if is_by_hand else {ledger.champion} if is_back else set()
        missing = [
            key
            for key, path in files.items()
            if path.parent.name in again or there.get(key) != path.stat().st_size
        ]
        folders = {files[key].parent for key in missing}
        for version in ledger.by_version:  # one that is lost is said, and a champion refused
            keys = {f"{version_key(name, version, ledger)}/{file}" for file in VERSION_FILES}
            if not keys <= files.keys() | (set() if version == ledger.champion else there.keys()):
                folders.add(self.folder / VERSIONS_FOLDER_NAME / version)
        sound = {folder for folder in folders if self._is_sound(folder)}
        missing = [key for key in missing if files[key].parent in sound]
        for number, key in enumerate(missing, 1):
            stages.info(f"mirror of {name}: file {number} of {len(missing)}")
            storage.put(key, files[key])
        digest = hashlib.sha256(self.history).hexdigest()
        lines, size = len(ledger.entries), len(self.history)
        storage.put(history_key(name, digest), self.history)
        new = Pointer(champion=ledger.champion, lines=lines, size=size, history=digest)
        kept = {*needed, history_key(name, digest)}
        spare = [key for key in there if key not in kept and LAYOUT_PATTERN.fullmatch(key)]
        if new != before or spare:
            # Before the deletion, also where it says the same: refused if another author was here
            storage.replace(pointer_key(name), render_json(new.model_dump()), tag)
            storage.delete(spare)
        return Published(storage.address, ledger.champion, lines, len(missing))

    def _require_own(self, pointer: Pointer, storage: ObjectStorage) -> None:
        """Raise DamagedError unless the mirror's history is the beginning of this registry's."""
        beginning = self.history[: pointer.size]
        if hashlib.sha256(beginning).hexdigest() != pointer.history:
            raise DamagedError(
                f"{storage.address}/{self.folder.name} has a history of {pointer.lines} lines that "
                f"the one of {self.folder} does not begin with: it is the mirror of another "
                f"registry, a copy of this one goes on elsewhere, or this one was restored from a "
                f"backup. Nothing was put. One registry alone writes to a prefix: give another "
                f"(`nested-tune registry mirror {quote_path(self.folder.parent)} --to ADDRESS`)."
            )

    def _list_files(self) -> dict[str, Path]:
        """Return key and local path of each file that the versions of the history may have."""
        name, files = self.folder.name, dict[str, Path]()
        for version in self.ledger.by_version:
            prefix = version_key(name, version, self.ledger)
            place = self.folder / VERSIONS_FOLDER_NAME / version
            files |= {f"{prefix}/{file}": place / file for file in VERSION_FILES + OPTIONAL_FILES}
            for _, digest in self.ledger.judgements(version):
                path = judgement_path(self.folder, version, digest)
                files[judgement_key(name, version, digest)] = path
        return files

    def _is_sound(self, place: Path) -> bool:
        """Return whether a version may be put; what is damaged here is left out, and said.

        Raises DamagedError for a damaged champion. Verdicts are checked by their readers.
        """
        version = place.name
        if place.parent.name != VERSIONS_FOLDER_NAME:
            return True
        try:
            verify_version(place, version, self.ledger.manifest_hashes(version))
        except DamagedError as error:
            if version == self.ledger.champion:
                raise
            _log.warning("Not put into the mirror: %s", error)
            return False
        return True
