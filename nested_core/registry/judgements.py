"""Judgements: each verdict on a registered version after its first, beside the version.

REGISTRY/NAME/judgements/<version>/<sha256>.json has the fields of the run's gate.json, and under
`judgement` what provenance.json holds of a first verdict. A line `judged` of the history names it,
and its place there says which is the newest. A version never changes: what a later gate found is
kept here, and of all verdicts the newest one against today's champion decides.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from nested_core.errors import DamagedError, NestedTuneError, describe_first_problem
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import (
    GATE_NAME,
    MAX_GATE_BYTES,
    parse_verdict,
    read_verdict,
    require_verdict_on_adapter,
)
from nested_core.registry.folders import VERSIONS_FOLDER_NAME
from nested_core.registry.ledger import Ledger, holding_end
from nested_core.registry.versions import AuditFinding, how_to_mend, read_provenance
from nested_core.storage.atomic import Confirm, render_json, sync_path, write_bytes
from nested_core.storage.untrusted_files import file_type, parse_json, read_regular

JUDGEMENTS_FOLDER_NAME = "judgements"
JUDGEMENT_KEY = "judgement"
READ_BITS = 0o444


class JudgementFacts(BaseModel):
    """Under which policy a version was judged, against which champion, and of which run."""

    model_config = ConfigDict(strict=True, frozen=True)
    champion_at_gate: str | None
    validation_digest: str | None
    policy: dict[str, Any] | None
    run_dir: str | None = None
    dataset_digest: str | None = None
    settings_digest: str | None = None
    conditions_digest: str | None = None

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, Any]) -> JudgementFacts:
        """The facts that a run's provenance holds; ValueError where it holds others."""
        config = provenance.get("config", {})
        if not isinstance(config, dict):
            raise ValueError("its config is no JSON object")
        recorded = {key: provenance.get(key) for key in cls.model_fields}
        return cls.model_validate(recorded | {"policy": config.get("registry")})


@dataclass(frozen=True)
class Judgement:
    """A verdict on a version.

    sha256: the hash of its file; None for the version's first.
    place: the number of its line in the history, from 0; one beyond the last before it is
        written.
    """

    version: str
    sha256: str | None
    verdict: Verdict
    facts: JudgementFacts
    place: int

    @classmethod
    def of_run(cls, verdict: Verdict, provenance: Mapping[str, Any]) -> Judgement:
        """A run's verdict, with the run's provenance, before it is registered."""
        facts = JudgementFacts.from_provenance(provenance)
        return cls(verdict.trained.digest, None, verdict, facts, 0)

    @property
    def rival(self) -> str | None:
        """The champion that it was judged against; None without a champion."""
        return self.verdict.rival

    @property
    def loss_after(self) -> float | None:
        """Its loss on the held-out examples, in nats/token; None if it was not measured."""
        return None if self.verdict.validation is None else self.verdict.validation.loss_after

    @property
    def file(self) -> str | None:
        """The file that holds those examples."""
        return None if self.verdict.validation is None else self.verdict.validation.file


def read_verdicts(folder: Path, version: str, ledger: Ledger) -> tuple[Judgement, ...]:
    """Every verdict on a version, oldest first; call under the lock of its NAME's folder.

    Raises DamagedError for what is missing, or not as it was written.
    """
    version_path = folder / VERSIONS_FOLDER_NAME / version
    try:
        verdict = read_verdict(version_path / GATE_NAME)
        facts = JudgementFacts.from_provenance(read_provenance(version_path))
    except (NestedTuneError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DamagedError(
            f"{version_path}: provenance or verdict cannot be read: {reason}. "
            f"{how_to_mend(version_path)}"
        ) from error
    lines = ledger.standing.get(version)
    first = Judgement(version, None, verdict, facts, lines[0][0] if lines else len(ledger.entries))
    return (first, *read_judgements(folder, version, ledger))


def read_judgements(folder: Path, version: str, ledger: Ledger) -> tuple[Judgement, ...]:
    """The verdicts on a version after its first, oldest first."""
    return tuple(
        _read_judgement(folder, version, digest, number)
        for number, digest in ledger.judgements(version)
    )


def choose_verdict(verdicts: Sequence[Judgement], champion: str | None) -> Judgement:
    """The newest verdict that was given against this champion; without one the newest of all."""
    against = [verdict for verdict in verdicts if verdict.rival == champion]
    return (against or list(verdicts))[-1]


def write_judgement(
    folder: Path, version: str, verdict: Verdict, facts: JudgementFacts, *, confirm: Confirm
) -> str:
    """Write a verdict beside its version; its hash, by which a line of the history names it."""
    content = render_json(verdict.to_json() | {JUDGEMENT_KEY: facts.model_dump()})
    digest = hashlib.sha256(content).hexdigest()
    target = _path_of(folder, version, digest)
    for path in (target.parent.parent, target.parent):
        if file_type(path) == "missing":
            path.mkdir(exist_ok=True)
            sync_path(path.parent)
    write_bytes(target, content, confirm=confirm)
    target.chmod(target.stat().st_mode & READ_BITS)
    return digest


def remove_judgements(folder: Path, version: str) -> None:
    """Remove the judgements of a version that the history says is removed."""
    judgements = folder / JUDGEMENTS_FOLDER_NAME / version
    if file_type(judgements) != "missing":
        shutil.rmtree(judgements)
        sync_path(judgements.parent)


def remove_unnamed_judgements(folder: Path, ledger: Ledger) -> None:
    """Remove the files that a crash left before their line; call only under the folder's lock."""
    unnamed = [
        Path(subfolder, name)
        for subfolder, _, names in os.walk(folder / JUDGEMENTS_FOLDER_NAME)
        for name in names
        if Path(name).stem not in {digest for _, digest in ledger.judgements(Path(subfolder).name)}
    ]
    if unnamed:
        with holding_end(folder, ledger):  # no line about one of them is being written
            for path in unnamed:
                path.unlink()


def judgement_findings(folder: Path, ledger: Ledger) -> Iterator[AuditFinding]:
    """Every judgement of a NAME that is missing, or not as it was written."""
    for version in sorted(ledger.standing):
        for number, digest in ledger.judgements(version):
            try:
                _read_judgement(folder, version, digest, number)
            except DamagedError as error:
                yield AuditFinding(_path_of(folder, version, digest), str(error))


def has_all_judgements(folder: Path, version: str, ledger: Ledger) -> bool:
    """Whether each judgement of a version that the history names is there and as it was written."""
    try:
        read_judgements(folder, version, ledger)
    except DamagedError:
        return False
    return True


def _path_of(folder: Path, version: str, digest: str) -> Path:
    return folder / JUDGEMENTS_FOLDER_NAME / version / f"{digest}.json"


def _read_judgement(folder: Path, version: str, digest: str, number: int) -> Judgement:
    """Read a judgement; DamagedError for any other content than its line in the history names."""
    path = _path_of(folder, version, digest)
    try:
        content = read_regular(path, MAX_GATE_BYTES)
        if hashlib.sha256(content).hexdigest() != digest:
            raise DamagedError(f"{path} has changed since it was written.")
        document = parse_json(content)
        verdict = parse_verdict(document, path)
        require_verdict_on_adapter(verdict, version, path)
        facts = JudgementFacts.model_validate(document[JUDGEMENT_KEY])
    except (NestedTuneError, KeyError, ValueError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            reason = f"{path}: {describe_first_problem(error)}."
        raise DamagedError(
            f"{reason} Restore it from a backup; or give `nested-tune promote RUN_DIR --name "
            f"{folder.name} --registry {folder.parent}` for the run of version {version}, whose "
            f"verdict counts from then on."
        ) from error
    return Judgement(version, digest, verdict, facts, number)
