"""The audit of a name: re-hash every version; compare link, champion.json and history.

It writes and repairs nothing, and every finding names its file.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from nested_core.errors import NestedTuneError
from nested_core.records.verdict_file import (
    GATE_NAME,
    read_verdict,
    require_consistent,
    require_passed,
)
from nested_core.registry import champion_files
from nested_core.registry.champion_files import (
    RECORD_NAME,
    find_disagreement,
    is_last_change_unfinished,
    make_record,
    read_record,
)
from nested_core.registry.folders import (
    VERSIONS_FOLDER_NAME,
    find_name_folder,
    require_no_writes_meanwhile,
    shared_folder_lock,
)
from nested_core.registry.judgements import judgement_findings
from nested_core.registry.ledger import LEDGER_NAME, Ledger, read_ledger
from nested_core.registry.policy_file import policy_findings
from nested_core.registry.recovery import lost_champion_error
from nested_core.registry.versions import (
    VERSION_PATTERN,
    AuditFinding,
    how_to_mend,
    registered_versions,
    version_findings,
)
from nested_core.storage.atomic import TEMPORARY_PREFIX
from nested_core.storage.strict_files import file_type
from nested_core.text.digest_format import shorten_digest


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit.

    `unfinished` is the version of a change that a crash interrupted; `notes` has what is no damage,
    and what a person is to know: that the link was once moved by hand.
    """

    name: str
    champion: str | None
    versions: tuple[str, ...]
    findings: tuple[AuditFinding, ...]
    unfinished: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether everything is as it was written; an interrupted change is no damage."""
        return not self.findings


@dataclass(frozen=True)
class RegistrySnapshot:
    """Champion, history and versions as read under one lock, and the problems in reading them."""

    versions: tuple[str, ...]
    champion: str | None
    prepared: str | None
    record: dict[str, object] | None
    ledger: Ledger
    findings: tuple[AuditFinding, ...]


def audit(registry: Path, name: str) -> AuditReport:
    """Check all files of `name`; ConfigError for an unknown registry or name.

    Raises DamagedError if there are findings and the lock file was removed meanwhile: they may be
    another process at work. One that goes on writing after its lock file was removed and before the
    audit began is not noticed: an audit after it says whether its findings were damage.
    """
    folder = find_name_folder(registry, name)
    with shared_folder_lock(folder) as lock:
        snapshot = _take_snapshot(folder)
        findings = [*_audit_versions_folder(folder, snapshot), *snapshot.findings]
        if not snapshot.findings:
            findings += _audit_champion(folder, snapshot)
            findings += judgement_findings(folder, snapshot.ledger)
            findings += policy_findings(folder, snapshot.ledger)
        if findings:
            require_no_writes_meanwhile(folder, lock)
    for version in reversed(snapshot.versions):
        findings = [*_audit_version(folder, version, snapshot), *findings]
    is_open = snapshot.prepared is not None and snapshot.prepared != snapshot.champion
    unfinished = snapshot.prepared if is_open else None
    notes = tuple(_describe_moves_by_hand(snapshot.ledger))
    return AuditReport(
        name, snapshot.champion, snapshot.versions, tuple(findings), unfinished, notes
    )


def _describe_moves_by_hand(ledger: Ledger) -> Iterator[str]:
    for number, entry in enumerate(ledger.entries, 1):
        if entry.action == "moved":
            yield (
                f"history, line {number}: the champion link was moved by hand from "
                f"{shorten_digest(entry.previous or 'none')} to "
                f"{shorten_digest(entry.version or 'none')}; found {entry.time[:16]}"
            )


def _take_snapshot(folder: Path) -> RegistrySnapshot:
    findings = []
    champion = None
    ledger = Ledger()
    try:
        champion = champion_files.read_link(folder)
    except (NestedTuneError, OSError) as error:
        findings.append(AuditFinding(folder / champion_files.LINK_NAME, str(error)))
    try:
        ledger = read_ledger(folder)
    except (NestedTuneError, OSError) as error:
        findings.append(AuditFinding(folder / LEDGER_NAME, str(error)))
    record = read_record(folder)
    if not findings:
        disagreement = find_disagreement(folder, champion, record, ledger)
        findings += [] if disagreement is None else [disagreement]
    return RegistrySnapshot(
        versions=tuple(registered_versions(folder)),
        champion=champion,
        prepared=champion_files.read_prepared_link(folder),
        record=record,
        ledger=ledger,
        findings=tuple(findings),
    )


def _audit_version(folder: Path, version: str, snapshot: RegistrySnapshot) -> list[AuditFinding]:
    """The findings of one version, hashed without the lock, because that may take long.

    Meanwhile a gc may have removed it, and a registration may have brought it back with another
    manifest. So a version with findings is checked again under the lock, where nothing changes.
    """
    if not _file_and_verdict_findings(folder, version, snapshot.ledger):
        return []
    with shared_folder_lock(folder) as lock:
        ledger = _take_snapshot(folder).ledger
        if file_type(folder / VERSIONS_FOLDER_NAME / version) == "missing" and ledger.is_removed(
            version
        ):
            return []
        findings = _file_and_verdict_findings(folder, version, ledger)
        if findings:
            require_no_writes_meanwhile(folder, lock)
        return findings


def _file_and_verdict_findings(folder: Path, version: str, ledger: Ledger) -> list[AuditFinding]:
    place = folder / VERSIONS_FOLDER_NAME / version
    try:
        findings = version_findings(place, version, ledger.manifest_hashes(version))
        if not findings:
            verdict = read_verdict(place / GATE_NAME)
            require_passed(verdict, place / GATE_NAME)
            require_consistent(verdict, place / GATE_NAME)
    except (NestedTuneError, OSError) as error:
        findings = [AuditFinding(place, str(error))]
    return [replace(finding, advice=how_to_mend(place)) for finding in findings]


def _audit_versions_folder(folder: Path, snapshot: RegistrySnapshot) -> Iterator[AuditFinding]:
    for entry in sorted(os.listdir(folder / VERSIONS_FOLDER_NAME)):
        if not VERSION_PATTERN.fullmatch(entry) and not entry.startswith(TEMPORARY_PREFIX):
            yield AuditFinding(
                folder / VERSIONS_FOLDER_NAME / entry, "is not a version", "Remove it."
            )
    mentioned = snapshot.ledger.champion_versions() | (
        {snapshot.champion} if snapshot.champion else set()
    )
    for version in sorted(mentioned - set(snapshot.versions)):
        place = folder / VERSIONS_FOLDER_NAME / version
        advice = how_to_mend(place)
        if version == snapshot.champion:
            advice = str(lost_champion_error(folder, version, snapshot.ledger))
        yield AuditFinding(place, "was champion, and its folder is gone", advice)


def _audit_champion(folder: Path, snapshot: RegistrySnapshot) -> Iterator[AuditFinding]:
    """Compare the link with the last line of the history, and champion.json with both."""
    champion, ledger, prepared = snapshot.champion, snapshot.ledger, snapshot.prepared
    if ledger.champion != champion:
        last = ledger.entries[-1] if ledger.entries else None
        if last is not None and (last.version, last.previous) == (prepared, champion):
            return  # a crash came between the history and the link
        yield AuditFinding(
            folder / champion_files.LINK_NAME,
            f"points to {shorten_digest(champion or 'nothing')}, but the history's last line "
            f"leaves {shorten_digest(ledger.champion or 'none')}: the link was moved by hand, or "
            f"the history is not whole",
            "The next promote, rollback or gc checks the version and records the move; or put back "
            "what the history says.",
        )
    is_unfinished = is_last_change_unfinished(champion, snapshot.record, ledger)
    if snapshot.record != make_record(champion, ledger) and not is_unfinished:
        yield AuditFinding(
            folder / RECORD_NAME,
            "does not say what the link and the history say",
            "The next promote, rollback or gc writes it anew.",
        )
