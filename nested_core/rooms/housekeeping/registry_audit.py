"""The audit of a name: re-hash every version, and compare the derived files with the history.

It writes and repairs nothing, and every finding names its file.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from nested_core.errors import DamagedError, NestedTuneError
from nested_core.registry.data_store import (
    LIST_SUFFIX,
    PACK_SUFFIX,
    find_lost_lists,
    has_store,
    how_to_mend_list,
    list_path,
    read_digest_list,
    read_packs,
)
from nested_core.registry.folders import (
    DATA_FOLDER_NAME,
    VERSIONS_FOLDER_NAME,
    find_name_folder,
    require_no_writes_meanwhile,
    shared_folder_lock,
)
from nested_core.registry.judgements import judgement_path, read_judgement
from nested_core.registry.ledger import LEDGER_NAME, Ledger, read_ledger
from nested_core.registry.link_and_views import (
    LINK_NAME,
    are_views_behind,
    find_wrong_recorded_end,
    lost_champion_error,
    make_views,
    read_link,
    read_view,
    require_own_layout,
)
from nested_core.registry.versions import (
    VERSION_PATTERN,
    AuditFinding,
    how_to_mend,
    inspect_version,
    registered_versions,
)
from nested_core.storage.atomic import TEMPORARY_PREFIX
from nested_core.storage.untrusted_files import file_type
from nested_core.text.digest_format import shorten_digest


@dataclass(frozen=True)
class AuditReport:
    """The result of an audit of one name.

    champion: the version that the link `champion` points to; None without a link.
    findings: each damaged file.
    unfinished: the version that a crash kept from becoming champion; None without a crash.
    notes: what is no damage but worth knowing, such as a link that was moved by hand.
    """

    name: str
    champion: str | None
    versions: tuple[str, ...]
    findings: tuple[AuditFinding, ...]
    unfinished: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether nothing is damaged; an interrupted change is no damage."""
        return not self.findings


def audit(registry: Path, name: str) -> AuditReport:
    """Check all files of the adapter `name`, and return everything that is wrong with them.

    Raises ConfigError for an unknown registry or name, DamagedError if there are findings and the
    lock file was removed during the audit, because the findings may then be another process at
    work. A writer that lost its lock file before the audit began is not noticed; repeat the audit
    to tell its writes from damage.
    """
    folder = find_name_folder(registry, name)
    with shared_folder_lock(folder) as lock:
        link, ledger, broken = _read_link_and_ledger(folder)
        versions = tuple(registered_versions(folder))
        findings = [*_versions_folder_findings(folder, link, ledger), *broken]
        if not broken:
            findings += _view_findings(folder, link, ledger)
            findings += _judgement_findings(folder, ledger)
            findings += _data_findings(folder, ledger.by_version)
        if findings:
            require_no_writes_meanwhile(folder, lock)
    for version in reversed(versions):
        findings = [*_audit_version(folder, version, ledger), *findings]
    # A crash came between the history's line and the change of the link: the next writer ends it.
    is_open = not broken and are_views_behind(folder, ledger) and link != ledger.champion
    unfinished = ledger.champion if is_open else None
    notes = (*_describe_moves_by_hand(ledger), *_describe_lost_lists(folder, ledger))
    return AuditReport(name, link, versions, tuple(findings), unfinished, notes)


def _describe_moves_by_hand(ledger: Ledger) -> Iterator[str]:
    """Yield a sentence for each time that the champion link was found moved by hand.

    ledger: the adapter's history.
    """
    for number, entry in enumerate(ledger.entries, 1):
        if entry.action == "moved":
            yield (
                f"history, line {number}: the champion link was moved by hand from "
                f"{shorten_digest(entry.previous or 'none')} to "
                f"{shorten_digest(entry.version or 'none')}; found {entry.time[:16]}"
            )


def _describe_lost_lists(folder: Path, ledger: Ledger) -> Iterator[str]:
    """Yield a sentence for each version whose list of stored examples was lost.

    A registry without a data store, as a mirror's copy, has lost none.
    """
    with suppress(DamagedError):  # a finding of its own
        for version in find_lost_lists(folder, ledger.by_version) if has_store(folder) else ():
            yield (
                f"{(path := list_path(folder, version))} is missing: restore it "
                f"{how_to_mend_list(path)}; until then no stored row is removed"
            )


def _read_link_and_ledger(folder: Path) -> tuple[str | None, Ledger, list[AuditFinding]]:
    """Read the champion link and the history; return them with the problems in reading them.

    What could not be read is None or an empty history in the result. A history that is shorter or
    longer than champion.json records is a problem too.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    findings = []
    link = None
    ledger = Ledger()
    try:
        link = read_link(folder)
    except (NestedTuneError, OSError) as error:
        findings.append(AuditFinding(folder / LINK_NAME, str(error)))
    try:
        ledger = read_ledger(folder)
        require_own_layout(folder, ledger)
    except (NestedTuneError, OSError) as error:
        findings.append(AuditFinding(folder / LEDGER_NAME, str(error)))
    wrong_end = None if findings else find_wrong_recorded_end(folder, ledger)
    return link, ledger, findings if wrong_end is None else [wrong_end]


def _audit_version(folder: Path, version: str, ledger: Ledger) -> list[AuditFinding]:
    """Return the findings of one version.

    Its files are hashed without the lock, because that may take long. Meanwhile a gc may have
    removed the version, or a registration brought it back with another manifest, so a version with
    findings is checked again under the lock.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    """
    if not _file_findings(folder, version, ledger):
        return []
    with shared_folder_lock(folder) as lock:
        _, ledger, _ = _read_link_and_ledger(folder)
        is_gone = file_type(folder / VERSIONS_FOLDER_NAME / version) == "missing"
        if is_gone and ledger.is_removed(version):
            return []
        findings = _file_findings(folder, version, ledger)
        if findings:
            require_no_writes_meanwhile(folder, lock)
        return findings


def _file_findings(folder: Path, version: str, ledger: Ledger) -> list[AuditFinding]:
    """Return the damaged files of a version, each with advice on its repair.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    """
    version_path = folder / VERSIONS_FOLDER_NAME / version
    try:
        findings, _ = inspect_version(version_path, version, ledger.manifest_hashes(version))
    except (NestedTuneError, OSError) as error:
        findings = [AuditFinding(version_path, str(error))]
    return [replace(finding, advice=how_to_mend(version_path)) for finding in findings]


def _versions_folder_findings(
    folder: Path, link: str | None, ledger: Ledger
) -> Iterator[AuditFinding]:
    """Yield what does not belong in versions/, and registered versions whose folder is gone.

    ledger: the adapter's history.
    """
    versions_path = folder / VERSIONS_FOLDER_NAME
    present = set(os.listdir(versions_path))
    for entry in sorted(present):
        if not VERSION_PATTERN.fullmatch(entry) and not entry.startswith(TEMPORARY_PREFIX):
            yield AuditFinding(versions_path / entry, "is not a version", "Remove it.")
    for version in sorted({*ledger.by_version, *([link] if link else [])} - present):
        advice = how_to_mend(versions_path / version)
        if version == link:
            advice = str(lost_champion_error(folder, version, ledger))
        yield AuditFinding(versions_path / version, "was registered, its folder is gone", advice)


def _view_findings(folder: Path, link: str | None, ledger: Ledger) -> Iterator[AuditFinding]:
    """Yield derived files that contradict the history, unless a crash explains the difference.

    Derived are the champion link and the files that `record` rewrites after each line of the
    history. After a crash in between they still show the state before the last line.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    if are_views_behind(folder, ledger) and link in (ledger.champion, ledger.entries[-1].previous):
        return
    if link != ledger.champion:
        yield AuditFinding(
            folder / LINK_NAME,
            f"points to {shorten_digest(link or 'nothing')}, but the history's last line leaves "
            f"{shorten_digest(ledger.champion or 'none')}: the link was moved by hand",
            "The next promote, rollback or gc checks the version and records the move; or put back "
            "what the history says.",
        )
    for name, content in make_views(ledger).items():
        if read_view(folder / name) != content:
            advice = "The next promote, rollback or gc writes it anew."
            yield AuditFinding(folder / name, "does not say what the history says", advice)


def _judgement_findings(folder: Path, ledger: Ledger) -> Iterator[AuditFinding]:
    """Yield an audit finding for each judgement that is missing or was changed.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    """
    for version in sorted(ledger.by_version):
        for number, digest in ledger.judgements(version):
            try:
                read_judgement(folder, version, digest, number)
            except DamagedError as error:
                yield AuditFinding(judgement_path(folder, version, digest), str(error))


def _data_findings(folder: Path, versions: Iterable[str]) -> Iterator[AuditFinding]:
    """Yield what an audit finds wrong in the store of a name's training and held-out examples.

    That is: unreadable lists of a version's examples, lists that name missing rows, and files that
    do not belong to the store.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    store = folder / DATA_FOLDER_NAME
    try:
        if not has_store(folder):
            return
    except DamagedError as error:
        yield AuditFinding(store, str(error))
        return
    present = {digest for digest, _ in read_packs(folder)}
    for version in versions:
        path = list_path(folder, version)
        try:
            listed = read_digest_list(folder, version)
        except DamagedError as error:
            yield AuditFinding(path, str(error))
            continue
        named = set() if listed is None else listed.all()
        if lost := len(named - present):
            message = f"{lost} of {len(named)} examples that it names were altered, or are lost"
            advice = f"Restore {store} {how_to_mend_list(path)}. Until then they are left out."
            yield AuditFinding(path, message, advice)
    for path in sorted(store.iterdir()):
        if not path.name.startswith(".") and path.suffix not in (LIST_SUFFIX, PACK_SUFFIX):
            yield AuditFinding(path, "does not belong to the data store", "Remove it.")
