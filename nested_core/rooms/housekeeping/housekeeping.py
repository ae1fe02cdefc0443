"""Housekeeping of one adapter: versions, runs, checkpoints and cached data that nothing needs.

What is removed and why the rest stays is decided where it is decided for `nested-tune gc` and
`nested-tune runs --prune`. Here they are done together, for one name, and measured.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

from nested_core.data.dataset_loading import dataset_cache
from nested_core.measure.answers.answer_cache import answer_cache
from nested_core.records.run_status import AdapterRuns, Run
from nested_core.rooms.housekeeping.garbage_collection import GarbageReport, collect_garbage
from nested_core.rooms.housekeeping.removal import size_on_disk
from nested_core.rooms.housekeeping.run_removal import KeptAmounts, PruneReport, prune_runs
from nested_core.text.value_format import format_bytes

AUTHOR = "housekeeping"  # in the history, beside a version that was removed


@dataclass(frozen=True)
class HousekeepingReport:
    """What was removed, or would be.

    runs: None if the folder of runs is not there.
    cached: data sets and answers that nobody used for a month, of all adapters.
    before, after: bytes of the adapter's runs, of its folder in the registry, and of those caches;
        of a dry run `after` is without the examples of the registry's data store that would go.
    """

    runs: PruneReport | None
    versions: GarbageReport
    cached: tuple[str, ...]
    before: int
    after: int

    def describe(self) -> str:
        """One sentence: bytes before and after, and what was removed."""
        runs = "no folder of runs here" if self.runs is None else self.runs.describe()
        unregistered = None if self.runs is None else self.runs.describe_unregistered()
        versions = f"{len(self.versions.collected)} versions ({format_bytes(self.versions.bytes)})"
        return (
            f"{format_bytes(self.before)} before, {format_bytes(self.after)} after; "
            f"{'would be removed' if self.versions.is_dry_run else 'removed'}: {runs}, {versions}, "
            f"{self.versions.rows} stored examples, {len(self.cached)} cached data sets and answers"
            f"{'' if unregistered is None else f'. {unregistered}'}"
        )


def tidy_up(
    registry: Path, name: str, runs: list[Run] | None, kept: KeptAmounts, *, dry_run: bool = False
) -> HousekeepingReport:
    """Remove of one adapter what nothing needs, and of the caches what nobody used for a month.

    registry, name: the adapter. runs: the runs of a folder, newest first, which may be of other
    adapters too; None if there is no such folder. A dry run removes nothing, and says what would
    be. Raises ConfigError for an unknown name and DamagedError for a registry that cannot be read:
    no run is removed then.
    """
    adapter = AdapterRuns.of(registry, name)
    caches = (answer_cache(), dataset_cache())
    folders = [
        *(run.path for run in adapter.among(runs or ())),
        registry / name,
        *(each.folder for each in caches),
    ]
    before = sum(map(size_on_disk, folders))
    versions = collect_garbage(registry, name, by=AUTHOR, keep=kept.versions, dry_run=dry_run)
    pruned = None
    if runs is not None:
        pruned = prune_runs(
            runs,
            keep=kept.runs,
            adapter=adapter,
            min_age=timedelta(days=kept.days),
            ignored_versions=versions.collected,  # in a dry run they are there yet
            dry_run=dry_run,
        )
    unused = [entry for each in caches for entry in each.list_unused()]
    freed = versions.bytes + sum(map(size_on_disk, unused)) + (pruned.bytes if pruned else 0)
    for each in () if dry_run else caches:
        each.remove_unused()
    return HousekeepingReport(
        runs=pruned,
        versions=versions,
        cached=tuple(map(str, unused)),
        before=before,
        after=before - freed if dry_run else sum(map(size_on_disk, folders)),
    )
