"""Removes old runs that nothing rests on, and the spare checkpoints of those that something does.

`nested-tune runs --prune` does, and housekeeping for one adapter. A run is known by the digest of
its adapter; folders move, names of folders repeat, and paths are for people.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from nested_core.errors import ConfigError, NestedTuneError
from nested_core.records.run_status import AdapterRuns, Run
from nested_core.registry import list_names
from nested_core.registry.judgements import read_verdicts
from nested_core.registry.link_and_views import reading
from nested_core.registry.versions import registered_versions
from nested_core.rooms.housekeeping.garbage_collection import DEFAULT_KEPT_VERSIONS
from nested_core.rooms.housekeeping.removal import find_reason_to_keep, size_on_disk
from nested_core.storage.adapter import read_adapter
from nested_core.storage.checkpoint_verification import checkpoint_path, list_checkpoints
from nested_core.storage.run_directory import DEFAULT_REGISTRY
from nested_core.text.value_format import format_bytes, format_count


@dataclass(frozen=True)
class KeptAmounts:
    """What housekeeping leaves of an adapter in any case: newest runs and versions, recent runs."""

    runs: int = 14
    days: float = 7.0
    versions: int = DEFAULT_KEPT_VERSIONS


@dataclass(frozen=True)
class PruneReport:
    """What was removed, or would be, and why each other old run was kept; paths as given.

    checkpoints: those that were removed of runs that stay.
    unregistered: runs that are kept because they passed the gate and no known registry names them.
    """

    removed: tuple[str, ...]
    checkpoints: tuple[str, ...]
    kept: dict[str, str]
    unregistered: tuple[str, ...]
    bytes: int
    unregistered_bytes: int
    is_dry_run: bool

    def describe(self) -> str:
        """Such as `3 runs and 8 spare checkpoints of others (63.2 MB)`."""
        spare = f" and {len(self.checkpoints)} spare checkpoints of others"
        return f"{len(self.removed)} runs{spare} ({format_bytes(self.bytes)})"

    def describe_unregistered(self) -> str | None:
        """How many runs that passed no registry names, and what removes them; None without any."""
        count = len(self.unregistered)
        if not count:
            return None
        size = format_bytes(self.unregistered_bytes)
        return (
            f"{format_count(count, 'run')} ({size}) passed the gate, and no known "
            f"registry names {'it' if count == 1 else 'them'}: kept. `nested-tune runs --prune "
            f"--keep N --unregistered` removes {'it' if count == 1 else 'them'}"
        )


def prune_runs(
    runs: Sequence[Run],
    *,
    keep: int,
    adapter: AdapterRuns | None = None,
    min_age: timedelta = timedelta(0),
    ignored_versions: Collection[str] = (),
    unregistered: bool = False,
    dry_run: bool = False,
) -> PruneReport:
    """Remove all runs but the `keep` first, which are the newest, and those that something needs.

    That is a version of a registry, one that waits for approval among them; a process at work; or a
    person: one who promoted the run elsewhere, keeps files in its folder, or has a link to it among
    the runs. A link itself is neither followed nor counted. A run that is damaged is kept, one
    whose registry is not found from here, and, unless `unregistered`, one that passed and that no
    registry which is known here names. A run that a version names keeps two checkpoints: the one
    that it offers, which a promotion reads again, and its last, which `--resume` does.

    `adapter` leaves all runs but those of one name as they are, and lets only those count. A run
    that began less than `min_age` ago stays, and versions in `ignored_versions` keep none. A run
    that cannot be removed is among those that were kept. Raises ConfigError for a negative `keep`,
    DamagedError for a registry that cannot be read: nothing is removed then.
    """
    if keep < 0:
        raise ConfigError(f"--keep {keep}: expected the number of runs to keep, 0 or more.")
    registries = _list_registries(runs, adapter)
    links = {run.path.resolve(): run.path for run in runs if run.path.is_symlink()}
    state = _read_state(registries)
    names = [*_read_names(registries, adapter, ignored_versions)]
    runs = runs if adapter is None else adapter.among(runs)
    newest = [run for run in runs if not run.path.is_symlink()][:keep]
    before = datetime.now(UTC) - min_age
    decisions: dict[str, _Decision] = {}
    for run in (run for run in runs if run not in newest and run.started <= before):
        try:
            decision = _decide(run, names, links, removes_unregistered=unregistered)
            if decision.paths and not dry_run:
                with run.folder.locked():  # nobody works on it or promotes it from here on
                    locked = Run(run.folder, has_ended=True)
                    if (now := _read_state(registries)) != state:
                        state, names = now, [*_read_names(registries, adapter, ignored_versions)]
                    decision = _decide(locked, names, links, removes_unregistered=unregistered)
                    _remove(locked, decision.paths)
        except (NestedTuneError, OSError) as error:
            decision = _Decision(f"it cannot be removed: {error}")
        decisions[str(run.path)] = decision
    passed = [path for path, decision in decisions.items() if decision.is_unregistered]
    return PruneReport(
        removed=tuple(path for path, decision in decisions.items() if decision.reason is None),
        checkpoints=tuple(
            str(path)
            for each in decisions.values()
            if each.reason is not None
            for path in each.paths
        ),
        kept={path: one.reason for path, one in decisions.items() if one.reason is not None},
        unregistered=tuple(passed),
        bytes=sum(decision.bytes for decision in decisions.values()),
        unregistered_bytes=sum(size_on_disk(Path(path)) for path in passed),
        is_dry_run=dry_run,
    )


@dataclass(frozen=True)
class _Decision:
    """What becomes of an old run.

    reason: why it stays; None if it goes.
    paths: the folders that go, of `bytes` together: the run, or spare checkpoints of one that is
        kept.
    is_unregistered: whether it stays because it passed and no registry is known to have it.
    """

    reason: str | None
    paths: tuple[Path, ...] = ()
    bytes: int = 0
    is_unregistered: bool = False

    @classmethod
    def to_remove(cls, paths: Sequence[Path], reason: str | None = None) -> _Decision:
        """These folders go, which have the size that they have now."""
        return cls(reason, tuple(paths), sum(map(size_on_disk, paths)))


def _decide(
    run: Run, names: Sequence[_Name], links: Mapping[Path, Path], *, removes_unregistered: bool
) -> _Decision:
    """Return whether an old run is removed, or why it is kept.

    names: all names of the known registries.
    links: links in other folders that lead to runs, by their targets.
    removes_unregistered: remove runs that passed the gate and that no registry names, too.
    """
    if run.state == "running":
        return _Decision("a process works on it")
    if run.state == "damaged" or run.promoted_to is None:
        return _Decision("damaged")
    obstacle = find_reason_to_keep(run.path, run.folder.is_own_file)
    if obstacle is None and (link := links.get(run.path.resolve())) is not None:
        obstacle = f"the link {link} leads to it"
    for name in names:
        if run.version in name.standing:
            reason = f"version {str(run.version)[:12]} of {name.name} names it"
            return _Decision.to_remove([] if obstacle else _spare_checkpoints(run), reason)
    if obstacle is not None:
        return _Decision(obstacle)
    adapter = run.folder.adapter
    if run.verdict and adapter.exists() and read_adapter(adapter).digest() != run.version:
        return _Decision("its adapter is not the one that was judged")
    kept = _ask_registries(run, names) if run.state == "verified" else None
    if kept is not None and not (kept.is_unregistered and removes_unregistered):
        return kept
    return _Decision.to_remove([run.path])


def _ask_registries(run: Run, names: Sequence[_Name]) -> _Decision | None:
    """Why a run that passed stays; None if each registry of it has a line that lets it go."""
    own = _list_own_registries(run)
    for registry, _ in own:
        if not registry.is_dir():
            return _Decision(f"its registry {registry} is not found from this folder")
    told = {
        (name.registry, name.name)
        for name in names
        if run.version in name.versions or (own and run.version in name.trials)
    }
    if told and told >= {(registry.resolve(), name) for registry, name in own}:
        return None
    return _Decision("it passed the gate, and no known registry names it", is_unregistered=True)


def _remove(run: Run, paths: Sequence[Path]) -> None:
    """Remove folders of a run, or the run itself, under its lock.

    Its configuration and lock go last: what was removed in part is a run without a verdict, which
    the next call removes.
    """
    if run.path in paths:
        run.folder.manifest.unlink(missing_ok=True)
        for path in run.path.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path not in (run.folder.config, run.folder.lock):
                path.unlink()
    for path in paths:
        shutil.rmtree(path)


def _spare_checkpoints(run: Run) -> list[Path]:
    """The checkpoints of a run that has ended which nothing reads again."""
    if run.result is None:
        return []
    offered = checkpoint_path(run.folder.checkpoints, run.result.adapter_step)
    return [each for each in list_checkpoints(run.folder.checkpoints)[:-1] if each != offered]


@dataclass(frozen=True)
class _Name:
    """What the history of a name says of runs.

    standing: the versions that are there, or were lost and may come back from a run.
    versions, trials: every version, and the adapter of every run that made none, that has a line.
    """

    registry: Path
    name: str
    standing: frozenset[str]
    versions: frozenset[str]
    trials: frozenset[str]


def _list_own_registries(run: Run) -> list[tuple[Path, str]]:
    """The registries that a run was registered in as far as it knows: configured, or by hand."""
    by_hand = [(Path(registry), name) for registry, name in run.promoted_to or ()]
    return [*filter(None, [run.configured_registry]), *by_hand]


def _list_registries(runs: Sequence[Run], adapter: AdapterRuns | None) -> list[Path]:
    """The registries that are known here: of all runs, of the adapter, and the default one."""
    paths = [path for run in runs for path, _ in _list_own_registries(run)]
    paths += [DEFAULT_REGISTRY, *([] if adapter is None else [adapter.registry])]
    return sorted({path.resolve() for path in paths})


def _read_state(registries: Sequence[Path]) -> list[tuple[Path, int, int]]:
    """What changes with any line or version of some registries: times and sizes of their files."""
    paths = [path for registry in registries for path in sorted(registry.glob("*/*"))]
    return [(path, path.lstat().st_mtime_ns, path.lstat().st_size) for path in paths]


def _read_names(
    registries: Sequence[Path], adapter: AdapterRuns | None, ignored_versions: Collection[str]
) -> Iterator[_Name]:
    """Yield the names of these registries with their versions.

    Raises DamagedError for a version that cannot be read.

    adapter, ignored_versions: versions of this adapter that do not count, as they are being
        removed. They count for other names.
    """
    for registry in registries:
        for name in list_names(registry):
            with reading(registry, name) as (folder, ledger):
                # One whose folder is lost raises: it may be one of these runs that brings it back.
                standing = {*registered_versions(folder), *ledger.by_version}
                if adapter == AdapterRuns(registry, name):
                    standing -= {*ignored_versions}
                for version in sorted(standing):
                    read_verdicts(folder, version, ledger)
            versions = frozenset(line.version for line in ledger.entries if line.version)
            trials = frozenset(line.adapter for line in ledger.entries if line.adapter)
            yield _Name(registry, name, frozenset(standing), versions, trials)
