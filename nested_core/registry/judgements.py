"""Judgements: each further verdict on a registered version, stored beside the version.

REGISTRY/NAME/judgements/<version>/<sha256>.json has the fields of the run's gate.json, and under
`judgement` what provenance.json has for the first verdict. A line `judged` of the history names the
file; the order of the lines is the order of the verdicts. A version never changes, so what a later
gate found is kept here. The newest verdict against today's champion decides, or a newer rejection.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import BaseModel, ConfigDict, ValidationError

from nested_core.errors import DamagedError, NestedTuneError, describe_first_problem, quote_path
from nested_core.records.verdict import Verdict
from nested_core.records.verdict_file import (
    GATE_NAME,
    MAX_GATE_BYTES,
    parse_verdict,
    read_verdict,
    require_verdict_on_adapter,
)
from nested_core.registry.folders import VERSIONS_FOLDER_NAME
from nested_core.registry.ledger import Ledger, opened_for_append
from nested_core.registry.versions import how_to_mend, read_provenance
from nested_core.storage.atomic import Confirm, render_json, sync_path, write_bytes
from nested_core.storage.untrusted_files import file_type, parse_json, read_regular

JUDGEMENTS_FOLDER_NAME = "judgements"
JUDGEMENT_KEY = "judgement"
READ_BITS = 0o444


class JudgementFacts(BaseModel):
    """Under which policy, against which champion and in which run a version was judged.

    champion_at_gate: the champion when the gate ran; None without one.
    validation_digest: the digest of the held-out examples.
    policy: the run's configuration section `registry`.
    conditions_digest: the digest of everything that decides the outcome of the run.
    """

    model_config = ConfigDict(strict=True, frozen=True)
    champion_at_gate: str | None
    validation_digest: str | None
    policy: dict[str, object] | None
    run_dir: str | None = None
    dataset_digest: str | None = None
    settings_digest: str | None = None
    conditions_digest: str | None = None

    @classmethod
    def from_provenance(cls, provenance: Mapping[str, object]) -> JudgementFacts:
        """Extract the facts from a run's provenance; ValueError if a field has another type."""
        config = provenance.get("config", {})
        if not isinstance(config, dict):
            raise ValueError("its config is no JSON object")
        recorded = {key: provenance.get(key) for key in cls.model_fields}
        return cls.model_validate(recorded | {"policy": config.get("registry")})


@dataclass(frozen=True)
class Judgement:
    """One verdict on a version.

    sha256: the hash of the judgement's file; None for the first verdict, which is in the version
        itself.
    line_number: the number of the history line of this verdict, from 0.
    """

    version: str
    sha256: str | None
    verdict: Verdict
    facts: JudgementFacts
    line_number: int

    @classmethod
    def of_run(cls, verdict: Verdict, provenance: Mapping[str, object]) -> Judgement:
        """Build the judgement of a run that is not registered yet."""
        facts = JudgementFacts.from_provenance(provenance)
        return cls(verdict.trained.digest, None, verdict, facts, 0)

    @property
    def loss_after(self) -> float | None:
        """The version's mean held-out loss in nats/token; None if it was not measured."""
        return None if self.verdict.validation is None else self.verdict.validation.loss_after

    @property
    def file(self) -> str | None:
        """The file of the held-out examples; None if no loss was measured."""
        return None if self.verdict.validation is None else self.verdict.validation.file


def read_verdicts(folder: Path, version: str, ledger: Ledger) -> tuple[Judgement, ...]:
    """Read every verdict on a version, oldest first; call under the lock of the name's folder.

    Raises DamagedError for a file that is missing or was changed.

    ledger: the adapter's history.
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
    lines = ledger.by_version.get(version)
    first = Judgement(version, None, verdict, facts, lines[0][0] if lines else len(ledger.entries))
    return (first, *read_judgements(folder, version, ledger))


def read_judgements(folder: Path, version: str, ledger: Ledger) -> tuple[Judgement, ...]:
    """Read the verdicts on a version after its first one, oldest first.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    ledger: the adapter's history.
    """
    return tuple(read_judgement(folder, version, d, n) for n, d in ledger.judgements(version))


def read_facts(folder: Path, version: str) -> Iterator[JudgementFacts]:
    """Yield the facts of each verdict that passed a version, in no order; no file may be there.

    Raises DamagedError, LookupError or ValueError for a file that cannot be read.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    yield JudgementFacts.from_provenance(read_provenance(folder / VERSIONS_FOLDER_NAME / version))
    for path in (folder / JUDGEMENTS_FOLDER_NAME / version).glob("[!.]*.json"):
        document = parse_json(read_regular(path, MAX_GATE_BYTES))
        if parse_verdict(document, path).has_passed:
            yield JudgementFacts.model_validate(document[JUDGEMENT_KEY])


def choose_verdict(verdicts: Sequence[Judgement], champion: str | None) -> Judgement:
    """Return the newest verdict if it rejects; else the newest against this champion, or of all."""
    against = [judgement for judgement in verdicts if judgement.verdict.rival == champion]
    return against[-1] if against and verdicts[-1].verdict.has_passed else verdicts[-1]


def write_judgement(folder: Path, judgement: Judgement, *, confirm: Confirm) -> str:
    """Write a verdict beside its version; return the file's hash for the history's line.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    confirm: called before each write; it raises if the lock was lost.
    """
    facts = judgement.facts.model_dump()
    content = render_json(judgement.verdict.to_json() | {JUDGEMENT_KEY: facts})
    digest = hashlib.sha256(content).hexdigest()
    target = judgement_path(folder, judgement.version, digest)
    for path in (target.parent.parent, target.parent):
        if file_type(path) == "missing":
            path.mkdir(exist_ok=True)
            sync_path(path.parent)
    write_bytes(target, content, confirm=confirm)
    target.chmod(target.stat().st_mode & READ_BITS)
    return digest


def remove_judgements(folder: Path, version: str) -> None:
    """Remove the judgements of a version that was removed according to the history.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    judgements = folder / JUDGEMENTS_FOLDER_NAME / version
    if file_type(judgements) != "missing":
        shutil.rmtree(judgements)
        sync_path(judgements.parent)


def remove_unnamed_judgements(folder: Path, ledger: Ledger) -> None:
    """Remove judgements that no history line names, as a crash before the line leaves them.

    Call only under the folder's lock.
    """
    unnamed = [
        Path(subfolder, name)
        for subfolder, _, names in os.walk(folder / JUDGEMENTS_FOLDER_NAME)
        for name in names
        if Path(name).stem not in {digest for _, digest in ledger.judgements(Path(subfolder).name)}
    ]
    if unnamed:
        with opened_for_append(folder, ledger):  # no line about one of them is being written
            for path in unnamed:
                path.unlink()


def has_all_judgements(folder: Path, version: str, ledger: Ledger) -> bool:
    """Return whether all judgements of a version that the history names are there and unchanged.

    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    try:
        read_judgements(folder, version, ledger)
    except DamagedError:
        return False
    return True


def judgement_path(folder: Path, version: str, digest: str) -> Path:
    """Return the path of a judgement's file.

    digest: the SHA-256 that names the file.
    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    return folder / JUDGEMENTS_FOLDER_NAME / version / f"{digest}.json"


def read_judgement(folder: Path, version: str, digest: str, line_number: int) -> Judgement:
    """Read a judgement, the file of a later verdict on a version that was registered already.

    Raises DamagedError if its content is not what its history line names.

    digest: the file's SHA-256, which names it. line_number: the number of its history line, from 0.
    folder: the adapter's folder in the registry, REGISTRY/NAME.
    """
    path = judgement_path(folder, version, digest)
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
            f"{folder.name} --registry {quote_path(folder.parent)}` for the run of version "
            f"{version}, which makes it champion, or judge that again by `nested-tune train -c "
            f"CONFIG --run-dir RUN_DIR --resume`. That verdict counts from then on."
        ) from error
    return Judgement(version, digest, verdict, facts, line_number)
