"""Which planted faults the tests find: `python -m tests.planted`, which goes on where it was ended.

Each fault of faults.py is planted alone in a copy of the tree. First the tests of its folder run
up to the first failure; if none fails, all of `make test`; then the slow tests. Results are kept in
build/planted, a line a fault.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.planted.faults import FAULTS
from tests.planted.planting import Fault, plant

ROOT = Path(__file__).resolve().parents[2]
FAST = "not slow and not reliability and not production and not real"
SLOW = "slow and not reliability and not production"
SEED = 27  # of the order in which the faults are planted
MINUTES = 30.0  # of one run of tests


@dataclass(frozen=True)
class Result:
    """What became of a fault: the stage that found it (or "missed"), and the test that failed."""

    number: int
    key: str
    stage: str
    test: str
    seconds: float


def key_of(fault: Fault) -> str:
    """What identifies a fault in the results."""
    return hashlib.sha256("\0".join((fault.path, fault.old, fault.new)).encode()).hexdigest()[:16]


def copy_tree(target: Path) -> None:
    """Copy the files that git knows, as they are now."""
    shutil.rmtree(target, ignore_errors=True)
    words = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)


def run_tests(copy: Path, *words: str) -> tuple[int, str]:
    """Run pytest in the copy; its exit code, and the first test that failed."""
    command = [sys.executable, "-m", "pytest", "--dist", "worksteal", "-q", *words]
    variables = os.environ | {"PYTHONPATH": str(copy), "CI": "1"}
    try:
        done = subprocess.run(
            command,
            cwd=copy,
            env=variables,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60 * MINUTES,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return 1, f"the tests did not end within {MINUTES:.0f} minutes"
    failed = re.search(r"^(?:FAILED|ERROR) (tests/.+?)(?: - .*)?$", done.stdout, re.MULTILINE)
    return done.returncode, failed[1] if failed else done.stdout[-300:].strip()


def judge(number: int, copy: Path) -> Result:
    """Plant a fault, and run tests until one fails."""
    fault, began = FAULTS[number], time.monotonic()
    before = plant(fault, copy)
    own = [f"tests/{part}/{fault.room}" for part in ("core", "rooms", ".")]
    near = [folder for folder in own if (copy / folder).is_dir()]
    stages = [("make test", [*near, "-m", FAST], "0")] if near else []
    stages += [("make test", ["-m", FAST], "auto"), ("make test-all", ["-m", SLOW], "auto")]
    stage, test = "missed", ""
    try:
        for name, words, processes in stages:
            code, failed = run_tests(copy, "-x", "-n", processes, *words)
            if code not in (0, 5):  # 5: none was selected
                stage, test = name, failed
                break
    finally:
        (copy / fault.path).write_text(before, encoding="utf-8")
    return Result(number, key_of(fault), stage, test, time.monotonic() - began)


def main(words: list[str]) -> int:
    """Judge the faults that are missing, and say which were found where."""
    parser = argparse.ArgumentParser(prog="python -m tests.planted", description=__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "planted")
    arguments = parser.parse_args(words)
    folder: Path = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    copy, path = folder / "copy", folder / "faults.jsonl"
    copy_tree(copy)
    results: dict[str, Result] = {}
    if path.exists():
        rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        results = {row["key"]: Result(**row) for row in rows}
    order = random.Random(SEED).sample(range(len(FAULTS)), len(FAULTS))
    for number in order:
        if key_of(FAULTS[number]) in results:
            continue
        result = judge(number, copy)
        results[result.key] = result
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(result)) + "\n")
        print(f"{number} {FAULTS[number].path}: {result.stage} {result.test}", flush=True)
    found = [results[key_of(fault)] for fault in FAULTS]
    by_test = sum(result.stage.endswith("make test") for result in found)
    print(f"make test finds {by_test} of {len(found)}; missed:")
    for fault, result in zip(FAULTS, found, strict=True):
        if not result.stage.endswith("make test"):
            print(f"  {fault.path} ({fault.kind}): {result.stage} {result.test}\n    {fault.new}")
    return 0 if by_test >= 0.9 * len(found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
