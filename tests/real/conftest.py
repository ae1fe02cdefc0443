"""Commands on SmolLM2-135M-Instruct, as processes, with what each took: `make real-test`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = Path(sys.executable).with_name("nested-tune")
MODEL = ROOT / "build" / "SmolLM2-135M-Instruct"
COSTS = pytest.StashKey[list[str]]()


@dataclass(frozen=True)
class Command:
    """A command of nested-tune that has ended, with its exit code and what it wrote."""

    words: tuple[str, ...]
    code: int
    output: str
    errors: str

    @property
    def document(self) -> Any:
        """Standard output of a command with --json."""
        assert self.code == 0, self.errors
        return json.loads(self.output)


@dataclass
class Project:
    """A folder in which commands are given one after the other, on rows of the example.

    costs: a line a command: seconds, processor seconds and peak memory of it and its children.
    """

    folder: Path
    costs: list[str] = field(default_factory=list)
    started: dict[int, float] = field(default_factory=dict)

    def run(self, *words: object, code: int = 0) -> Command:
        """Give a command, wait for its end, and require its exit code."""
        process = self.start(*words)
        done = self.end(process, *words)
        assert done.code == code, f"{words}: exit {done.code}\n{done.output}\n{done.errors}"
        return done

    def start(self, *words: object) -> subprocess.Popen[bytes]:
        """Start a command, with its output in files of this folder."""
        command = [str(PROGRAM), *map(str, words)]
        with (self.folder / "out").open("wb") as out, (self.folder / "err").open("wb") as err:
            process = subprocess.Popen(command, cwd=self.folder, stdout=out, stderr=err)
        self.started[process.pid] = time.monotonic()
        return process

    def end(self, process: subprocess.Popen[bytes], *words: object) -> Command:
        """Wait for a command, and note what it took."""
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
        seconds = time.monotonic() - self.started.pop(process.pid)
        busy, peak = usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit / 1e9
        command = " ".join(map(str, words))
        self.costs.append(f"{seconds:6.0f} s {busy:6.0f} s of CPU {peak:5.2f} GB  {command}")
        out, err = ((self.folder / name).read_text() for name in ("out", "err"))
        return Command(tuple(map(str, words)), process.returncode, out, err)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Project:
    """A new folder for the commands of a file of tests."""
    if not MODEL.is_dir():
        pytest.fail(f"{MODEL} is missing: make real-model", pytrace=False)
    made = Project(tmp_path_factory.mktemp("real"))
    request.config.stash.setdefault(COSTS, []).append(request.path.name)
    made.costs = request.config.stash[COSTS]
    return made


@pytest.hookimpl(wrapper=True)
def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> Iterator[None]:
    """Print what each command took."""
    yield
    if lines := config.stash.get(COSTS, []):
        terminalreporter.section("what each command took")
        for line in lines:
            terminalreporter.write_line(line)
