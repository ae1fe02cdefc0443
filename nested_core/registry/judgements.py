"""Judgements: each verdict on a registered version after its first, beside the version.

REGISTRY/NAME/judgements/<version>/<sha256>.json has the fields of the run's gate.json, and under
`judgement` what provenance.json holds of a first verdict. A version never changes: what a later
gate found is kept here, and of all verdicts the newest one against today's champion decides.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nested_core.errors import DamagedError, NestedTuneError, describe_first_problem
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import (
    GATE_NAME,
    MAX_GATE_BYTES,
    parse_verdict,
    read_verdict,
    require_consistent,
    require_verdict_on_adapter,
)
from nested_core.registry.folders import VERSIONS_FOLDER_NAME
from nested_core.registry.ledger import Ledger
from nested_core.registry.versions import (
    VERSION_PATTERN,
    AuditFinding,
    how_to_mend,
    read_provenance,
    registered_versions,
)
from nested_core.storage.atomic import (
    Confirm,
    remove_leftovers,
    render_json,
    sync_path,
    write_bytes,
)
from nested_core.storage.strict_files import file_type, parse_json, read_regular

JUDGEMENTS_FOLDER_NAME = "judgements"
JUDGEMENT_KEY = "judgement"
FILE_PATTERN = re.compile(r"([0-9a-f]{64})\.json")
READ_BITS = 0o444
HOW_TO_MEND = (
    "Restore it from a backup; or remove it, and judge the version's run again with --resume."
)


class JudgementFacts(BaseModel):
    """When and under which policy a version was judged, and against which champion.

    number: 1 for the second verdict on a version, and so on: no clock says which is the newest.
    registration: above that of every verdict on a version of the name that was there.
    registered_after: the hash that the history's end had.
    """

    model_config = ConfigDict(strict=True, frozen=True)
    number: int = Field(ge=0)
    registered_at: str
    registration: int | None = Field(default=None, ge=1)
    registered_after: str
    champion_at_gate: str | None
    validation_digest: str | None
    policy: dict[str, Any] | None
    run_dir: str | None = None
    dataset_digest: str | None = None
    settings_digest: str | None = None

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any], number: int) -> JudgementFacts:
        """The facts that a run's provenance holds; ValueError where it holds others."""
        config = provenance.get("config", {})
        if not isinstance(config, dict):
            raise ValueError("its config is no JSON object")
        recorded = {key: provenance.get(key) for key in cls.model_fields}
        return cls.model_validate(recorded | {"number": number, "policy": config.get("registry")})

    def are_of_same_judging(self, other: JudgementFacts) -> bool:
        """Whether both describe one judging: a step that is tried again records nothing new."""
        fields = ("registered_after", "champion_at_gate", "validation_digest", "policy")
        return all(getattr(self, field) == getattr(other, field) for field in fields)


@dataclass(frozen=True)
class Judgement:
    """A verdict on a version; `sha256` is the hash of its file, None for the version's first."""

    version: str
    sha256: str | None
    verdict: Verdict
    facts: JudgementFacts

    @property
    def rival(self) -> str | None:
        """The champion that it was judged against; None where there was none to judge."""
        return self.verdict.rival

    @property
    def loss_after(self) -> float | None:
        """Its loss on the held-out examples, in nats a token; None where none was measured."""
        return None if self.verdict.validation is None else self.verdict.validation.loss_after

    @property
    def file(self) -> str | None:
        """The file that holds those examples."""
        return None if self.verdict.validation is None else self.verdict.validation.file


def read_verdicts(folder: Path, version: str) -> tuple[Judgement, ...]:
    """Every verdict on a version, oldest first; call under the lock of its NAME's folder.

    Raises DamagedError for what is not as it was written, and a missing or broken first verdict.
    """
    place = folder / VERSIONS_FOLDER_NAME / version
    try:
        verdict = read_verdict(place / GATE_NAME)
        facts = JudgementFacts.from_provenance(read_provenance(place), 0)
    except (NestedTuneError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DamagedError(
            f"{place}: provenance or verdict cannot be read: {reason}. {how_to_mend(place)}"
        ) from error
    return (Judgement(version, None, verdict, facts), *read_judgements(folder, version))


def read_judgements(folder: Path, version: str) -> tuple[Judgement, ...]:
    """The verdicts on a version after its first, oldest first."""
    judgements = [_read_judgement(path, version) for path in _judgement_files(folder, version)]
    return tuple(sorted(judgements, key=lambda judgement: judgement.facts.number))


def read_newest_facts(folder: Path, version: str) -> JudgementFacts | None:
    """Of a version's last judging; None for a damaged one, which counts as the oldest."""
    with suppress(DamagedError, OSError):  # an audit reports it
        return read_verdicts(folder, version)[-1].facts
    return None


def next_registration(folder: Path) -> int:
    """The number of the next registration or judging; call under the folder's lock."""
    newest = [read_newest_facts(folder, version) for version in registered_versions(folder)]
    return 1 + max((facts.registration or 0 for facts in newest if facts is not None), default=0)


def choose_verdict(verdicts: Sequence[Judgement], champion: str | None) -> Judgement:
    """The newest verdict that was given against this champion; without one the newest of all."""
    against = [verdict for verdict in verdicts if verdict.rival == champion]
    return (against or list(verdicts))[-1]


def record_judgement(
    folder: Path,
    version: str,
    verdict: Verdict,
    provenance: Mapping[str, Any],
    *,
    was_judged_now: bool,
    confirm: Confirm,
) -> str | None:
    """Keep a run's verdict on a version that is registered; its hash, None where it is not new.

    With `was_judged_now` the gate has just given it: the same words count again where the policy,
    the champion or the history's end differ. Else a verdict that is known already is not new.
    """
    verdicts = read_verdicts(folder, version)
    facts = JudgementFacts.from_provenance(provenance, verdicts[-1].facts.number + 1)
    if was_judged_now:
        newest = verdicts[-1]
        is_known = newest.verdict == verdict and newest.facts.are_of_same_judging(facts)
    else:
        is_known = any(known.verdict == verdict for known in verdicts)
    if is_known:
        return None
    content = render_json(verdict.to_json() | {JUDGEMENT_KEY: facts.model_dump()})
    digest = hashlib.sha256(content).hexdigest()
    place = _judgements_folder(folder, version)
    for path in (place.parent, place):
        if file_type(path) == "missing":
            path.mkdir(exist_ok=True)
            sync_path(path.parent)
    target = place / f"{digest}.json"
    write_bytes(target, content, confirm=confirm)
    target.chmod(target.stat().st_mode & READ_BITS)
    return digest


def remove_judgements(folder: Path, version: str) -> None:
    """Remove the judgements of a version that the history says is removed."""
    place = _judgements_folder(folder, version)
    if file_type(place) != "missing":
        shutil.rmtree(place)
        sync_path(place.parent)


def clear_leftovers(folder: Path, ledger: Ledger) -> None:
    """Remove what a crash left among the judgements; call only under the folder's lock."""
    for version in _judged_versions(folder):
        remove_leftovers(_judgements_folder(folder, version))
        is_there = file_type(folder / VERSIONS_FOLDER_NAME / version) != "missing"
        if not is_there and ledger.is_removed(version):
            remove_judgements(folder, version)


def judgement_findings(folder: Path, ledger: Ledger) -> Iterator[AuditFinding]:
    """Everything that is wrong with the judgements of a NAME."""
    root = folder / JUDGEMENTS_FOLDER_NAME
    for name in sorted(os.listdir(root)) if file_type(root) == "directory" else ():
        if not VERSION_PATTERN.fullmatch(name) or file_type(root / name) != "directory":
            yield AuditFinding(root / name, "belongs to no version. Remove it.")
            continue
        is_there = file_type(folder / VERSIONS_FOLDER_NAME / name) == "directory"
        if not is_there and name not in ledger.champion_versions() and not ledger.is_removed(name):
            yield AuditFinding(root / name, "belongs to no version that is registered. Remove it.")
        for entry in sorted(os.listdir(root / name)):
            if entry.startswith("."):
                continue
            try:
                _read_judgement(root / name / entry, name)
            except DamagedError as error:
                yield AuditFinding(root / name / entry, str(error))
    for version, digest in sorted(ledger.last_judgements().items()):
        path = _judgements_folder(folder, version) / f"{digest}.json"
        if not has_named_judgement(folder, version, ledger):
            yield AuditFinding(
                path,
                "is missing, and the version's last promotion rests on it. Restore it from a "
                "backup, or register the version's run again with `nested-tune promote RUN_DIR`.",
            )


def has_named_judgement(folder: Path, version: str, ledger: Ledger) -> bool:
    """Whether the judgement that the version's last promotion names, if it names one, is there."""
    digest = ledger.last_judgements().get(version)
    path = _judgements_folder(folder, version) / f"{digest}.json"
    return digest is None or file_type(path) != "missing"


def _judgements_folder(folder: Path, version: str) -> Path:
    return folder / JUDGEMENTS_FOLDER_NAME / version


def _judged_versions(folder: Path) -> list[str]:
    root = folder / JUDGEMENTS_FOLDER_NAME
    if file_type(root) != "directory":
        return []
    return [name for name in os.listdir(root) if VERSION_PATTERN.fullmatch(name)]


def _judgement_files(folder: Path, version: str) -> list[Path]:
    place = _judgements_folder(folder, version)
    if file_type(place) == "missing":
        return []
    if file_type(place) != "directory":
        raise DamagedError(f"{place} is not a directory. {HOW_TO_MEND}")
    return [place / name for name in os.listdir(place) if not name.startswith(".")]


def _read_judgement(path: Path, version: str) -> Judgement:
    """Read a judgement; DamagedError for any other content than what its name is the hash of."""
    named = FILE_PATTERN.fullmatch(path.name)
    if named is None:
        raise DamagedError(f"{path} is not a judgement: its name is no hash. Remove it.")
    try:
        content = read_regular(path, MAX_GATE_BYTES)
        if hashlib.sha256(content).hexdigest() != named[1]:
            raise DamagedError(f"{path} has changed since it was written.")
        document = parse_json(content)
        verdict = parse_verdict(document, path)
        require_verdict_on_adapter(verdict, version, path)
        if verdict.has_passed:
            require_consistent(verdict, path)
        facts = JudgementFacts.model_validate(document[JUDGEMENT_KEY])
    except DamagedError as error:
        raise DamagedError(f"{error} {HOW_TO_MEND}") from error
    except ValidationError as error:
        raise DamagedError(f"{path}: {describe_first_problem(error)}. {HOW_TO_MEND}") from error
    except (AttributeError, KeyError, ValueError) as error:
        raise DamagedError(f"{path} is not a judgement: {error}. {HOW_TO_MEND}") from error
    return Judgement(version, named[1], verdict, facts)
