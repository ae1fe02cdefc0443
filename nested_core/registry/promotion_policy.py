"""Whether a registered version becomes the champion by itself: what its policy says, and why not.

Reads what the version's own files say. Whether they are still what was registered is for `promote`,
which re-hashes them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from nested_core.config.registry import RegistrySection
from nested_core.errors import ConfigError, DamagedError, GateRejected
from nested_core.registry import (
    Promotion,
    list_versions,
    promote,
    read_champion,
    read_changes,
    verify,
)
from nested_core.registry.locking import shared
from nested_core.registry.names import locate
from nested_core.registry.verdict import GATE_NAME, MAX_GATE_BYTES
from nested_core.registry.versions import PROVENANCE_NAME, read_provenance, version_folder
from nested_core.storage.strict_files import read_json

DAMAGED, COLLECTED = "damaged", "collected meanwhile"
T = TypeVar("T")


class Candidate(BaseModel):
    """What a version says of itself: the policy and the champion of its time, and its losses.

    `initial` is the digest of the adapter that training started from, `loss_before` that adapter's
    loss on the same examples as `loss_after`.
    """

    model_config = ConfigDict(strict=True, frozen=True)
    version: str
    policy: dict[str, Any] | None
    champion_at_gate: str | None
    registered_at: str
    validation_digest: str | None
    initial: str | None
    loss_before: float | None
    loss_after: float | None


def read_candidate(registry: Path, name: str, version: str) -> Candidate:
    """Read a version's provenance and verdict.

    ConfigError for an unknown version, DamagedError where they are not what is written there, and
    OSError, which may pass.
    """
    folder = version_folder(registry, name, version)
    with shared(locate(registry, name)):  # a gc would leave half of it, which looks like damage
        if version not in list_versions(registry, name):
            raise ConfigError(f"{registry / name} has no version {version!r:.80}.")
        provenance = read_provenance(folder)
        gate = read_json(folder / GATE_NAME, MAX_GATE_BYTES)
    try:
        validation = gate.get("validation") or {}
        fields = {
            "version": version,
            "policy": provenance.get("config", {}).get("registry"),
            "champion_at_gate": provenance.get("champion_at_gate"),
            "registered_at": provenance.get("registered_at"),
            "validation_digest": provenance.get("validation_digest"),
            "initial": gate.get("initial", {}).get("digest"),
            "loss_before": validation.get("loss_before"),
            "loss_after": validation.get("loss_after"),
        }
        return Candidate.model_validate(fields)
    except (ValueError, AttributeError, RecursionError) as error:
        reason = " ".join(str(error).split())[:300]
        raise DamagedError(f"{folder}: provenance or verdict cannot be read: {reason}.") from error


def promote_by_policy(
    section: RegistrySection, version: str, expected_champion: str | None
) -> Promotion | str:
    """Promote a registered version if `registry.promote` asks for it; else say why it was not.

    `expected_champion` is the champion that the version was judged against: where another stands by
    now, the promotion is superseded.
    """
    registry, name = target(section)
    candidate = read_candidate(registry, name, version)
    try:
        reason = _refusal(section, candidate, expected_champion)
    except (ConfigError, DamagedError):
        champion = read_champion(registry, name)
        if champion == expected_champion:
            raise
        return Promotion("superseded", version, champion)  # and what it was may be collected
    if reason is not None:
        return reason
    return promote(
        registry, name, version, by="policy", expected_champion=expected_champion, automatic=True
    )


def promote_as_recorded(registry: Path, name: str, version: str) -> Promotion | str:
    """Promote by the policy, and against the champion, that were recorded with the version.

    This is for what comes late or again, an event or `reconcile`: it is superseded by any change of
    the champion since the version was registered, one that was taken back included.
    """
    candidate = read_candidate(registry, name, version)
    champion = read_champion(registry, name)
    if version == champion:
        return Promotion("already_champion", version, champion)
    if candidate.policy is None:
        return "its provenance records no policy"
    changes = read_changes(registry, name)
    if changes and changes[-1].time >= candidate.registered_at:
        return Promotion("superseded", version, champion)
    target_of_event = {"path": str(registry), "name": name}
    try:
        section = RegistrySection.model_validate(candidate.policy | target_of_event)
    except ValidationError as error:
        where = version_folder(registry, name, version) / PROVENANCE_NAME
        raise DamagedError(f"{where} records no policy: {error.errors()[0]['msg']}.") from error
    return promote_by_policy(section, version, candidate.champion_at_gate)


def reconcile(registry: Path, name: str) -> dict[str, str]:
    """Promote what an event got lost for, newest first; doing it again changes nothing.

    Returns what became of each version that never was champion. One that is damaged is left as it
    is, and keeps no other from being promoted: its outcome begins with DAMAGED. Nor does one that a
    gc removes meanwhile.
    """
    was_champion = {change.version for change in read_changes(registry, name)}
    fresh = [v for v in list_versions(registry, name) if v not in was_champion]
    outcomes, registered = {}, {}
    for version in fresh:
        candidate = _tried(read_candidate, registry, name, version)
        if isinstance(candidate, str):
            outcomes[version] = candidate
        else:
            registered[version] = candidate.registered_at
    for version in sorted(registered, key=lambda v: registered[v], reverse=True):
        done = _tried(promote_as_recorded, registry, name, version)
        outcomes[version] = done if isinstance(done, str) else done.outcome
    return outcomes


def _tried(act: Callable[[Path, str, str], T], registry: Path, name: str, version: str) -> T | str:
    """What comes of a version, or why nothing does."""
    try:
        return act(registry, name, version)
    except (DamagedError, GateRejected) as error:
        return f"{DAMAGED}: {error}"
    except ConfigError:
        if version in list_versions(registry, name):
            raise
        return COLLECTED


def target(section: RegistrySection) -> tuple[Path, str]:
    """Registry and name; ConfigError where they are not configured."""
    if section.path is None or section.name is None:
        raise ConfigError("registry: path and name are needed to register an adapter.")
    return Path(section.path), section.name


def _refusal(section: RegistrySection, candidate: Candidate, champion: str | None) -> str | None:
    if section.promote == "never":
        return "registry.promote is never"
    if candidate.loss_after is None and section.require_validation:
        return "there was no validation set, and registry.require_validation is on"
    if section.promote == "approve":
        return f"waiting for approval of {candidate.version[:12]}: registry.promote is approve"
    if section.promote == "always" or champion is None:
        return None
    return _not_better(section, candidate, champion)


def _not_better(section: RegistrySection, candidate: Candidate, champion: str) -> str | None:
    """Why a version does not beat the champion on the same examples, or None where it does.

    A version that was trained from the champion brings the champion's loss on its own examples.
    """
    best, loss = candidate.loss_before, candidate.loss_after
    if candidate.initial != champion:
        registry, name = target(section)
        verify(registry, name, champion)
        rival = read_candidate(registry, name, champion)
        if rival.validation_digest != candidate.validation_digest:
            return "the champion was validated on other data: the losses cannot be compared"
        best = rival.loss_after
    if loss is None or best is None or loss >= best - section.min_improvement:
        return f"validation loss {loss} is not better than the champion's {best}"
    return None
