"""Registration: copies a run's judged adapter into the registry, as a version that never changes.

An adapter that the gate did not pass, or that is not the one that it judged, is refused.
"""

from __future__ import annotations

import shutil
import stat
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nested_core import seams
from nested_core.errors import JUDGE_AGAIN, DamagedError, MissingFileError, NestedTuneError
from nested_core.records.judged_run import JudgedRun
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import GATE_NAME
from nested_core.registry.data_store import RunExamples, bound_store, keeps_examples, store_examples
from nested_core.registry.folders import (
    create_name_folder,
    exclusive_folder_lock,
    require_creatable,
)
from nested_core.registry.judgements import (
    Judgement,
    has_all_judgements,
    read_verdicts,
    write_judgement,
)
from nested_core.registry.ledger import REGISTRATION_ACTIONS, read_ledger
from nested_core.registry.link_and_views import (
    NameFolder,
    lost_champion_error,
    require_sound_end,
    version_exists,
    writing,
    writing_folder,
)
from nested_core.registry.promotion_outcome import may_be_promoted
from nested_core.registry.versions import (
    CARD_NAME,
    HASHED_AGAIN_AFTER_SECONDS,
    OPTIONAL_FILES,
    PROVENANCE_NAME,
    REGISTERED_AT_KEY,
    verify_version,
    version_manifest_facts,
)
from nested_core.storage.adapter import ADAPTER_FILES
from nested_core.storage.atomic import new_directory, render_json, write_bytes
from nested_core.storage.canary_file import CANARY_NAME
from nested_core.storage.manifest import describe_content, describe_file, write_manifest
from nested_core.storage.untrusted_files import file_type

ADAPTER_FOLDER_NAME = "adapter"
READ_BITS = 0o444
CANARY_BITS = 0o440
SEARCH_BITS = 0o111
REGISTRATION_AUTHOR = "nested-tune (a run with a verdict)"


@dataclass(frozen=True)
class NewVersion:
    """The judged adapter of a run, with everything that its registration records.

    examples: the rows for the data store; None if no rows are kept, or the store has them already.
    are_stored: whether the store had them when `examples` was to be read.
    forgettings: the lines of the history by then that rows were forgotten; None is not compared.
    was_judged_now: whether the gate has just given the verdict. If so, a verdict equal to an
        earlier one on the same version is still recorded when the policy or the champion differs,
        or when the history has changed since.
    """

    run: JudgedRun
    provenance: Mapping[str, object]
    examples: RunExamples | None = None
    are_stored: bool = False
    forgettings: int | None = None
    by: str = REGISTRATION_AUTHOR
    was_judged_now: bool = True


@contextmanager
def registering(new: NewVersion, registry: Path, name: str) -> Iterator[tuple[NameFolder, str]]:
    """Add a version and its examples, and keep the folder of `name` locked during the block.

    Yields the locked folder and the hash of the version's manifest. The provenance is recorded with
    the time. A sound version that exists already stays as it is, with its first verdict and
    provenance; a further verdict is kept beside it, as a judgement. The examples are kept in the
    data store. Raises ConfigError for a bad name, DamagedError if adapter, verdict or an existing
    version do not agree, NestedTuneError if another process removed the rows that were stored.
    """
    folder, examples = create_name_folder(registry, name), new.examples
    if examples is not None:
        with suppress(MissingFileError):  # a gc replaced a pack; under the lock all is compared
            examples.compare_with_store(folder)
    with writing_folder(folder) as locked:
        is_lost = new.are_stored and not keeps_examples(folder, new.run.version)
        if is_lost or new.forgettings not in (None, locked.ledger.count_forgettings()):
            raise NestedTuneError(
                f"Another process removed rows or this version from {folder} before it was locked: "
                f"nothing was registered. Promote the run again, or resume it."
            )
        if examples is not None:
            version, forgot = new.run.version, locked.ledger.may_lack_rows(new.run.version)
            store_examples(locked.path, version, examples, forgot=forgot, confirm=locked.confirm)
        yield locked, _add_version(locked, new)
        # After the decision: the version's examples stay before others' only if it may be followed
        if examples is not None and examples.max_bytes is not None:
            path, ledger = locked.path, locked.ledger
            versions, champion = ledger.by_version, locked.champion
            with suppress(DamagedError):  # `audit` tells of it
                heads = [v for v in versions if v == champion or may_be_promoted(path, v, ledger)]
                bound_store(path, examples.max_bytes, versions, heads, confirm=locked.confirm)


def register_rejection(rejected: NewVersion, registry: Path, name: str) -> None:
    """Record a rejecting verdict on an adapter that is already a version of `name`.

    Nothing is recorded for an adapter that is not registered.
    """
    with writing(registry, name) as locked:
        if locked.version_path(version := rejected.run.version).exists():
            is_judged = has_all_judgements(locked.path, version, locked.ledger)
            (_record_verdict if is_judged else _add_version)(locked, rejected)


def require_usable_registry(registry: Path, name: str) -> None:
    """Check, before a run starts, that a version of `name` can be registered and promoted later.

    Raises ConfigError if the registry cannot be written, DamagedError if the history or the
    champion is damaged. Changes nothing; an existing folder of the name is locked during the check.
    """
    require_creatable(registry, name)
    folder = registry / name
    if folder.is_dir():
        with exclusive_folder_lock(folder) as lock:
            ledger = read_ledger(folder)
            require_sound_end(folder, ledger)
            require_sound_champion(NameFolder(folder, lock, ledger))


def require_sound_champion(locked: NameFolder) -> None:
    """Raise DamagedError if the champion's files are missing or differ from their hashes.

    Does nothing before the first promotion.
    """
    if (champion := locked.champion) is None:
        return
    if not version_exists(locked.path, champion):
        raise lost_champion_error(locked.path, champion, locked.ledger)
    recorded = locked.ledger.manifest_hashes(champion)
    path = locked.version_path(champion)
    verify_version(path, champion, recorded, max_age=HASHED_AGAIN_AFTER_SECONDS)


def _add_version(locked: NameFolder, new: NewVersion) -> str:
    """Copy a run's adapter to `versions/`, and return the hash of the version's manifest.

    Versions are named by the digest of their adapter, so two runs with equal adapters are one.
    If the version exists already, only the run's verdict is recorded, as a judgement. If the
    version was registered before and its files were lost, the history gets a line `restored`.
    """
    version, by = new.run.version, new.by
    path = locked.version_path(version)
    is_judged = has_all_judgements(locked.path, version, locked.ledger)
    judgement = None if is_judged else _write_judgement(locked, new)
    if file_type(path) != "missing":
        manifest = locked.verify(version)
        if is_judged:
            _record_verdict(locked, new)
        else:
            locked.record("restored", version, by, manifest=manifest, judgement=judgement)
        return manifest
    is_lost = version in locked.ledger.by_version
    with new_directory(path, confirm=locked.confirm) as unpublished:
        manifest = _fill_version_folder(unpublished, locked.path.name, new)
        _make_read_only(unpublished)
        if is_lost:  # before the files: after a crash in between, the version is still lost
            locked.record("restored", version, by, manifest=manifest, judgement=judgement)
    if not is_lost:  # after the files: after a crash in between, the next writer adds the line
        conditions = new.provenance.get("conditions_digest")
        locked.record("registered", version, by, manifest=manifest, conditions_digest=conditions)
    elif is_judged:  # the verdict in the new folder may be newer than the judgements that are left
        _record_verdict(locked, new)
    return manifest


def _record_verdict(locked: NameFolder, new: NewVersion) -> None:
    """Record the run's verdict on a registered version, unless it repeats an earlier verdict.

    After the gate has just run, a verdict that equals the newest one is recorded too if a line of
    the history came in between, such as a promotion: the version is then decided on once more. A
    verdict that is read from an older run is left out if it equals any earlier one.
    """
    version, verdict = new.run.version, new.run.verdict
    earlier = read_verdicts(locked.path, version, locked.ledger)
    facts = Judgement.of_run(verdict, new.provenance).facts
    if new.was_judged_now:
        # Repeated only if nothing that could change a decision came in between
        newest = earlier[-1]
        later = locked.ledger.entries[newest.line_number + 1 :]
        is_same_moment = all(
            entry.action in (*REGISTRATION_ACTIONS, "tried")
            or (entry.action, entry.version) == ("promote", version)  # before a crash of the task
            for entry in later
        )
        is_repeated = is_same_moment and (newest.verdict, newest.facts) == (verdict, facts)
    else:
        is_repeated = any(judgement.verdict == verdict for judgement in earlier)
    if not is_repeated:
        judgement = _write_judgement(locked, new)
        conditions = facts.conditions_digest
        locked.record("judged", version, new.by, judgement=judgement, conditions_digest=conditions)


def _write_judgement(locked: NameFolder, new: NewVersion) -> str:
    """Write the run's verdict beside its version; return the judgement's hash for the history."""
    judgement = Judgement.of_run(new.run.verdict, new.provenance)
    return write_judgement(locked.path, judgement, confirm=locked.confirm)


@dataclass(frozen=True)
class ModelCard:
    """A room's README.md of a version.

    render: returns it, of the adapter's name, the version, its provenance and its verdict.
    """

    render: Callable[[str, str, dict[str, object], Verdict], str]


def _fill_version_folder(folder: Path, name: str, new: NewVersion) -> str:
    """Write all files of a version of `name` into `folder`; return the hash of its manifest.

    Some are made here: the verdict as it was read, provenance.json and the card. The others are
    copied from the run. Raises DamagedError if a copy differs from what the gate judged.
    """
    run, bound = new.run, new.run.bound
    now = datetime.now(UTC).isoformat(timespec="microseconds")
    recorded = {**new.provenance, REGISTERED_AT_KEY: now}
    made_here = {GATE_NAME: bound.content, PROVENANCE_NAME: render_json(recorded)}
    for card in seams.load_all(ModelCard):
        text = card.render(name, run.version, recorded, bound.verdict)
        made_here[CARD_NAME] = text.encode("utf-8", "replace")
    for written, content in {**made_here, **run.adapter.files}.items():
        write_bytes(folder / written, content)
    for file in (file for file in OPTIONAL_FILES if file in bound.files):
        shutil.copyfile(bound.run_dir / file, folder / file)
    entries = {written: describe_content(content) for written, content in made_here.items()}
    judged = {file: f"{ADAPTER_FOLDER_NAME}/{file}" for file in ADAPTER_FILES}
    judged |= {file: file for file in OPTIONAL_FILES if file in bound.files}
    for file, source in judged.items():
        entries[file] = describe_file(folder / file)
        if entries[file] != bound.files.get(source):
            raise DamagedError(
                f"{bound.run_dir / source} has changed since the verdict was given: the run's "
                f"manifest holds another digest of it. Bring back what was there; if it is lost:",
                advice=JUDGE_AGAIN,
            )
    return write_manifest(folder, version_manifest_facts(run.version), entries)


def _make_read_only(folder: Path) -> None:
    """Remove write permission from a version's files and from the version's folder.

    Who may read them was decided by the umask and stays, but that the questions of the canary are
    for the owner and the group alone. The folder stays writable if a group may
    write `versions`: members of the group may remove versions that another member registered.
    """
    for path in folder.iterdir():
        bits = CANARY_BITS if path.name == CANARY_NAME else READ_BITS
        path.chmod(path.stat().st_mode & bits)
    if not folder.parent.stat().st_mode & stat.S_IWGRP:
        folder.chmod(folder.stat().st_mode & (READ_BITS | SEARCH_BITS))
