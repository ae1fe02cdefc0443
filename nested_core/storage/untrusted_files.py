"""Safe reading of files that another program may have written: regular, of bounded size, no link.

It refuses what is no regular file (a pipe would block, a device would never end), what is too
large, and ambiguous JSON: duplicate keys, NaN, infinity, numbers that overflow. A symbolic link is
refused too, unless `follow_links` is given: for paths that a person names, and for models and data,
which the hub's cache keeps as links.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, Literal

from nested_core.errors import ConfigError, DamagedError, MissingFileError
from nested_core.storage.atomic import closing_descriptor, private_mode
from nested_core.storage.main_memory import main_memory_bytes

FileType = Literal["missing", "file", "directory", "link", "other"]

MISSING_FILE_ERRNOS = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
UNREADABLE_PATH_ERRNOS = (errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)
UNBOUNDED = sys.maxsize  # of a file that is read piece by piece
WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK


def file_type(path: Path, *, follow_links: bool = False) -> FileType:
    """Return what a path is; "missing" if nothing is there or the name is not possible.

    Unlike os.path.exists, it raises I/O errors instead of reporting absence.
    """
    try:
        mode = os.stat(path, follow_symlinks=follow_links).st_mode
    except ValueError:  # a NUL in the name
        return "missing"
    except OSError as error:
        if error.errno in MISSING_FILE_ERRNOS:
            return "missing"
        raise
    if stat.S_ISLNK(mode):
        return "link"
    if stat.S_ISDIR(mode):
        return "directory"
    return "file" if stat.S_ISREG(mode) else "other"


@contextmanager
def open_regular(
    path: Path, limit: int | None = None, *, follow_links: bool = False
) -> Iterator[tuple[BufferedReader, int]]:
    """Open a regular file for reading; yield the open file and its size in bytes.

    limit: the largest size accepted; None for the size of main memory.

    Raises MissingFileError if nothing is there, DamagedError for anything but a regular file and
    for one that is too large.
    """
    with closing_descriptor(_open_descriptor(path, follow_links=follow_links)) as descriptor:
        size = _regular_size(descriptor, path)
        limit = main_memory_bytes() if limit is None else limit
        if size > limit:
            raise DamagedError(f"{path} is larger than {limit} bytes.")
        with open(descriptor, "rb", closefd=False) as file:
            yield file, size


def _open_descriptor(path: Path, *, follow_links: bool) -> int:
    """Open a path for reading without blocking on a pipe; return the descriptor.

    Raises MissingFileError or DamagedError; an I/O error that may pass is raised as it is.
    """
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its other end.
        return os.open(path, os.O_RDONLY | os.O_NONBLOCK | (0 if follow_links else os.O_NOFOLLOW))
    except (FileNotFoundError, ValueError):  # a NUL in the name
        raise MissingFileError(f"{path} is missing.") from None
    except NotADirectoryError:
        raise DamagedError(f"{path} is not a file.") from None
    except OSError as error:
        if error.errno not in UNREADABLE_PATH_ERRNOS:
            raise  # it may pass: whoever called can try again
        raise _describe_refusal(error, path, "read") from error


def _describe_refusal(error: OSError, path: Path, attempt: str) -> DamagedError:
    """Build the DamagedError for a path that could not be opened.

    attempt: "read" or "written".
    """
    is_link = error.errno == errno.ELOOP and file_type(path, follow_links=True) != "missing"
    if is_link or error.errno == errno.EISDIR:
        reason = ": it is a symbolic link" if is_link else ""
        return DamagedError(f"{path} is not a file{reason}.")
    return DamagedError(f"{path} cannot be {attempt}: {error.strerror}.")


def _regular_size(descriptor: int, path: Path) -> int:
    """Return the size in bytes of an open file; DamagedError if it is not a regular one."""
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        raise DamagedError(f"{path} is not a file.")
    return status.st_size


def append_regular(path: Path, content: bytes) -> None:
    """Append to a regular file, made for its owner if missing; DamagedError for anything else."""
    try:
        descriptor = os.open(path, WRITE_FLAGS, private_mode(path.parent) & 0o666)
    except OSError as error:
        if error.errno not in (errno.EISDIR, errno.ELOOP, errno.ENXIO):
            raise
        raise _describe_refusal(error, path, "written") from error
    with closing_descriptor(descriptor):
        _regular_size(descriptor, path)
        write_all(descriptor, content)


def write_all(descriptor: int, content: bytes) -> None:
    """Write all bytes to a file descriptor."""
    while content:
        content = content[os.write(descriptor, content) :]


def read_start(file: BufferedReader, size: int, path: Path) -> bytes:
    """Read the first `size` bytes of an open file; DamagedError if it became shorter."""
    file.seek(0)
    content = file.read(size)
    if len(content) < size:
        raise DamagedError(f"{path} became shorter while it was read.")
    return content


def read_regular(path: Path, limit: int | None = None, *, follow_links: bool = False) -> bytes:
    """Read all bytes of a regular file; DamagedError if it is none or larger than `limit`."""
    with open_regular(path, limit, follow_links=follow_links) as (file, size):
        return read_start(file, size, path)


def read_json(path: Path, limit: int | None, *, follow_links: bool = False) -> Any:
    """Read a JSON file; DamagedError if it is missing, too large or not strict JSON.

    limit: in bytes; None for the size of main memory.
    """
    try:
        return parse_json(read_regular(path, limit, follow_links=follow_links))
    except ValueError as error:
        raise DamagedError(f"{path} is not valid JSON: {error}.") from error


def read_json_object(
    path: Path, limit: int | None = None, *, follow_links: bool = False
) -> dict[str, Any]:
    """Read a JSON file that holds one object; DamagedError if it is missing or anything else."""
    value = read_json(path, limit, follow_links=follow_links)
    if not isinstance(value, dict):
        raise DamagedError(f"{path} holds a {type(value).__name__}. Expected a JSON object.")
    return value


def regular_sha256(path: Path, *, follow_links: bool = False) -> str:
    """Return the SHA-256 of a regular file, read in pieces; DamagedError for anything else."""
    with open_regular(path, UNBOUNDED, follow_links=follow_links) as (file, _):
        return hashlib.file_digest(file, "sha256").hexdigest()


def parse_json(content: bytes) -> Any:
    """Parse strict UTF-8 JSON; ValueError for duplicate keys, NaN, infinity and deep nesting."""
    try:
        return json.loads(
            content.decode("utf-8"),
            object_pairs_hook=_object_without_duplicates,
            parse_constant=_refuse_nan_and_infinity,
            parse_float=_parse_finite,
            parse_int=_parse_integer,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _object_without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Build a dictionary from key-value pairs; ValueError if a key appears twice."""
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for name, _ in pairs:
            if name in seen:
                raise ValueError(f"the key {name!r:.80} appears twice")
            seen.add(name)
    return fields


def _refuse_nan_and_infinity(word: str) -> None:
    """Raise ValueError for NaN or Infinity."""
    raise ValueError(f"{word} is not a JSON number")


def _parse_finite(text: str) -> float:
    """Parse a number; ValueError if it overflows a float."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text:.20} is beyond any float")
    return number


def _parse_integer(text: str) -> int:
    """Parse an integer; ValueError if it is too large for a float, so that dividing it is safe."""
    _parse_finite(text)  # who divides it would meet an OverflowError
    return int(text)


def has_repeated_key(raw: bytes, string_count: int) -> bool:
    """Return whether a JSON text has a key twice in an object, by counting its strings.

    raw: valid JSON.
    string_count: the number of strings, keys included, in the decoded value. The decoder keeps only
        the last of two equal keys, so the text then has more strings. Counting quotes costs a tenth
        of decoding again.
    """
    if raw.count(b'"') == 2 * string_count:
        return False
    return raw.replace(b"\\\\", b"").replace(b'\\"', b"").count(b'"') != 2 * string_count


def collect_strings(value: object) -> list[str]:
    """Return every string of a JSON value, keys included."""
    texts: list[str] = []
    _append_strings(value, texts)
    return texts


def _append_strings(value: object, texts: list[str]) -> None:
    """Append every string of a JSON value, keys included, to `texts`."""
    if isinstance(value, str):
        texts.append(value)
    elif isinstance(value, dict):
        texts.extend(value)
        for item in value.values():
            _append_strings(item, texts)
    elif isinstance(value, list):
        for item in value:
            _append_strings(item, texts)


def iterate_scalars(value: object) -> Iterator[object]:
    """Yield every text, number, boolean and null in a JSON value or its tuples, without keys."""
    if isinstance(value, dict | list | tuple):
        for item in value.values() if isinstance(value, dict) else value:
            yield from iterate_scalars(item)
    else:
        yield value


def private_user_folder(content: str, advice: str, given: str | None = None) -> Path:
    """Return a folder that only this user owns, creating it if it is missing.

    given: the folder; None for nested-tune-UID in the temporary folder.
    content, advice: what is kept there and what to do otherwise, for the message.

    Raises ConfigError if the folder belongs to another user, or is a link in the temporary folder,
    where anybody may write.
    """
    folder = Path(given or f"{tempfile.gettempdir()}/nested-tune-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    is_link = not given and folder.is_symlink()
    if is_link or folder.stat().st_uid != os.getuid():
        raise ConfigError(
            f"{folder} belongs to another user: {content} cannot be kept there. {advice}"
        )
    return folder
