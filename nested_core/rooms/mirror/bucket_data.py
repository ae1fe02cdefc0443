"""Data sets in object storage: fetched into the user's cache by entity tag, then read as files."""

from __future__ import annotations

import shutil
from pathlib import Path

from nested_core.data.sources.split_files import SUFFIXES, BucketReader, FetchedData
from nested_core.errors import ConfigError, shorten
from nested_core.rooms.mirror.object_storage import (
    ObjectChanged,
    ObjectMissing,
    ObjectStorage,
    StoredObject,
)
from nested_core.storage.atomic import temporary_beside
from nested_core.storage.user_cache import UserCache, cache_folder

CACHE_FOLDER_NAME = "bucket-data"
MAX_FILES = 10_000
MAX_NAME_BYTES = 255  # of a file
SPARE_BYTES = 2**30  # that stay free on the cache's disk
ATTEMPTS = 3  # where objects change between their list and their fetch


def fetch(address: str) -> FetchedData:
    """Fetch the data set at an address, as far as the cache lacks it.

    address: of one file, or of a folder, of whose files those that can be read as data are fetched.

    Raises ConfigError for an address without data, for data that are too large for the disk or keep
    changing, and if object storage is away or refuses.
    """
    is_file = address.lower().endswith(SUFFIXES) and address.count("/") > 2  # else it is a bucket
    folder, _, name = address.rpartition("/") if is_file else (address, "", "")
    storage = ObjectStorage(folder)
    cache = UserCache(
        cache_folder() / CACHE_FOLDER_NAME, "data sets of a bucket", "change what is trained on"
    )
    for _ in range(ATTEMPTS):
        try:
            objects = [storage.find(name)] if is_file else _list_files(storage)
        except ObjectMissing as error:
            raise ConfigError(f"data: {error} Check the address {address}.") from None
        try:
            place = _fetch_all(storage, objects, cache)
        except (ObjectChanged, ObjectMissing):  # since it was listed
            continue
        tags = {stored.key: stored.tag for stored in objects}
        return FetchedData(str(place / name if is_file else place), tags)
    raise ConfigError(
        f"data: {address} was changed {ATTEMPTS} times while it was fetched. Wait until nobody "
        f"writes there, or give a prefix of its own to each state of the data."
    )


def _list_files(storage: ObjectStorage) -> list[StoredObject]:
    """List the files of data of a folder, without those in its folders; ConfigError without one."""
    listed = [*storage.list_objects("", has_folders=False)]
    if len(listed) > MAX_FILES:
        raise ConfigError(
            f"data: {storage.address} has more than {MAX_FILES:,} objects. Expected the folder of "
            f"one data set."
        )
    files = [stored for stored in listed if stored.key.lower().endswith(SUFFIXES)]
    if too_long := [one.key for one in files if len(one.key.encode()) > MAX_NAME_BYTES]:
        raise ConfigError(
            f"data: {storage.address} has a name that is longer than {MAX_NAME_BYTES} bytes, as no "
            f"local file's is: {shorten(too_long[0], 80)}. Rename it."
        )
    if not files:
        raise ConfigError(
            f"data: {storage.address} has no file of data. Expected train.jsonl or another of "
            f"{', '.join(SUFFIXES)} there, or the address of one such file."
        )
    return files


def _fetch_all(storage: ObjectStorage, objects: list[StoredObject], cache: UserCache) -> Path:
    """Return a folder of links to the cached content of these objects, fetching what is missing."""
    cache.remove_unused()
    entries = {
        stored: cache.entry([storage.address, stored.key, stored.tag, stored.size])
        for stored in objects
    }
    missing = {
        stored: entry
        for stored, entry in entries.items()
        if not entry.is_file() or entry.stat().st_size != stored.size
    }
    size, free = sum(stored.size for stored in missing), shutil.disk_usage(cache.folder).free
    if size > free - SPARE_BYTES:
        raise ConfigError(
            f"data: {storage.address} has {size:,} bytes to fetch, and {cache.folder} has {free:,} "
            f"bytes free, of which {SPARE_BYTES:,} are to stay. Make room, set {cache.variable} to "
            f"a folder on another disk, or give a smaller data set."
        )
    for stored, entry in missing.items():
        temporary = temporary_beside(entry)
        try:
            storage.fetch(stored.key, temporary, size=stored.size, tag=stored.tag)
            temporary.rename(entry)
        finally:
            temporary.unlink(missing_ok=True)
    links = cache.entry(sorted([stored.key, entry.name] for stored, entry in entries.items()))
    if not links.is_dir():
        temporary = temporary_beside(links)
        temporary.mkdir(mode=0o700)
        for stored, entry in entries.items():
            (temporary / stored.key).symlink_to(Path("..", entry.name))
        try:
            temporary.rename(links)
        except OSError:  # another process was faster, with the same links
            shutil.rmtree(temporary)
    for used in (links, *entries.values()):
        used.touch()  # its use renews it
    return links


READER = BucketReader(fetch)
