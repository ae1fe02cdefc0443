"""What is left works without a room: `python -m tests.without_rooms [--all | --digest | ROOM ...]`.

The checkout is copied, the rooms are deleted in the copy with their commands, flows and tests, and
the pages that are made from the code are made again. Then the help, both demos, a run in Prefect
and the tests of what is left have to end as they should. Without arguments each room is deleted
alone, one after the other; `--all` deletes all of them together. `--digest` is for CI: all of them
together, and one that the commit's digest chooses, without which the tests are not run.
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
TESTS = "not slow and not reliability and not production and not real"
COMMAND = ("-P", "-m", "flows.cli")
RUN = ("run", "-c", "examples/geography.yaml", "--run-dir", "build/without-rooms")
STEPS: tuple[tuple[str, tuple[str, ...], int], ...] = (
    *((f"docs.{page}", ("-m", f"docs.{page}"), 0) for page in PAGES),
    ("nested-tune --help", (*COMMAND, "--help"), 0),
    ("demo", (*COMMAND, "demo", "--out", "build/demo"), 0),
    ("demo --break-training", (*COMMAND, "demo", "--break-training", "--out", "build/broken"), 4),
    ("run", (*COMMAND, *RUN), 0),
    ("tests", ("-m", "pytest", "-q", "-n", "auto", "--dist", "worksteal", "-m", TESTS), 0),
)


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


def check_without(rooms: Sequence[str], root: Path = ROOT, *, with_tests: bool = True) -> list[str]:
    """Do every step in a copy without these rooms; the names of those that did not end right.

    with_tests: whether the tests of what is left, the last step, are run too.
    """
    failed = []
    with tempfile.TemporaryDirectory(prefix="without-rooms-") as folder:
        copy = Path(folder)
        copy_without(rooms, root, copy)
        environment = os.environ | {"PYTHONPATH": str(copy)}
        for name, words, expected in STEPS if with_tests else STEPS[:-1]:
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
        failed = check_without(every)
        return int(bool(failed + check_without([choose_room(every, ROOT)], with_tests=False)))
    sets = [every] if options.all else [[room] for room in options.rooms or every]
    return int(any([check_without(rooms) for rooms in sets]))


if __name__ == "__main__":
    sys.exit(main())
