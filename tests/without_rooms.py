"""What is left works without a room: `python -m tests.without_rooms [--all | --digest | ROOM ...]`.

The checkout is copied, the rooms are deleted in the copy with their commands, flows and tests, and
the pages that are made from the code are made again. Then the help, the collection of the tests,
both demos, a run in Prefect and the tests of what is left have to end as they should. Without
arguments each room is deleted alone, one after the other; `--all` deletes all of them together.
`--digest` is for CI: all of them together, with the tests of TESTS_IN_CI, and one that the commit's
digest chooses, without which no test is run.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("nested_core/rooms", "flows/rooms", "tests/rooms")
PAGES = ("make_configuration", "make_python", "make_command_line", "make_environment")
MARKED = "not slow and not reliability and not production and not real"
# What asks rooms for something: the rest of the core's tests reach none of them.
CORE_IN_CI = (
    "config",
    "data",
    "gate",
    "kernels/test_optimized_model.py",
    "pipeline",
    "records",
    "registry/test_policy.py",
    "report",
    "training/test_memory_plan.py",
)
FLOWS_IN_CI = ("cli_*", "mistakes", "told_twice", "help_pages", "flags", "form", "one_wording")
TESTS_IN_CI = (
    *(f"tests/core/{name}" for name in CORE_IN_CI),
    *(f"tests/flows/test_{name}.py" for name in FLOWS_IN_CI),
    "tests/test_*.py",
)
COMMAND = ("-P", "-m", "flows.cli")
RUN = ("run", "-c", "examples/geography.yaml", "--run-dir", "build/without-rooms")
PYTEST = ("-m", "pytest", "-q")
STEPS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    *((f"docs.{page}", ("-m", f"docs.{page}"), 0) for page in PAGES),
    ("nested-tune --help", (*COMMAND, "--help"), 0),
    ("collection", (*PYTEST, "--collect-only", "-n0"), 0),
    ("demo", (*COMMAND, "demo", "--out", "build/demo"), 0),
    ("demo --break-training", (*COMMAND, "demo", "--break-training", "--out", "build/broken"), 4),
    ("run", (*COMMAND, *RUN), 0),
)
TESTS = (*PYTEST, "-n", "auto", "--dist", "worksteal", "-m", MARKED)


def list_rooms(root: Path) -> list[str]:
    """The rooms of a checkout."""
    return sorted(path.parent.name for path in (root / PLACES[0]).glob("*/ROOM.toml"))


def copy_without(rooms: Sequence[str], root: Path, copy: Path) -> None:
    """Copy what git tracks, but for the folders of these rooms."""
    listed = subprocess.run(
        ("git", "ls-files", "-z"), cwd=root, capture_output=True, text=True, check=True
    )
    left_out = tuple(f"{place}/{room}/" for place in PLACES for room in rooms)
    for name in filter(None, listed.stdout.split("\0")):
        if not name.startswith(left_out) and (root / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(root / name, copy / name)
    subprocess.run(("git", "init", "-q"), cwd=copy, check=True)
    subprocess.run(("git", "add", "-A"), cwd=copy, check=True)


def choose_room(rooms: Sequence[str], root: Path) -> str:
    """The room that the digest of the checked out commit chooses, another with each commit."""
    command = ("git", "rev-parse", "HEAD")
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    return rooms[int(done.stdout, 16) % len(rooms)]


def check_without(
    rooms: Sequence[str], root: Path = ROOT, *, tests: Sequence[str] | None = ()
) -> list[str]:
    """Do every step in a copy without these rooms; the names of those that did not end right.

    tests: patterns of the test files that are run, the last step; none are all that are left, and
        None runs no test.
    """
    failed = []
    with tempfile.TemporaryDirectory(prefix="without-rooms-") as folder:
        copy = Path(folder)
        copy.chmod(0o755)  # tests that root runs as another user read it too
        copy_without(rooms, root, copy)
        environment = os.environ | {"PYTHONPATH": str(copy)}
        steps = list(STEPS)
        if tests is not None:
            files = [str(path) for pattern in tests for path in sorted(copy.glob(pattern))]
            steps.append(("tests", (*TESTS, *files), 0))
        for name, words, expected in steps:
            started = time.monotonic()
            done = subprocess.run(
                (sys.executable, *words),
                cwd=copy,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                check=False,
            )
            seconds = time.monotonic() - started
            line = f"without {', '.join(rooms)}: {name}: {done.returncode}, {seconds:.0f} s"
            print(line, flush=True)
            if done.returncode != expected:
                failed.append(name)
                print(done.stdout[-4000:])
    return failed


def main() -> int:
    """Do what the command line says; 1 where something failed."""
    parser = argparse.ArgumentParser(prog="python -m tests.without_rooms", description=__doc__)
    parser.add_argument("rooms", nargs="*", metavar="ROOM", help="deleted alone, each")
    parser.add_argument("--all", action="store_true", help="delete all rooms together")
    parser.add_argument("--digest", action="store_true", help="what CI runs")
    options = parser.parse_args()
    every = list_rooms(ROOT)
    if unknown := set(options.rooms) - set(every):
        parser.error(f"no room: {', '.join(sorted(unknown))}. There are {', '.join(every)}.")
    if options.digest:
        failed = check_without(every, tests=TESTS_IN_CI)
        return int(bool(failed + check_without([choose_room(every, ROOT)], tests=None)))
    sets = [every] if options.all else [[room] for room in options.rooms or every]
    return int(any([check_without(rooms) for rooms in sets]))


if __name__ == "__main__":
    sys.exit(main())
