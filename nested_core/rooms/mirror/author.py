"""The author of a mirror: puts what object storage lacks of a name, then moves the pointer there.

The local registry decides, and is only read. Each step can be cut off: the pointer moves last, and
what is there of an earlier attempt is not put again.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from nested_core.errors import DamagedError, MissingFileError
from nested_core.registry.folders import VERSIONS_FOLDER_NAME, shared_folder_lock
from nested_core.registry.judgements import judgement_path
from nested_core.registry.ledger import LEDGER_NAME, read_ledger
from nested_core.registry.link_and_views import require_sound_end
from nested_core.registry.mirroring import read_mirror_note, write_mirrored_end
from nested_core.registry.versions import OPTIONAL_FILES, VERSION_FILES, verify_version
from nested_core.rooms.mirror.mirror_layout import (
    MAX_POINTER_BYTES,
    MAX_STRETCHES,
    Pointer,
    Stretch,
    first_line_sha256,
    judgement_key,
    parse_pointer,
    pointer_key,
    recorded_manifest,
    version_folder_key,
)
from nested_core.rooms.mirror.object_storage import (
    ObjectChanged,
    ObjectMissing,
    ObjectStorage,
    StorageError,
)
from nested_core.storage.lock_file import exclusive_lock
from nested_core.storage.untrusted_files import file_type, read_regular
from nested_core.text.digest_format import shorten_digest
from nested_core.text.stages import stages

MIRROR_LOCK_NAME = ".mirror-lock"
SECONDS_AFTER_CHANGE = 60.0  # that a promotion, a night or a reconcile gives to its mirror
LOCK_POLL_SECONDS = 0.2
ATTEMPTS = 8  # where the pointer or the registry changes meanwhile
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Published:
    """What was put: `files` of versions and judgements, `size` bytes; `lines` are in the mirror.

    skipped: what is wrong with each version that is damaged here, and was not put.
    """

    address: str
    lines: int
    champion: str | None
    files: int = 0
    size: int = 0
    skipped: tuple[str, ...] = ()


def publish_after_change(folder: Path) -> None:
    """Bring a name's mirror up to date, if it has one and is behind; what fails is only logged.

    folder: REGISTRY/NAME, which this process has not locked.
    """
    try:
        note = read_mirror_note(folder)
        if note is None:
            return
        with shared_folder_lock(folder):
            is_behind = read_ledger(folder).end_sha256 != note.end
        if is_behind:
            publish(folder, note.address, seconds=SECONDS_AFTER_CHANGE)
    except Exception as error:  # the change here is made, whatever the client or the network does
        _log.warning(
            "The mirror of %s was not brought up to date: %s What is missing is put by the next "
            "promotion or reconcile, or by `nested-tune registry mirror %s`.",
            folder,
            error,
            folder.parent,
        )


def publish(folder: Path, address: str, *, seconds: float | None = None) -> Published:
    """Put what the mirror of a name lacks, move its pointer, and delete what is not needed.

    folder: REGISTRY/NAME. address: of the registry's mirror, below which NAME gets its folder.
    seconds: after which it gives up; None waits as long as it takes.

    Raises StorageError where the storage is away, refuses or is too slow, DamagedError for a mirror
    of another registry, a damaged history, or a damaged champion.
    """
    began = time.monotonic()

    def wait() -> None:
        """Wait for another process that publishes the same name; raises once time is over."""
        if seconds is not None and time.monotonic() > began + seconds:
            raise StorageError(f"another process has published {folder} for {seconds:g} seconds.")
        time.sleep(LOCK_POLL_SECONDS)

    storage = ObjectStorage(address, seconds=seconds)
    with exclusive_lock(folder / MIRROR_LOCK_NAME, on_busy=wait):
        for _ in range(ATTEMPTS):
            try:
                published = _Attempt(folder, storage).publish()
            except (ObjectChanged, MissingFileError):  # of a gc here, or of a put that came late
                continue
            write_mirrored_end(folder, address, published.end)
            return published.facts
    raise DamagedError(
        f"{address} changed {ATTEMPTS} times while {folder} was put there: something else writes to "
        f"it. Give each registry a prefix of its own."
    )


@dataclass(frozen=True)
class _Done:
    facts: Published
    end: str


class _Attempt:
    """One attempt to publish a name, on what its history was when the attempt began."""

    def __init__(self, folder: Path, storage: ObjectStorage) -> None:
        self.folder, self.storage, self.name = folder, storage, folder.name
        with shared_folder_lock(folder):
            self.ledger = read_ledger(folder)
            require_sound_end(folder, self.ledger)
            content = b""
            if self.ledger.entries:
                content = read_regular(folder / LEDGER_NAME)[: self.ledger.whole_bytes]
        self.history = content
        self.skipped: list[str] = []

    def publish(self) -> _Done:
        """Put what is missing; raises ObjectChanged or MissingFileError to be tried again."""
        if not self.ledger.entries:
            return _Done(Published(self.storage.address, 0, None), self.ledger.end_sha256)
        pointer, tag = self._read_pointer()
        if pointer is not None:
            self._require_own(pointer)
        there = {
            stored.key: stored.size
            for kind in ("versions", "judgements", "history")
            for stored in self.storage.list_objects(f"{self.name}/{kind}")
        }
        wanted = self._list_files()
        missing = {
            key: path for key, path in wanted.items() if there.get(key) != path.stat().st_size
        }
        size = 0
        for number, (key, path) in enumerate(missing.items(), 1):
            stages.info(f"mirror of {self.name}: file {number} of {len(missing)}")
            size += path.stat().st_size
            self.storage.put(key, path)
        stretches = self._put_history(pointer, there)
        new = Pointer(
            registry=first_line_sha256(self.history),
            lines=len(self.ledger.entries),
            end=self.ledger.end_sha256,
            champion=self.ledger.champion,
            history=stretches,
        )
        if new != pointer:
            self.storage.replace(pointer_key(self.name), new.render(), tag)
            # Only here: another author, who is refused next time, may have put what is not ours
            self.storage.delete(self._list_unneeded(there, stretches))
        facts = Published(
            self.storage.address,
            new.lines,
            new.champion,
            len(missing),
            size,
            tuple(self.skipped),
        )
        return _Done(facts, self.ledger.end_sha256)

    def _read_pointer(self) -> tuple[Pointer | None, str | None]:
        """Read the mirror's pointer and its entity tag; None and None without one."""
        key = pointer_key(self.name)
        try:
            content, tag = self.storage.read(key, MAX_POINTER_BYTES)
        except ObjectMissing:
            return None, None
        return parse_pointer(content, f"{self.storage.address}/{key}"), tag

    def _require_own(self, pointer: Pointer) -> None:
        """Raise DamagedError unless the mirror's history is the beginning of this registry's."""
        place = f"{self.storage.address}/{self.name}"
        if pointer.registry != first_line_sha256(self.history):
            raise DamagedError(
                f"{place} is the mirror of another registry: its history begins otherwise than that "
                f"of {self.folder}. One registry alone writes to a mirror: give this one another "
                f"prefix. Nothing was put."
            )
        beginning = self.history[: pointer.history_bytes]
        last_line = beginning[beginning.rfind(b"\n", 0, -1) + 1 :]
        is_beginning = len(beginning) == pointer.history_bytes
        if not is_beginning or hashlib.sha256(last_line).hexdigest() != pointer.end:
            raise DamagedError(
                f"{place} has a history of {pointer.lines} lines that {self.folder} does not begin "
                f"with: a copy of this registry went on elsewhere and writes there, or this one "
                f"was restored from a backup. Nothing was put. Go on with the other registry, or "
                f"give this one another prefix."
            )

    def _list_files(self) -> Mapping[str, Path]:
        """Return the local file of each key that the history needs, the champion's verified first.

        Raises DamagedError where the champion is damaged; another damaged version is skipped.
        """
        files: dict[str, Path] = {}
        versions = sorted(self.ledger.by_version, key=lambda v: (v != self.ledger.champion, v))
        for version in versions:
            manifest = recorded_manifest(self.ledger, version)
            place = self.folder / VERSIONS_FOLDER_NAME / version
            if manifest is None:
                continue
            try:
                verify_version(place, version, {manifest}, max_age=float("inf"))
            except DamagedError as error:
                if file_type(place) == "missing" and self._is_removed_by_now(version):
                    raise MissingFileError(f"{place} was removed.") from error
                if version == self.ledger.champion:
                    raise
                self.skipped.append(f"{shorten_digest(version)}: {error}")
                continue
            prefix = version_folder_key(self.name, version, manifest)
            for name in (*VERSION_FILES, *OPTIONAL_FILES):
                if (place / name).exists():
                    files[f"{prefix}/{name}"] = place / name
            for _, digest in self.ledger.judgements(version):
                path = judgement_path(self.folder, version, digest)
                if path.is_file():  # else damaged, as an audit of either will say
                    files[judgement_key(self.name, version, digest)] = path
        return files

    def _is_removed_by_now(self, version: str) -> bool:
        """Return whether the registry has removed a version since this attempt read its history."""
        with shared_folder_lock(self.folder):
            return read_ledger(self.folder).is_removed(version)

    def _list_unneeded(self, there: Iterable[str], stretches: Sequence[Stretch]) -> list[str]:
        """Return the keys of removed versions and of stretches that another one replaced."""
        kept = {stretch.key(self.name) for stretch in stretches}
        kind_and_version = {key: key.split("/")[1:3] for key in there}
        return [
            key
            for key, (kind, version) in kind_and_version.items()
            if key not in kept and (kind == "history" or version not in self.ledger.by_version)
        ]

    def _put_history(
        self, pointer: Pointer | None, there: Mapping[str, int]
    ) -> tuple[Stretch, ...]:
        """Put the lines that the mirror lacks; return all stretches of the history."""
        before = () if pointer is None else pointer.history
        if len(before) >= MAX_STRETCHES or any(s.key(self.name) not in there for s in before):
            before = ()
        start = before[-1].end if before else 0
        lines = self.history[start:]
        if not lines:
            return before
        new = Stretch(start=start, end=len(self.history), sha256=hashlib.sha256(lines).hexdigest())
        self.storage.put(new.key(self.name), lines)
        return (*before, new)
