"""Removes old run folders that nothing rests on: `nested-tune runs --prune`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from nested_core.errors import ConfigError
from nested_core.records.run import Run, list_runs
from nested_core.registry import list_names, list_versions
from nested_core.registry.folders import find_name_folder
from nested_core.registry.judgements import read_verdicts
from nested_core.registry.ledger import read_ledger


@dataclass(frozen=True)
class PruneReport:
    """What was removed, or would be, and why each other old run was kept; paths as given."""

    removed: tuple[str, ...]
    kept: dict[str, str]
    bytes: int
    is_dry_run: bool


def prune_runs(folder: Path, *, keep: int, dry_run: bool = False) -> PruneReport:
    """Remove the runs of a folder but the `keep` newest, and but those that something names.

    That is a version of the registry, one that waits for approval among them, a judgement of one,
    or a process at work. A run that is damaged is kept, and one whose registry is not found from
    here. Raises ConfigError for a negative `keep` or no such folder, DamagedError for a registry
    that cannot be read: nothing is removed then.
    """
    if keep < 0:
        raise ConfigError(f"--keep {keep}: expected the number of runs to keep, 0 or more.")
    old = list_runs(folder)[keep:]
    named = _read_named_runs(old)
    kept: dict[str, str] = {}
    removed: list[str] = []
    size = 0
    for run in old:
        reason = _why_kept(run, named)
        if reason is not None:
            kept[str(run.path)] = reason
            continue
        size += sum(path.lstat().st_size for path in run.path.rglob("*"))
        removed.append(str(run.path))
        if not dry_run:
            with run.folder.locked():  # no process begins to work on it meanwhile
                shutil.rmtree(run.path)
    return PruneReport(tuple(removed), kept, size, dry_run)


def _why_kept(run: Run, named: dict[str, str]) -> str | None:
    """Why an old run stays, or None."""
    if run.state == "damaged":
        return "damaged"
    if run.state == "running":
        return "a process works on it"
    resolved = str(run.path.resolve())
    if resolved in named:
        return named[resolved]
    if run.state == "verified" and (missing := _missing_registry(run)) is not None:
        return f"its registry {missing} is not found from this folder"
    return None


def _missing_registry(run: Run) -> str | None:
    """The registry that a run names, where it is not there; None where it is, or none is named."""
    path = None if run.config is None else run.config.registry.path
    return None if path is None or Path(path).is_dir() else path


def _read_named_runs(runs: list[Run]) -> dict[str, str]:
    """By run folder, which version of the runs' registries names it."""
    paths = [run.config.registry.path for run in runs if run.config is not None]
    registries = {Path(path).resolve() for path in paths if path is not None}
    named: dict[str, str] = {}
    for registry in sorted(registries):
        for name in list_names(registry):
            for version in list_versions(registry, name):
                folder = find_name_folder(registry, name)
                for verdict in read_verdicts(folder, version, read_ledger(folder)):
                    if verdict.facts.run_dir is not None:
                        named[verdict.facts.run_dir] = f"version {version[:12]} of {name} names it"
    return named
