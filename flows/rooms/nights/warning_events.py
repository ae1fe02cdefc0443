"""Events that warn before a night fails: an old champion, a full disk, a run that takes long.

They are emitted for as long as their reason lasts; automations.yaml tells a person once a day. One
is of a night alone: that its difference to the champion is out of line with the nights before it.
"""

from __future__ import annotations

import os
import platform
import shutil
import statistics
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from uuid import UUID

from prefect import runtime
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.events import emit_event

from nested_core.config.sections import RegistrySection
from nested_core.errors import NestedTuneError
from nested_core.records.loss_conclusion import MIN_MARGIN
from nested_core.records.outcome_names import ENDED_BEFORE_TRAINING
from nested_core.records.run_status import AdapterRuns, Run, list_runs
from nested_core.registry import read_champion_changes
from nested_core.storage.run_directory import DEFAULT_RUNS_FOLDER, RunDirectory
from nested_core.text.digest_format import shorten_digest
from nested_core.text.duration_format import format_duration
from nested_core.text.value_format import format_bytes
from tasks.events import adapter_resource, emit_adapter_event
from tasks.prefect_server import TAG, asking_server, flow_runs_in, named_resource, related_resource

LONG_RUN, DEFAULT_LONG_RUN = "NESTED_TUNE_LONG_RUN", "2"
LAST_RUNS = 5  # of a deployment, that a run's time is compared with
SHORTEST_LONG_RUN = timedelta(minutes=1)
SMALLEST_FREE_SHARE = 0.1
CHECKPOINTS_THAT_MUST_FIT = 3
LAST_NIGHTS, LEAST_NIGHTS = 14, 7  # that a night is compared with
# Of nights that chance alone tells apart 0.4 % are further from the median of 14, and 3 % from that
# of 7. With 3 deviations it would be 3 and 9 %.
USUAL_DEVIATIONS = 5.0
DEVIATION_OF_MAD = 1.4826  # of a normal distribution


def warn_of_old_champions(registry: Path, names: Iterable[str], nights: float) -> None:
    """Emit `adapter.stale` for each name whose champion is older than so many nights."""
    for name in names:
        with suppress(NestedTuneError):  # what is damaged is told by the flow that asks
            if message := describe_old_champion(registry, name, nights, datetime.now(UTC)):
                payload = {"message": message, "nights": nights}
                emit_event("adapter.stale", resource=adapter_resource(name), payload=payload)


def describe_old_champion(registry: Path, name: str, nights: float, now: datetime) -> str | None:
    """Return a sentence about a champion that is older than this number of nights; None if not."""
    changes = read_champion_changes(registry, name)
    if not changes or (version := changes[-1].version) is None:
        return None
    since = datetime.fromisoformat(changes[-1].time)
    if now - since <= timedelta(days=nights):
        return None
    return (
        f"{name} has had no new champion since {since:%d %b %Y}: {shorten_digest(version)} is "
        f"older than {nights:g} days. The list of runs has the outcome of each run."
    )


def warn_of_unusual_night(section: RegistrySection, run: RunDirectory) -> None:
    """Emit `adapter.unusual` if the run's loss less the champion's is unlike the last nights'.

    The last nights are those whose run folders still exist: housekeeping leaves 14.
    """
    if section.path is None or section.name is None or not DEFAULT_RUNS_FOLDER.is_dir():
        return
    with suppress(NestedTuneError, OSError):  # a damaged folder of another run: no warning then
        tonight = Run(run, has_ended=True)
        difference = tonight.loss_to_champion
        if difference is None:
            return
        others = [each for each in list_runs(DEFAULT_RUNS_FOLDER) if each.name != tonight.name]
        nights = AdapterRuns.of(Path(section.path), section.name).among(others)
        before = (night.loss_to_champion for night in nights if night.started <= tonight.started)
        last = list(islice((value for value in before if value is not None), LAST_NIGHTS))
        message = describe_unusual_night(difference, last, tonight.loss_unit)
        if message is not None:
            emit_adapter_event("unusual", section.name, {"message": message})


def describe_unusual_night(difference: float, last: Sequence[float], unit: str) -> str | None:
    """Return a sentence about a night that is unlike the last ones; None if it is like them.

    A night is unlike them if its difference is further from their median than five robust standard
    deviations, and than the gate's smallest margin.

    difference: the night's loss less that of the champion before it, in this unit.
    last: the same of the last nights.
    """
    if len(last) < LEAST_NIGHTS:
        return None
    median = statistics.median(last)
    deviation = DEVIATION_OF_MAD * statistics.median(abs(each - median) for each in last)
    bound = max(USUAL_DEVIATIONS * deviation, MIN_MARGIN)
    if abs(difference - median) <= bound:
        return None
    return (
        f"Tonight's loss less the champion's is {difference:+.3g} {unit}. The median of the "
        f"last {len(last)} nights is {median:+.3g}, and more than {bound:.3g} from it is unusual. "
        f"Compare tonight's data with that of the nights before."
    )


def warn_of_full_disks(folders: Iterable[Path]) -> None:
    """Emit `disk.nearly_full` for each disk of these folders that is nearly full."""
    checkpoint_bytes = measure_newest_checkpoint(DEFAULT_RUNS_FOLDER)
    seen: set[int] = set()
    for folder in folders:
        with suppress(OSError):  # the folder does not exist yet
            disk = folder.stat().st_dev
            if disk in seen:
                continue
            seen.add(disk)
            total, _, free = shutil.disk_usage(folder)
            if message := describe_full_disk(total, free, checkpoint_bytes):
                host, path = platform.node(), str(folder.resolve())
                emit_event(
                    "disk.nearly_full",
                    resource=named_resource(f"disk.{host}.{disk}", f"{path} on {host}"),
                    payload={"message": message, "free_bytes": free},
                )


def describe_full_disk(total: int, free: int, checkpoint_bytes: int | None) -> str | None:
    """Return a sentence about a disk that is nearly full; None if it is not.

    Nearly full is a disk with less than 10 % free, or without room for three checkpoints.

    total, free: bytes.
    """
    free_share = free / total if total else 0.0
    has_room = checkpoint_bytes is None or free >= CHECKPOINTS_THAT_MUST_FIT * checkpoint_bytes
    if free_share >= SMALLEST_FREE_SHARE and has_room:
        return None
    sentence = f"{format_bytes(free)} of {format_bytes(total)} are free ({free_share:.0%})"
    if not has_room and checkpoint_bytes is not None:
        sentence += f", and a checkpoint takes {format_bytes(checkpoint_bytes)}"
    return f"{sentence}. Remove old runs, or versions with `nested-tune gc`."


def measure_newest_checkpoint(runs: Path) -> int | None:
    """Return the bytes of the newest checkpoint of all runs in a folder; None without any.

    Another run may prune its checkpoints meanwhile: the newest that is still whole is measured.
    """
    for _, folder in sorted(_iterate_checkpoints(runs), reverse=True):
        with suppress(OSError):
            return sum(file.stat().st_size for file in folder.iterdir())
    return None


def _iterate_checkpoints(runs: Path) -> Iterator[tuple[float, Path]]:
    """Yield when each checkpoint was written, and its folder."""
    for pattern in ("*/checkpoints/step-*", "*/arms/*/checkpoints/step-*"):  # the latter of sweeps
        for folder in runs.glob(pattern):
            with suppress(OSError):
                yield folder.stat().st_mtime, folder


def warn_of_long_runs() -> list[str]:
    """Emit `flow-run.long` for each active run that takes far longer than the last ones did.

    Returns the names of the runs that do.
    """
    long_runs: list[str] = []
    running = flow_runs_in([StateType.RUNNING], tags={"all_": [TAG]})
    times = float(os.environ.get(LONG_RUN) or DEFAULT_LONG_RUN)
    with asking_server("runs that take long are not looked for") as client:
        for run in client.read_flow_runs(flow_run_filter=running):
            if str(run.id) == str(runtime.flow_run.id) or run.deployment_id is None:
                continue
            last = _read_last_run_times(client, run.deployment_id)
            if message := describe_long_run(run.name, run.estimated_run_time, last, times):
                emit_event(
                    "flow-run.long",
                    resource=named_resource(f"long-run.{run.id}", run.name),
                    related=[related_resource(f"prefect.flow-run.{run.id}", "flow-run")],
                    payload={"message": message},
                )
                long_runs.append(run.name)
    return long_runs


def describe_long_run(
    name: str, run_time: timedelta, last: Sequence[timedelta], times: float
) -> str | None:
    """Return a sentence about a run that takes more than `times` the longest of the last ones."""
    if not last or run_time < max(times * max(last), SHORTEST_LONG_RUN):
        return None
    taken, longest = (format_duration(each.total_seconds()) for each in (run_time, max(last)))
    return (
        f"{name} has been running for {taken}; the longest of the last {len(last)} took {longest}. "
        f"Other runs wait for its place in the pool. Look at its log, and cancel it where it does "
        f"nothing: a checkpoint is kept."
    )


def _read_last_run_times(client: SyncPrefectClient, deployment: UUID) -> list[timedelta]:
    """Return how long the last runs of a deployment took, of those that came to train."""
    ended = flow_runs_in(
        [StateType.COMPLETED, StateType.FAILED], deployment_id={"any_": [deployment]}
    )
    runs = client.read_flow_runs(
        flow_run_filter=ended, sort=FlowRunSort.END_TIME_DESC, limit=4 * LAST_RUNS
    )
    trained = [each for each in runs if each.state_name not in ENDED_BEFORE_TRAINING]
    return [each.total_run_time for each in trained[:LAST_RUNS]]
