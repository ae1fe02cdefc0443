"""A version: an adapter with its verdict and provenance in a folder named by the adapter's digest.

`inspect_version` lists every file that was added, removed or changed since it was registered.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.errors import ConfigError, DamagedError, NestedTuneError, list_first, quote_path
from nested_core.records.verdict_file import (
    GATE_NAME,
    read_verdict,
    require_passed,
    require_verdict_on_adapter,
)
from nested_core.registry.folders import VERSIONS_FOLDER_NAME
from nested_core.registry.ledger import Ledger
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter
from nested_core.storage.canary_file import CANARY_NAME
from nested_core.storage.kept_hashes import cached_sha256
from nested_core.storage.manifest import MANIFEST_NAME, FileEntry, matches_entry, read_manifest
from nested_core.storage.untrusted_files import file_type, read_json_object
from nested_core.text.digest_format import SHOWN_DIGITS, shorten_digest

PROVENANCE_NAME = "provenance.json"
REGISTERED_AT_KEY = "registered_at"
MAX_PROVENANCE_BYTES = 64 * 1024 * 1024
CARD_NAME = "README.md"
CONTENT_FILES = (WEIGHTS_NAME, CONFIG_NAME, GATE_NAME, PROVENANCE_NAME)
VERSION_FILES = (*CONTENT_FILES, MANIFEST_NAME)
OPTIONAL_FILES = (CANARY_NAME, CARD_NAME)  # each a file of the version where its manifest has it
VERSION_PATTERN = re.compile(r"[0-9a-f]{64}")
VERSION_PREFIX_PATTERN = re.compile(r"[0-9a-f]{6,64}")
MAX_LISTED_FINDINGS = 5
HASHED_AGAIN_AFTER_SECONDS = 24 * 3600


@dataclass(frozen=True)
class AuditFinding:
    """One damaged file of the registry: what is wrong with it, and advice on how to repair it."""

    file: Path
    message: str
    advice: str | None = None

    def __str__(self) -> str:
        """Format the finding as one line."""
        return f"{self.file}: {self.message}"


def version_manifest_facts(version: str) -> dict[str, object]:
    """Return the manifest fields of a version other than the hashes of its files."""
    return {"kind": "adapter version", "version": version}


def version_folder(registry: Path, name: str, version: str) -> Path:
    """Return the path of a version of `name`, whether or not it exists."""
    return registry / name / VERSIONS_FOLDER_NAME / version


def read_provenance(version_path: Path) -> dict[str, Any]:
    """Read provenance.json of a version; DamagedError if it is unreadable or no JSON object.

    Its hash is not compared here; `verify_version` does that.
    """
    try:
        return read_json_object(version_path / PROVENANCE_NAME, MAX_PROVENANCE_BYTES)
    except DamagedError as error:
        raise DamagedError(f"{error} {how_to_mend(version_path)}") from error


def how_to_mend(version_path: Path) -> str:
    """Return advice, with commands, on how to repair a damaged version."""
    name, registry = version_path.parent.parent.name, quote_path(version_path.parents[2])
    return (
        f"Restore {version_path} from a backup; or remove it and give `nested-tune promote "
        f"RUN_DIR --name {name} --registry {registry}` for its run, which makes it champion; or, "
        f"if both are lost, `nested-tune forget "
        f"{name} {shorten_digest(version_path.name)} --registry {registry} --by WHO --reason TEXT`."
    )


def registered_versions(folder: Path) -> list[str]:
    """Return the digests of the versions on disk in the folder of an adapter name, sorted."""
    return sorted(
        name
        for name in os.listdir(folder / VERSIONS_FOLDER_NAME)
        if VERSION_PATTERN.fullmatch(name)
    )


def resolve_version(folder: Path, prefix: str, ledger: Ledger) -> str:
    """Return the one version whose digest begins with `prefix`.

    Versions that the history knows count even if their files are lost. Raises ConfigError if no
    version or several match.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    if VERSION_PREFIX_PATTERN.fullmatch(prefix) is None:
        raise ConfigError(
            f"{prefix!r:.80} is not a version. Expected the name of a folder below "
            f"{folder / VERSIONS_FOLDER_NAME}, or at least its first 6 hexadecimal digits."
        )
    versions = sorted({*registered_versions(folder), *ledger.by_version})
    matching = [version for version in versions if version.startswith(prefix)]
    if len(matching) == 1:
        return matching[0]
    # Several that match differ only after the prefix: show digits beyond it.
    digits = max(SHOWN_DIGITS, len(prefix) + 6) if matching else SHOWN_DIGITS
    examples = ", ".join(version[:digits] for version in (matching or versions)[:5])
    raise ConfigError(
        f"{prefix} names {len(matching) or 'no'} versions in {folder}. Expected the beginning of "
        f"exactly one of: {examples or 'none is registered yet'}."
    )


def verify_version(
    folder: Path, version: str, recorded: set[str], *, max_age: float | None = None
) -> str:
    """Re-hash the files of a version; return the hash of its manifest.

    folder: the version's folder.
    recorded: the manifest hashes that the history has for the version. If it is empty, the
        adapter's digest and the verdict are checked as well.
    max_age: seconds for which an earlier hash of a file is trusted, provided that its device,
        inode, size and change time are unchanged; None hashes every file again.

    Raises DamagedError naming every file that has changed since registration, GateRejected if the
    verdict is not "passed".
    """
    findings, manifest = inspect_version(folder, version, recorded, max_age=max_age)
    if manifest is None or findings:
        listed = list_first(map(str, findings), MAX_LISTED_FINDINGS)
        raise DamagedError(
            f"Version {shorten_digest(version)} is not what was registered. {'; '.join(listed)}. "
            f"{how_to_mend(folder)}"
        )
    if not recorded:
        require_passed(read_verdict(folder / GATE_NAME), folder / GATE_NAME)
    return manifest


def inspect_version(
    folder: Path, version: str, recorded: set[str], *, max_age: float | None = None
) -> tuple[list[AuditFinding], str | None]:
    """Return what is wrong with the files of a version, and the hash of its manifest.

    A verdict of "failed" is not a problem here. The hash is None if the manifest cannot be read.

    folder: the version's folder.
    recorded: the manifest hashes that the history has for the version. If it is empty, the
        adapter's digest and the verdict are checked as well.
    max_age: seconds for which an earlier hash of an unchanged file is trusted; None hashes every
        file again.
    """
    if file_type(folder) != "directory":
        message = "the folder of the version is missing, or is not a directory"
        return [AuditFinding(folder, message)], None
    # `listed`: size and hash of each file by name; `digest`: the manifest's own hash
    path, listed, digest = folder / MANIFEST_NAME, dict[str, FileEntry](), None
    findings = []
    # The manifest itself
    try:
        if file_type(path) == "file":
            manifest = read_manifest(folder)
            listed, digest = manifest["files"], str(manifest["digest"])
            required = listed.keys() - {*OPTIONAL_FILES}
            if manifest["facts"] != version_manifest_facts(version) or required != {*CONTENT_FILES}:
                findings.append(AuditFinding(path, "belongs to something else than this version"))
            if recorded and digest not in recorded:
                message = "is not the manifest that the history recorded for this version"
                findings.append(AuditFinding(path, message))
    except DamagedError as error:
        findings.append(AuditFinding(path, f"not readable as a manifest ({error})"))
    # Every file that the manifest lists, and files that it does not
    expected = [*VERSION_FILES, *(name for name in OPTIONAL_FILES if name in listed)]
    for name in expected:
        if (problem := _find_problem(folder / name, listed.get(name), max_age)) is not None:
            findings.append(AuditFinding(folder / name, problem))
    for name in sorted(set(os.listdir(folder)) - {*expected}):
        findings.append(AuditFinding(folder / name, "does not belong to the version"))
    # Without a recorded hash, only the content can tell
    if not findings and not recorded:
        findings += _digest_findings(folder, version)
    return findings, digest


def _find_problem(path: Path, listed: FileEntry | None, max_age: float | None) -> str | None:
    """Return why a file of a version is not the one that its manifest lists; None if it is.

    listed: the file's size and hash in the manifest; None if it is not listed.
    max_age: seconds for which an earlier hash of the unchanged file is trusted; None hashes again.
    """
    kind = file_type(path)
    if kind != "file":
        return "missing" if kind == "missing" else "not a regular file"
    status = path.stat()
    if status.st_nlink > 1:
        return f"has {status.st_nlink} names: through another it can be changed"
    if listed is None:
        return None
    if max_age is None:
        is_same = matches_entry(path, listed)
    else:
        is_same = status.st_size == listed.get("bytes") and cached_sha256(
            [path], max_age=max_age
        ) == [listed.get("sha256")]
    return None if is_same else "has changed since it was written (size or SHA-256)"


def _digest_findings(folder: Path, version: str) -> Iterator[AuditFinding]:
    """Yield a finding if the adapter or its verdict does not have the version's digest.

    folder: the version's folder.
    """
    try:
        if read_adapter(folder).digest() != version:
            message = "is not the adapter whose digest names the folder"
            yield AuditFinding(folder / WEIGHTS_NAME, message)
        require_verdict_on_adapter(read_verdict(folder / GATE_NAME), version, folder / GATE_NAME)
    except NestedTuneError as error:
        yield AuditFinding(folder, str(error))
