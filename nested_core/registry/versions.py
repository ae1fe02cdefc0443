"""A version: an adapter with its verdict and provenance in a folder named by the adapter's digest.

`version_findings` lists every file that was added, removed or changed since it was registered.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError, DamagedError, NestedTuneError
from nested_core.records.verdict_file import (
    GATE_NAME,
    read_verdict,
    require_passed,
    require_verdict_on_adapter,
)
from nested_core.registry.adapter_card import CARD_NAME
from nested_core.registry.folders import VERSIONS_FOLDER_NAME
from nested_core.registry.ledger import Ledger
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from nested_core.storage.canary_file import CANARY_NAME
from nested_core.storage.kept_hashes import cached_sha256
from nested_core.storage.manifest import MANIFEST_NAME, matches_entry, read_manifest
from nested_core.storage.strict_files import file_type, read_json
from nested_core.text.digest_format import SHOWN_DIGITS, shorten_digest

PROVENANCE_NAME = "provenance.json"
REGISTERED_AT_KEY = "registered_at"
REGISTERED_AFTER_KEY = (
    "registered_after"  # the history's `end_sha256` at that moment: no clock lies
)
REGISTRATION_KEY = "registration"  # 1, 2, ...: which of two was registered or judged last
MAX_PROVENANCE_BYTES = 64 * 1024 * 1024
CONTENT_FILES = (WEIGHTS_NAME, CONFIG_NAME, GATE_NAME, PROVENANCE_NAME, CARD_NAME)
VERSION_FILES = (*CONTENT_FILES, MANIFEST_NAME)
OPTIONAL_FILES = (CANARY_NAME,)  # a file of the version where its manifest has it
VERSION_PATTERN = re.compile(r"[0-9a-f]{64}")
VERSION_PREFIX_PATTERN = re.compile(r"[0-9a-f]{6,64}")
MAX_LISTED_FINDINGS = 5
HASHED_AGAIN_AFTER_SECONDS = 24 * 3600


@dataclass(frozen=True)
class AuditFinding:
    """A file of the registry that is not as it was written, what is wrong, and how to mend it."""

    file: Path
    message: str
    advice: str | None = None

    def __str__(self) -> str:
        """The finding in one line."""
        return f"{self.file}: {self.message}"


def version_manifest_facts(version: str) -> dict[str, Any]:
    """What a version's manifest says beside the hashes of its files."""
    return {"kind": "adapter version", "version": version}


def version_folder(registry: Path, name: str, version: str) -> Path:
    """The path of a version of `name`, whether or not it exists."""
    return registry / name / VERSIONS_FOLDER_NAME / version


def read_provenance(place: Path) -> dict[str, Any]:
    """Read where the version in `place` comes from; DamagedError if that cannot be read.

    Whether it is still what was registered is for `verify_version`.
    """
    path = place / PROVENANCE_NAME
    try:
        provenance = read_json(path, MAX_PROVENANCE_BYTES)
    except DamagedError as error:
        raise DamagedError(f"{error} {how_to_mend(place)}") from error
    if not isinstance(provenance, dict):
        raise DamagedError(f"{path} holds no JSON object. {how_to_mend(place)}")
    return provenance


def how_to_mend(place: Path) -> str:
    """What to do about a version that is not what was registered."""
    name, registry = place.parent.parent.name, place.parent.parent.parent
    return (
        f"Restore {place} from a backup; or remove it and give `nested-tune promote RUN_DIR --name "
        f"{name} --registry {registry}` for its run; or, if both are lost, `nested-tune forget "
        f"{name} {shorten_digest(place.name)} --registry {registry} --by WHO --reason TEXT`."
    )


def registered_versions(folder: Path) -> list[str]:
    """The versions in a NAME's folder, in the order of their digests."""
    return sorted(
        name
        for name in os.listdir(folder / VERSIONS_FOLDER_NAME)
        if VERSION_PATTERN.fullmatch(name)
    )


def resolve_version(folder: Path, wanted: str, ledger: Ledger) -> str:
    """The one version whose digest begins with `wanted`; ConfigError for none or several."""
    if VERSION_PREFIX_PATTERN.fullmatch(wanted) is None:
        raise ConfigError(
            f"{wanted!r:.80} is not a version. Expected the name of a folder below "
            f"{folder / VERSIONS_FOLDER_NAME}, or at least its first 6 hexadecimal digits."
        )
    known = sorted({*registered_versions(folder), *ledger.champion_versions()})
    matching = [version for version in known if version.startswith(wanted)]
    if len(matching) == 1:
        return matching[0]
    digits = max(SHOWN_DIGITS, len(wanted) + 6) if matching else SHOWN_DIGITS
    found = ", ".join(version[:digits] for version in (matching or known)[:5])
    raise ConfigError(
        f"{wanted} names {len(matching) or 'no'} versions in {folder}. Expected the beginning of "
        f"exactly one of: {found or 'none is registered yet'}."
    )


def verify_version(folder: Path, version: str, recorded: set[str]) -> str:
    """Re-hash a version and check its verdict; return its manifest's hash.

    `recorded` holds the manifest hashes that the history knows of it. Raises DamagedError naming
    every file that is not as it was registered, GateRejected if the verdict is not "passed".
    """
    findings = version_findings(folder, version, recorded)
    if findings:
        raise _damage(folder, version, findings)
    require_passed(read_verdict(folder / GATE_NAME), folder / GATE_NAME)
    return str(read_manifest(folder)["digest"])


def _damage(folder: Path, version: str, findings: list[AuditFinding]) -> DamagedError:
    listed = [str(finding) for finding in findings[:MAX_LISTED_FINDINGS]]
    if len(findings) > MAX_LISTED_FINDINGS:
        listed.append(f"and {len(findings) - MAX_LISTED_FINDINGS} more")
    return DamagedError(
        f"Version {shorten_digest(version)} is not what was registered. {'; '.join(listed)}. "
        f"{how_to_mend(folder)}"
    )


def require_unchanged_files(folder: Path, version: str, recorded: set[str]) -> None:
    """Raise DamagedError where a version's files are not those of its manifest.

    What `verify_version` does, but for files that were hashed within a day and are the same by
    device, inode, size and change time, and without reading the adapter.
    """
    findings = [
        *_missing_and_extra_file_findings(folder),
        *_hash_findings(folder, version, recorded, max_age=HASHED_AGAIN_AFTER_SECONDS),
    ]
    if findings:
        raise _damage(folder, version, findings)


def version_findings(folder: Path, version: str, recorded: set[str]) -> list[AuditFinding]:
    """Everything that is wrong with the files of a version, except a verdict of "failed"."""
    if file_type(folder) != "directory":
        return [AuditFinding(folder, "the folder of the version is missing, or is not a directory")]
    findings = [
        *_missing_and_extra_file_findings(folder),
        *_hash_findings(folder, version, recorded),
    ]
    return findings or [*_digest_findings(folder, version)]


def _missing_and_extra_file_findings(folder: Path) -> Iterator[AuditFinding]:
    present = set(os.listdir(folder))
    expected = (*VERSION_FILES, *_listed_optional_files(folder))
    for name in expected:
        if name not in present:
            yield AuditFinding(folder / name, "missing")
        elif file_type(folder / name) != "file":
            yield AuditFinding(folder / name, "not a regular file")
        elif (links := (folder / name).stat().st_nlink) > 1:
            message = f"has {links} names: through another it can be changed"
            yield AuditFinding(folder / name, message)
    for name in sorted(present - set(expected)):
        yield AuditFinding(folder / name, "does not belong to the version")


def _listed_optional_files(folder: Path) -> list[str]:
    """The files that this version's manifest has and others may lack; none if it is unreadable."""
    try:
        listed = read_manifest(folder)["files"] if (folder / MANIFEST_NAME).is_file() else {}
    except DamagedError:  # `_hash_findings` says so
        listed = {}
    return [name for name in OPTIONAL_FILES if name in listed]


def _hash_findings(
    folder: Path, version: str, recorded: set[str], *, max_age: float | None = None
) -> Iterator[AuditFinding]:
    path = folder / MANIFEST_NAME
    if file_type(path) != "file":
        return
    try:
        manifest = read_manifest(folder)
    except DamagedError as error:
        yield AuditFinding(path, f"not readable as a manifest ({error})")
        return
    required = set(manifest["files"]) - set(OPTIONAL_FILES)
    if manifest["facts"] != version_manifest_facts(version) or required != set(CONTENT_FILES):
        yield AuditFinding(path, "belongs to something else than this version")
    if recorded and manifest["digest"] not in recorded:
        yield AuditFinding(path, "is not the manifest that the history recorded for this version")
    yield from _changed_files(folder, manifest["files"], max_age)


def _changed_files(
    folder: Path, listed: dict[str, Any], max_age: float | None
) -> Iterator[AuditFinding]:
    for name in (*CONTENT_FILES, *OPTIONAL_FILES):
        path = folder / name
        if name not in listed or file_type(path) != "file":
            continue
        if not _is_unchanged(path, listed[name], max_age):
            yield AuditFinding(path, "has changed since it was written (size or SHA-256)")


def _is_unchanged(path: Path, listed: dict[str, Any], max_age: float | None) -> bool:
    if max_age is None:
        return matches_entry(path, listed)
    has_size = path.stat().st_size == listed.get("bytes")
    return has_size and cached_sha256([path], max_age=max_age)[0] == listed.get("sha256")


def _digest_findings(folder: Path, version: str) -> Iterator[AuditFinding]:
    try:
        if read_adapter(folder).digest() != version:
            message = "is not the adapter whose digest names the folder"
            yield AuditFinding(folder / WEIGHTS_NAME, message)
        require_verdict_on_adapter(read_verdict(folder / GATE_NAME), version, folder / GATE_NAME)
    except NestedTuneError as error:
        yield AuditFinding(folder, str(error))
