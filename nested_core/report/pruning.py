"""Removes old runs that nothing rests on, and the spare checkpoints of those that something does.

`nested-tune runs --prune` does, and housekeeping for one adapter.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from nested_core.errors import ConfigError
from nested_core.records.run import Run
from nested_core.registry import list_names
from nested_core.registry.garbage_collection import DEFAULT_KEPT_VERSIONS
from nested_core.registry.history_views import reading
from nested_core.registry.judgements import read_verdicts
from nested_core.registry.versions import registered_versions
from nested_core.storage.checkpoint_verification import checkpoint_path, list_checkpoints
from nested_core.storage.folder_size import size_on_disk
from nested_core.text.value_format import format_bytes


@dataclass(frozen=True)
class KeptAmounts:
    """What housekeeping leaves of an adapter in any case: newest runs and versions, recent runs."""

    runs: int = 14
    days: float = 7.0
    versions: int = DEFAULT_KEPT_VERSIONS


@dataclass(frozen=True)
class AdapterRuns:
    """The runs of one adapter, by the registry and name that their configurations have.

    registry: its folder, resolved.
    """

    registry: Path
    name: str

    @classmethod
    def of(cls, registry: Path, name: str) -> AdapterRuns:
        """Those of a name in a registry."""
        return cls(registry.resolve(), name)

    def include(self, run: Run) -> bool:
        """Whether a run is one of them; one whose configuration cannot be read is nobody's."""
        section = None if run.config is None else run.config.registry
        if section is None or section.path is None or section.name != self.name:
            return False
        return Path(section.path).resolve() == self.registry

    def among(self, runs: Sequence[Run]) -> list[Run]:
        """Those of some runs, in their order."""
        return [run for run in runs if self.include(run)]


@dataclass(frozen=True)
class PruneReport:
    """What was removed, or would be, and why each other old run was kept; paths as given.

    checkpoints: those that were removed of runs that stay.
    """

    removed: tuple[str, ...]
    checkpoints: tuple[str, ...]
    kept: dict[str, str]
    bytes: int
    is_dry_run: bool

    def describe(self) -> str:
        """Such as `3 runs and 8 spare checkpoints of others (63.2 MB)`."""
        spare = f" and {len(self.checkpoints)} spare checkpoints of others"
        return f"{len(self.removed)} runs{spare} ({format_bytes(self.bytes)})"


def prune_runs(
    runs: Sequence[Run],
    *,
    keep: int,
    adapter: AdapterRuns | None = None,
    min_age: timedelta = timedelta(0),
    ignored_versions: Collection[str] = (),
    dry_run: bool = False,
) -> PruneReport:
    """Remove all runs but the `keep` first, which are the newest, and those that something names.

    That is a version of the registry, one that waits for approval among them, a judgement of one,
    or a process at work. A run that is damaged is kept, and one whose registry is not found from
    here. A run that a version names keeps two checkpoints: the one that it offers, which a
    promotion reads again, and its last, which `--resume` does.

    `adapter` leaves all runs but those of one name as they are, and lets only those count. A run
    that began less than `min_age` ago stays, and versions in `ignored_versions` keep none. Raises
    ConfigError for a negative `keep`, DamagedError for a registry that cannot be read: nothing is
    removed then.
    """
    if keep < 0:
        raise ConfigError(f"--keep {keep}: expected the number of runs to keep, 0 or more.")
    runs = runs if adapter is None else adapter.among(runs)
    newest = datetime.now(UTC) - min_age
    old = [run for run in runs[keep:] if run.started <= newest]
    named = _read_named_runs(old, adapter, ignored_versions)
    kept: dict[str, str] = {}
    removed: list[str] = []
    checkpoints: list[str] = []
    size = 0
    for run in old:
        reason = _why_kept(run, named)
        is_named = reason is not None and reason == named.get(str(run.path.resolve()))
        spare = _spare_checkpoints(run) if is_named else []
        freed = sum(map(size_on_disk, [run.path] if reason is None else spare))
        if not dry_run and (reason is None or spare):
            try:
                _remove(run, None if reason is None else spare)
            except ConfigError:
                reason, spare, freed = "a process works on it", [], 0
        size += freed
        checkpoints += map(str, spare)
        if reason is None:
            removed.append(str(run.path))
        else:
            kept[str(run.path)] = reason
    return PruneReport(tuple(removed), tuple(checkpoints), kept, size, dry_run)


def _remove(run: Run, checkpoints: list[Path] | None) -> None:
    """Remove checkpoints of a run, or with None the run; ConfigError where a process has its lock.

    Its configuration and lock go last: what was removed in part is a run without a verdict, which
    the next call removes.
    """
    with run.folder.locked():  # no process begins to work on it meanwhile
        for checkpoint in checkpoints or ():
            shutil.rmtree(checkpoint)
        if checkpoints is None:
            run.folder.manifest.unlink(missing_ok=True)
            for path in run.path.iterdir():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path not in (run.folder.config, run.folder.lock):
                    path.unlink()
            shutil.rmtree(run.path)


def _spare_checkpoints(run: Run) -> list[Path]:
    """The checkpoints of a run that has ended which nothing reads again."""
    if run.result is None:
        return []
    offered = checkpoint_path(run.folder.checkpoints, run.result.adapter_step)
    return [each for each in list_checkpoints(run.folder.checkpoints)[:-1] if each != offered]


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


def _read_named_runs(
    runs: list[Run], adapter: AdapterRuns | None, ignored_versions: Collection[str]
) -> dict[str, str]:
    """By run folder, which version of the runs' registries names it.

    Versions of the adapter that are ignored name none; another name may have the same.
    """
    paths = [run.config.registry.path for run in runs if run.config is not None]
    registries = {Path(path).resolve() for path in paths if path is not None}
    named: dict[str, str] = {}
    for registry in sorted(registries):
        for name in list_names(registry):
            with reading(registry, name) as (folder, ledger):
                # One whose folder is lost raises: it may be one of these runs that brings it back.
                there = {*registered_versions(folder), *ledger.standing}
                is_own = adapter == AdapterRuns(registry, name)
                for version in sorted(there - {*ignored_versions} if is_own else there):
                    said = f"version {version[:12]} of {name} names it"
                    verdicts = read_verdicts(folder, version, ledger)
                    named |= {each.facts.run_dir: said for each in verdicts if each.facts.run_dir}
    return named
