"""The folder of a name in a registry: find, create, list and lock it (by its file `.lock`).

Names that are paths or symbolic links are refused, and names that some file system would confuse
with another (differing only in case, a dot at the end, a device of Windows).
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path

from nested_core.config.names import why_invalid_adapter_name
from nested_core.errors import ConfigError, DamagedError, join_first_values, shorten
from nested_core.storage.atomic import require_writable_place, sync_path
from nested_core.storage.lock_file import LockFile, exclusive_lock, shared_lock
from nested_core.storage.output_places import REGISTRY_LOCK_NAME, require_registry_place
from nested_core.storage.untrusted_files import file_type

VERSIONS_FOLDER_NAME = "versions"
DATA_FOLDER_NAME = "data"
MAX_LISTED_NAMES = 5
UNUSABLE_PATH_ERRNOS = {
    *(errno.EACCES, errno.EEXIST, errno.ELOOP, errno.ENAMETOOLONG),
    *(errno.ENOTDIR, errno.EPERM, errno.EROFS),
}


@contextmanager
def exclusive_folder_lock(folder: Path) -> Iterator[LockFile]:
    """Hold the exclusive lock of `folder` during the block.

    Raises ConfigError if the folder cannot be written or its disk has no locks. If the block fails
    with damage or a missing file of the folder, and the lock file was removed meanwhile, the
    DamagedError says so instead: another process then locks a new file and writes at the same time.
    """
    with exclusive_lock(folder / REGISTRY_LOCK_NAME) as lock:
        _refresh_listing(folder)
        try:
            yield lock
        except (DamagedError, FileNotFoundError) as error:
            lock.require_still_at_path()
            if isinstance(error, FileNotFoundError) and _is_below(folder, error.filename):
                raise DamagedError(
                    f"{error.filename} went away while this process had {folder} locked: another "
                    f"process writes here whose lock file was removed or replaced. Nothing more is "
                    f"written; find out what removes lock files, then run the command again."
                ) from error
            raise


def _is_below(folder: Path, path: object) -> bool:
    """Return whether `path` is a path below `folder`; False for anything that is no path."""
    return isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder)


@contextmanager
def shared_folder_lock(folder: Path) -> Iterator[LockFile | None]:
    """Keep writers out of `folder` during the block; without a lock file, yield None."""
    with shared_lock(folder / REGISTRY_LOCK_NAME) as lock:
        _refresh_listing(folder)
        yield lock


def require_no_writes_meanwhile(folder: Path, lock: LockFile | None) -> None:
    """Raise DamagedError if another process may have written while `folder` was read.

    lock: what `shared_folder_lock` yielded: None if there was no lock file, which a writer may have
        created since. What was read is then no proof of damage.
    """
    if lock is not None:
        lock.require_still_at_path()
    elif (folder / REGISTRY_LOCK_NAME).exists():
        raise DamagedError(
            f"{folder / REGISTRY_LOCK_NAME} was made or replaced while this process read "
            f"{folder}: another process may be writing here. Run the command again."
        )


def _refresh_listing(folder: Path) -> None:
    """Make changes by other machines visible, if the folder is on a network file system.

    An NFS client may answer from directory entries up to a minute old, the link's among them.
    Opening a directory makes it ask the server (Linux: fs/nfs/dir.c, nfs_lookup_verify_inode).
    """
    for directory in (folder, folder / "versions"):
        with suppress(FileNotFoundError):
            os.close(os.open(directory, os.O_RDONLY | os.O_DIRECTORY))


def check_name(name: str) -> None:
    """Raise ConfigError unless `name` is 1 to 64 letters, digits, `.`, `_` or `-`, and portable."""
    reason = why_invalid_adapter_name(name)
    if reason is not None:
        raise ConfigError(reason)


def require_registry(registry: Path) -> None:
    """Raise ConfigError if the registry is not a directory."""
    if file_type(registry, follow_links=True) != "directory":
        raise ConfigError(
            f"There is no registry at {registry}. Expected a directory into which an adapter has "
            "been promoted. Check the path, or promote a run into it first."
        )


def find_name_folder(registry: Path, name: str) -> Path:
    """Return the folder of `name`.

    Raises ConfigError if it does not exist, DamagedError if it is a link.
    """
    check_name(name)
    require_registry(registry)
    _refuse_unusable_entries(registry, name)
    folder = registry / name
    if file_type(folder / VERSIONS_FOLDER_NAME) != "directory":
        names = list_names(registry)
        listed = join_first_values(names, MAX_LISTED_NAMES) or "nothing"
        near = [f"Did you mean {one!r}? " for one in get_close_matches(name, names, n=1)]
        raise ConfigError(
            f"The registry {registry} has no adapter named {name!r}. It holds: {listed}. "
            f"{''.join(near)}Check the name, or promote a run under it first."
        )
    return folder


def list_names(registry: Path) -> list[str]:
    """Return the names in a registry, sorted; empty if the registry does not exist."""
    if file_type(registry, follow_links=True) != "directory":
        return []
    return sorted(e.name for e in registry.iterdir() if (e / VERSIONS_FOLDER_NAME).is_dir())


def name_exists(registry: Path, name: str) -> bool:
    """Return whether the folder of `name` has any content.

    An empty folder is one whose creation is going on or was interrupted.
    """
    folder = registry / name
    return folder.is_dir() and any(folder.iterdir())


def create_name_folder(registry: Path, name: str) -> Path:
    """Return the folder of `name`, creating it and the registry if they do not exist.

    Raises ConfigError if they cannot be created.
    """
    check_name(name)
    require_registry_place(registry)
    _create_folders(registry)
    with exclusive_folder_lock(registry):
        _refuse_unusable_entries(registry, name)
        _create_folders(registry / name / VERSIONS_FOLDER_NAME)
    return registry / name


def require_creatable(registry: Path, name: str) -> None:
    """Raise ConfigError if `create_name_folder` would fail, without creating anything."""
    check_name(name)
    require_registry_place(registry)
    _require_folder_or_nothing(registry)
    require_writable_place(registry / name / VERSIONS_FOLDER_NAME, "a registry", "registry.path")
    if registry.is_dir():
        with exclusive_folder_lock(registry):
            _refuse_unusable_entries(registry, name)


def _require_folder_or_nothing(registry: Path) -> None:
    """Raise ConfigError if the registry, or a folder above it, exists and is not a directory."""
    for path in (registry, *registry.parents):
        if os.path.lexists(path):
            if path.is_dir():
                return
            raise ConfigError(
                f"{shorten(repr(str(registry)), 80)} cannot be made a directory: {shorten(path)} "
                f"is none. Expected a path at which you may create directories; check "
                f"registry.path."
            )


def _create_folders(folder: Path) -> None:
    """Create a directory and its parents; ConfigError if the path is not usable."""
    try:
        _create_folders_durably(folder)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in UNUSABLE_PATH_ERRNOS:
            raise
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"{shorten(repr(str(folder)), 80)} cannot be made a directory ({reason}). Expected a "
            "path at which you may create directories. Check registry.path or --registry."
        ) from error


def _create_folders_durably(folder: Path) -> None:
    """Create a directory and its parents, each synced to disk in the directory above it."""
    if file_type(folder, follow_links=True) == "directory":
        return
    _create_folders_durably(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_path(folder.parent)


def _refuse_unusable_entries(registry: Path, name: str) -> None:
    """Refuse what the registry must not hold for `name`.

    Raises ConfigError for a name that differs from it only in case, DamagedError if its folder or
    the versions/ in it is a symbolic link.
    """
    for entry in os.listdir(registry):
        if entry != name and entry.casefold() == name.casefold():
            raise ConfigError(
                f"{registry} already holds the name {entry!r}, which differs from {name!r} only in "
                f"case; some file systems cannot tell the two apart. Use {entry!r}, or a new name."
            )
    for path in (registry / name, registry / name / VERSIONS_FOLDER_NAME):
        if file_type(path) == "link":
            raise DamagedError(
                f"{path} is a symbolic link to {os.readlink(path)!r}. A registry has no link but "
                "`champion`: replace it by the directory itself."
            )
