"""Random trees of runs and registries: prune, housekeeping and gc remove nothing that is needed."""

from __future__ import annotations

import os
import shutil
import subprocess
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nested_core import registry as core
from nested_core.records.promoted_to import add_promoted_to
from nested_core.records.run_status import list_runs
from nested_core.records.verdict import Reason
from nested_core.registry.data_store import read_lineage
from nested_core.rooms.housekeeping.garbage_collection import collect_garbage
from nested_core.rooms.housekeeping.housekeeping import tidy_up
from nested_core.rooms.housekeeping.run_removal import KeptAmounts, prune_runs
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.user_cache import CACHE_VARIABLE
from tests.builders.registering import promote, register
from tests.core.registry.conftest import no_time_to_decide, write_run
from tests.runs import add_checkpoints, finished_run

__all__ = ["no_time_to_decide"]
NAME = "geo"
COUNT = 4
CONFIGURED = ("registry", "registry", "registry", "second", None)
EARLIER = 2  # champions from before the runs
LATER = 3  # versions that become no champion
FIRST_LATER = EARLIER + COUNT
NEEDED_CHECKPOINTS = ("step-0000004", "step-0000008")  # the one that is offered, and the last


def can_mount() -> bool:
    """Whether this process may bind a folder to another place."""
    with TemporaryDirectory() as folder:
        command = ["mount", "--bind", folder, folder]
        is_done = (
            not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode
        )
        if not is_done:
            subprocess.run(["umount", folder], check=True)
        return not is_done


MOUNTS = ("mount",) if can_mount() else ()
STAYS_WHOLE = ("file", "deep file", "link", "at work", "linked to", *MOUNTS)
EXTRAS = ("nothing", "copied", "noted version", *STAYS_WHOLE)


@dataclass(frozen=True)
class PlannedRun:
    """A run to be made: what its configuration names, where it was registered, what lies there.

    registered: whether its own registry has it. by_hand: whether one outside of the project has.
    """

    has_passed: bool
    configured: str | None
    registered: bool
    by_hand: bool
    extra: str


@dataclass(frozen=True)
class Step:
    """A command, or that the project is moved.

    after_nights: whether nights made versions before, and no champion.
    """

    action: str
    keep: int
    unregistered: bool
    after_nights: bool


RUNS = st.builds(
    PlannedRun,
    st.integers(0, 3).map(bool),
    st.sampled_from(CONFIGURED),
    st.integers(0, 3).map(bool),
    st.booleans(),
    st.sampled_from(EXTRAS),
)
PLANS = st.lists(RUNS, min_size=COUNT, max_size=COUNT)
STEPS = st.builds(
    Step,
    st.sampled_from(["prune", "prune", "housekeeping", "gc", "gc", "move"]),
    st.sampled_from([3, 0, 1, 2, 3]),
    st.booleans(),
    st.booleans(),
)


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """Runs to copy: adapters that are registered, and the run of each; their digests.

    Each adapter was trained from the one before it.
    """
    folder = tmp_path_factory.mktemp("pool")
    digests: list[str] = []
    section = {"path": "REGISTRY", "name": NAME}
    for number in range(FIRST_LATER + LATER):
        initial = digests[-1] if digests else "0" * 64
        written = write_run(folder / f"written-{number}", number, initial=initial)
        digests.append(register(written, folder / "scratch", NAME, {}))
        if EARLIER <= number < FIRST_LATER:
            run = finished_run(folder / f"run-{number}", trained=digests[-1], registry=section)
            add_checkpoints(run, 2, 4, 6, 8, offered=4)
    reasons = [Reason("loss_regressed", "worse")]
    rejected = finished_run(folder / "rejected", reasons=reasons, registry=section)
    add_checkpoints(rejected, 2, 4, 6, 8, offered=4)
    return folder, digests


class World:
    """A project of runs and registries, and what lies outside of it."""

    def __init__(self, folder: Path, pool: tuple[Path, list[str]], cleanup: ExitStack) -> None:
        self.folder = folder
        self.pool, self.digests = pool
        self.cleanup = cleanup
        self.outside = folder / "outside"
        self.project = folder / "project"
        self.plans: dict[str, PlannedRun] = {}
        self.versions: dict[str, str] = {}  # by the name of a run, the digest of its adapter
        (self.project / "runs").mkdir(parents=True)
        self.outside.mkdir()
        os.chdir(self.project)
        for number in range(EARLIER):
            for registry in ("registry", "second"):
                self.register(number, Path(registry))

    def register(self, number: int, registry: Path) -> None:
        """Register and promote an adapter; of one whose parent is there, with the parent."""
        parent = self.digests[number - 1] if number else None
        if parent is None or not (registry / NAME / "versions" / parent).exists():
            parent = None
        written = self.pool / f"written-{number}"
        version = register(written, registry, NAME, {"config": {}, "parent": parent})
        promote(registry, NAME, version, by="ann")

    def add_run(self, number: int, plan: PlannedRun) -> None:
        """Make a run, older than those that were made before it."""
        name = f"202611{20 - number:02}T020000Z-0000000{number}"
        path = Path("runs", name)
        shutil.copytree(self.pool / (f"run-{number}" if plan.has_passed else "rejected"), path)
        run = RunDirectory(path)
        text = run.config.read_text()
        named = f"path: {plan.configured}\n  name: {NAME}"
        if plan.configured is None:
            named = "path: null\n  name: null"
        assert f"path: REGISTRY\n  name: {NAME}" in text
        run.config.write_text(text.replace(f"path: REGISTRY\n  name: {NAME}", named))
        self.plans[name] = plan
        if plan.has_passed:
            self.versions[name] = self.digests[number]
            promoted_to = [self.outside / f"registry-{number}"] if plan.by_hand else []
            if plan.registered and plan.configured is not None:
                self.register(number, Path(plan.configured))
            elif plan.registered:
                promoted_to.append(Path("registry"))
            for registry in promoted_to:
                self.register(number, registry)
                add_promoted_to(run.promoted_to, registry, NAME)  # as `promote` notes it
        self.add_extra(run, plan.extra)

    def add_extra(self, run: RunDirectory, extra: str) -> None:
        """What a person, or another process, has there."""
        disk = self.outside / run.path.name
        if extra == "file":
            (run.path / "notes.txt").write_text("mine")
        elif extra == "deep file":
            (run.checkpoints / "step-0000002" / "notes.txt").write_text("mine")
        elif extra == "link":
            run.checkpoints.rename(disk)
            run.checkpoints.symlink_to(disk)
        elif extra == "linked to":
            Path("runs", f"best-{run.path.name}").symlink_to(run.path.name)
        elif extra == "copied":
            shutil.copytree(run.path, f"runs/copy-of-{run.path.name}")
            self.versions |= {f"copy-of-{name}": one for name, one in self.versions.items()}
        elif extra == "noted version":
            for version in Path().glob(f"*/geo/versions/{self.versions.get(run.path.name)}"):
                version.chmod(0o755)
                (version / "notes.txt").write_text("mine")
        elif extra == "at work":
            self.cleanup.enter_context(run.locked())
        elif extra == "mount":
            shutil.copytree(run.checkpoints, disk)
            subprocess.run(["mount", "--bind", disk, run.checkpoints], check=True)
            self.cleanup.callback(self.unmount, run.path.name)

    def unmount(self, name: str) -> None:
        """End a mount, wherever the project lies by now."""
        subprocess.run(["umount", self.project / "runs" / name / "checkpoints"], check=True)

    def move(self) -> None:
        """Move the project, as a second host has it elsewhere."""
        self.project = self.project.rename(self.folder / f"moved-{self.project.name}")
        os.chdir(self.project)

    def do(self, step: Step) -> None:
        """Do a step, and look at all that was needed before it."""
        if step.action == "move":
            return self.move()
        for number in range(FIRST_LATER, FIRST_LATER + LATER) if step.after_nights else ():
            register(self.pool / f"written-{number}", Path("registry"), NAME, {})
        registry = Path("registry")
        needed = self.needed_of_runs(step)
        outside = files_of(self.outside)
        notes = [*Path().glob("*/geo/versions/*/notes.txt")]
        lineage = core_lineage(registry)[: step.keep]
        runs = list_runs(Path("runs"))
        if step.action == "gc":
            collect_garbage(registry, NAME, by="ann", keep=step.keep)
        elif step.action == "prune":
            prune_runs(runs, keep=step.keep, unregistered=step.unregistered)
        else:
            kept = KeptAmounts(runs=step.keep, days=0, versions=step.keep)
            tidy_up(registry, NAME, runs, kept)
        assert files_of(self.outside) == outside
        assert all(path.exists() for path in notes)
        assert {*lineage} <= {*core.list_versions(registry, NAME)}
        left = files_of(Path("runs"))
        assert not needed - left, f"{step} removed {sorted(needed - left)[:3]}"
        if step.action == "prune":
            self.require_no_rejected_run(step.keep)
        return None

    def needed_of_runs(self, step: Step) -> set[str]:
        """Files in runs/ that a version, a person or another process needs."""
        registered = {*Path().glob("*/geo/versions/*")}
        if step.action == "housekeeping":  # gc comes first, and is looked at on its own
            registry = Path("registry")
            plan = collect_garbage(registry, NAME, by="ann", keep=step.keep, dry_run=True)
            registered -= {registry / NAME / "versions" / version for version in plan.collected}
        here = {path.name for path in registered}
        standing = here | {path.name for path in self.outside.glob("*/geo/versions/*")}
        needed = {name for name in files_of(Path("runs")) if "/" not in name}  # links
        for path in (path for path in Path("runs").iterdir() if not path.is_symlink()):
            made = self.plans[path.name.removeprefix("copy-of-")]
            if made.extra in STAYS_WHOLE:
                needed |= files_of(path, path.name)
                continue
            version = self.versions.get(path.name)
            if version is None:
                continue
            is_told = made.registered or self.is_in_a_history(version)
            if version in standing or not (is_told or is_asked(step)):
                needed |= {
                    name
                    for name in files_of(path, path.name)
                    if "checkpoints" not in name or any(one in name for one in NEEDED_CHECKPOINTS)
                }
        return needed

    def is_in_a_history(self, version: str) -> bool:
        """Whether any registry of the project has a line about a version."""
        return any(version in path.read_text() for path in Path().glob("*/geo/history.jsonl"))

    def require_no_rejected_run(self, keep: int) -> None:
        """Expect that of rejected runs that nobody needs only the newest are left."""
        runs = [run for run in list_runs(Path("runs")) if not run.path.is_symlink()][keep:]
        plans = [self.plans[run.path.name.removeprefix("copy-of-")] for run in runs]
        assert not [plan for plan in plans if not plan.has_passed and plan.extra not in STAYS_WHOLE]


def is_asked(step: Step) -> bool:
    """Whether a person asks for runs that no registry names."""
    return step.action == "prune" and step.unregistered


def core_lineage(registry: Path) -> list[str]:
    """The champion and its ancestors, by the files of the versions."""
    champion = core.read_champion(registry, NAME)
    lineage = [] if champion is None else read_lineage(registry, NAME, champion)
    return [one for one in lineage if (registry / NAME / "versions" / one).is_dir()]


def files_of(folder: Path, prefix: str = "") -> set[str]:
    """The files below a folder, by their paths in it; links are not followed."""
    found = set()
    for place, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(place, name))]
        for name in (*names, *links):
            if name not in ("run.lock", "stop.request", ".lock"):
                found.add(os.path.join(prefix, os.path.relpath(os.path.join(place, name), folder)))
    return found


def do_all(
    folder: Path, pool: tuple[Path, list[str]], plans: list[PlannedRun], steps: list[Step]
) -> None:
    """Make a world of these runs, and take the steps in it."""
    with (
        TemporaryDirectory(dir=folder) as own,
        pytest.MonkeyPatch.context() as patch,
        ExitStack() as cleanup,
    ):
        patch.setenv(CACHE_VARIABLE, str(Path(own, "cache")))
        patch.chdir(own)
        world = World(Path(own), pool, cleanup)
        for number, plan in enumerate(plans, EARLIER):
            world.add_run(number, plan)
        for step in steps:
            world.do(step)


@pytest.mark.slow("trains and registers several runs")
@pytest.mark.usefixtures("no_time_to_decide")
@given(PLANS, st.lists(STEPS, min_size=3, max_size=5))
@settings(max_examples=10)
def test_nothing_that_a_version_a_person_or_another_registry_needs_is_removed(
    pool: tuple[Path, list[str]], plans: list[PlannedRun], steps: list[Step]
) -> None:
    do_all(pool[0].parent, pool, plans, steps)


@pytest.mark.reliability
@pytest.mark.usefixtures("no_time_to_decide")
@given(PLANS, st.lists(STEPS, min_size=3, max_size=8))
@settings(max_examples=500)
def test_nothing_that_is_needed_is_removed_in_500_draws(pool, plans, steps) -> None:
    do_all(pool[0].parent, pool, plans, steps)
