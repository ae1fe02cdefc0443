"""Registration and promotion of runs that a test wrote, each a write of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from nested_core.records.judged_run import read_judged_run
from nested_core.registry import UNSET, Decision, Unset
from nested_core.registry.data_store import RunExamples
from nested_core.registry.folders import check_name
from nested_core.registry.ledger import NO_ORIGIN, Origin
from nested_core.registry.link_and_views import writing
from nested_core.registry.promote_and_rollback import promote_in_folder
from nested_core.registry.promote_and_rollback import register_and_promote as promote_new_version
from nested_core.registry.registration import NewVersion, registering
from nested_core.registry.versions import resolve_version


def register(
    run_dir: Path,
    registry: Path,
    name: str,
    provenance: Mapping[str, object],
    *,
    examples: RunExamples | None = None,
) -> str:
    """Add the adapter of a finished run as a version of `name`; return the version."""
    check_name(name)
    new = NewVersion(read_judged_run(run_dir), provenance, examples)
    with registering(new, registry, name):
        return new.run.version


def promote(
    registry: Path,
    name: str,
    version: str,
    *,
    by: str,
    expected_champion: str | None | Unset = UNSET,
    automatic: bool = False,
    origin: Origin = NO_ORIGIN,
) -> Decision:
    """Make a version the champion, after re-hashing its files."""
    with writing(registry, name) as locked:
        version = resolve_version(locked.path, version, locked.ledger)
        fields = {"by": by, "automatic": automatic, **vars(origin)}
        fields["manifest"] = locked.verify(version)
        return promote_in_folder(locked, version, expected_champion, fields)


def register_and_promote(
    run_dir: Path,
    registry: Path,
    name: str,
    provenance: Mapping[str, object],
    *,
    by: str,
    against_policy: str | None = None,
    examples: RunExamples | None = None,
) -> Decision:
    """Register a run's adapter and make it the champion, under one lock."""
    check_name(name)
    run = read_judged_run(run_dir)
    new = NewVersion(run, provenance, examples, by=by, was_judged_now=False)
    return promote_new_version(new, registry, name, against_policy=against_policy)
