"""MANIFEST.json: names files of a folder with their sizes and SHA-256, and hashes itself.

`verify_manifest` refuses a folder with a file that is missing, extra or changed, the manifest
included. A run directory's manifest lists only what its verdict rests on (`records.verdict_file`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from nested_core.errors import DamagedError
from nested_core.storage.atomic import digest_json, render_json, write_json
from nested_core.storage.untrusted_files import parse_json, read_regular, regular_sha256

MANIFEST_NAME = "MANIFEST.json"
MAX_MANIFEST_BYTES = 4 * 1024 * 1024


class FileEntry(TypedDict):
    """Size and hash of a file."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """The content of MANIFEST.json."""

    facts: dict[str, Any]
    files: dict[str, FileEntry]
    digest: str


def write_manifest(
    folder: Path, facts: Mapping[str, object], files: Mapping[str, FileEntry] | None = None
) -> str:
    """Write MANIFEST.json for a folder; return the manifest's own digest.

    facts: further JSON values to record.
    files: size and hash of files by their path in the folder; None for all files of the folder.
    """
    if files is None:
        files = {name: describe_file(folder / name) for name in _list_files(folder)}
    body = {"facts": facts, "files": dict(sorted(files.items()))}
    digest = digest_json(body)
    write_json(folder / MANIFEST_NAME, body | {"digest": digest})
    return digest


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Re-hash every file of a folder and return the manifest's facts.

    Raises DamagedError naming the first file that is missing, extra or changed.
    """
    return read_verified_manifest(folder)["facts"]


def read_verified_manifest(folder: Path) -> Manifest:
    """Re-hash every file of a folder and return the manifest: `facts`, `files` and `digest`.

    Raises DamagedError naming the first file that is missing, extra or changed.
    """
    manifest = read_manifest(folder)
    listed = manifest["files"]
    present = _list_files(folder)
    for name in sorted(listed.keys() - present):
        raise DamagedError(f"{folder / name} is missing: {MANIFEST_NAME} lists it.")
    for name in sorted(present - listed.keys()):
        raise DamagedError(f"{folder / name} is not listed in {MANIFEST_NAME}: it does not belong.")
    for name, expected in listed.items():
        if not matches_entry(folder / name, expected):
            raise DamagedError(
                f"{folder / name} has changed since it was written (size or SHA-256)."
            )
    return manifest


def read_manifest(folder: Path) -> Manifest:
    """Read MANIFEST.json and check its hash of itself, without checking the files.

    Raises DamagedError if it is missing, changed or of another form.
    """
    path = folder / MANIFEST_NAME
    if not path.exists():
        raise DamagedError(f"{path} is missing: the folder was never finished.")
    if path.is_symlink():
        raise DamagedError(f"{path} is not a regular file. Only regular files belong here.")
    content = read_regular(path, MAX_MANIFEST_BYTES)
    try:
        manifest: Manifest = parse_json(content)
        body = {"facts": dict(manifest["facts"]), "files": dict(manifest["files"])}
        # Equal bytes: neither a value nor the way it is written was changed
        is_intact = content == render_json(body | {"digest": digest_json(body)})
    except (ValueError, TypeError, KeyError) as error:
        raise DamagedError(f"{path} cannot be read as a manifest: {error}.") from error
    if not is_intact:
        raise DamagedError(f"{path} has changed since it was written.")
    return manifest


def _list_files(folder: Path) -> set[str]:
    """Return the paths of all files and folders below a folder, without MANIFEST.json."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")} - {MANIFEST_NAME}


def describe_file(path: Path) -> FileEntry:
    """Return size and SHA-256 of a regular file; DamagedError for anything else, such as a link."""
    if not path.exists() and not path.is_symlink():
        raise DamagedError(f"{path} is missing. Bring it back, or make its folder again.")
    if path.is_symlink() or not path.is_file():
        raise DamagedError(f"{path} is not a regular file. Only regular files belong here.")
    return {"bytes": path.stat().st_size, "sha256": regular_sha256(path)}


def describe_content(content: bytes | memoryview) -> FileEntry:
    """Return size and SHA-256 of a file's content."""
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def matches_entry(path: Path, entry: object) -> bool:
    """Return whether a file has the size and hash of a manifest's entry.

    Raises DamagedError if it is not a regular file.
    """
    is_file = path.is_file() and not path.is_symlink()
    if is_file and isinstance(entry, dict) and path.stat().st_size != entry.get("bytes"):
        return False
    return bool(describe_file(path) == entry)
