"""kill -9 at random moments of every command that writes, and what must stand afterwards.

A scenario is six commands, as a person gives them: train (which registers and promotes), three
promotions of other runs, gc, rollback. Each is killed some times, at a moment drawn from as long as
it takes undisturbed, and given again until it ends; the end is compared with that of the scenario
that nobody killed.
Commands are processes forked from one that has loaded what they import.
"""

from __future__ import annotations

import atexit
import json
import os
import random
import re
import shutil
import signal
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from nested_core import backend, registry, seams
from nested_core.storage.checkpoint import read_checkpoint
from nested_core.storage.checkpoint_verification import list_checkpoints
from nested_core.storage.manifest import MANIFEST_NAME
from nested_core.storage.run_directory import RunDirectory
from tests.example import DATA, SPEEDS, write_config
from tests.registry_care import audit

NAME = "geography"
MOST_KILLS = 8  # of one command before it is left to end
LONGEST_COMMAND = 300.0  # seconds; a command that takes longer hangs
SETTINGS: dict[str, Any] = {
    "iters": 24,
    "save_every": 4,
    "steps_per_report": 2,
    "steps_per_eval": 8,
    "val_batches": 2,
    "grad_accumulation_steps": 2,
    "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.1},
    "training": {"max_grad_norm": 1.0, "keep_checkpoints": 1000},
}
# Speeds in metrics.jsonl are a clock's, and so are hashes of it and the page that shows them; all
# else is compared byte by byte, but the steps that processes went on from.
NOT_COMPARED = ("run/metrics.jsonl", "run/run.lock", "run/MANIFEST.json", "run/report.html")
HASHES_OF_METRICS = ("run/result.json", "run/gate.json")
RESUMPTIONS = re.compile(rb'"first_step": *[0-9]+|"resumed_at": *\[[^]]*\]')
METRICS_HASH = re.compile(rb'"(metrics|result\.json)": *"[0-9a-f]{64}"')


@dataclass(frozen=True)
class Command:
    """One command of the scenario, and the phase that a kill of it counts for."""

    phase: str
    arguments: tuple[str, ...]


@dataclass
class KillCounts:
    """How often each phase was killed, and how often a command ended before its kill came."""

    kills: Counter[str] = field(default_factory=Counter)
    ended_before: Counter[str] = field(default_factory=Counter)
    scenarios: int = 0


class KillSoak:
    """The scenario undisturbed, then again and again with kills."""

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._dice = random.Random(seed)
        self._seconds: dict[str, float] = {}
        self._expected: dict[str, bytes] = {}
        self.counts = KillCounts()

    def prepare(self) -> None:
        """Train the runs that are promoted, and go through the scenario without a kill.

        The first run of all compiles the kernels, and is not timed.
        """
        for number, name in enumerate(("b", "c", "d"), start=1):
            config = write_config(self._folder / f"{name}.yaml", seed=number, **SETTINGS)
            self._finish("train", "-c", str(config), "--run-dir", str(self._folder / name))
        write_config(
            self._folder / "a.yaml",
            **SETTINGS,
            registry={"path": "registry", "name": NAME, "promote": "always"},
        )
        scenario = self._new_scenario("undisturbed")
        for command in self._commands():
            began = time.monotonic()
            self._finish(*command.arguments, cwd=scenario)
            self._seconds[command.phase] = time.monotonic() - began
        self._expected = comparable(scenario)
        assert len(registry.list_versions(scenario / "registry", NAME)) < 4, "gc removed nothing"

    def run(self, kills: int) -> None:
        """Go through scenarios until so many processes have been killed."""
        while self.counts.kills.total() < kills:
            scenario = self._new_scenario(f"killed-{self.counts.scenarios}")
            for command in self._commands():
                most = min(self._dice.randint(1, MOST_KILLS), kills - self.counts.kills.total())
                self._run_with_kills(command, scenario, most)
            self._compare(scenario)
            shutil.rmtree(scenario)
            self.counts.scenarios += 1

    def describe(self) -> str:
        """The figures, a line each."""
        counts = self.counts
        by_phase = ", ".join(f"{phase} {count}" for phase, count in sorted(counts.kills.items()))
        return (
            f"{counts.kills.total()} kills in {counts.scenarios} scenarios ({by_phase}); "
            f"{counts.ended_before.total()} commands ended before their kill; every scenario "
            f"ended with the bytes of the undisturbed one"
        )

    def _new_scenario(self, name: str) -> Path:
        scenario = self._folder / name
        (scenario / "registry").mkdir(parents=True)
        return scenario

    def _commands(self) -> list[Command]:
        def promote(run: str) -> tuple[str, ...]:
            return ("promote", str(self._folder / run), "--registry", "registry", "--name", NAME)

        here = ("--registry", "registry")
        return [
            Command("train", ("train", "-c", str(self._folder / "a.yaml"), "--run-dir", "run")),
            Command("promote b", promote("b")),
            Command("promote c", promote("c")),
            Command("promote d", promote("d")),
            Command("gc", ("gc", NAME, *here, "--keep", "1")),
            Command("rollback", ("rollback", NAME, *here)),
        ]

    def _finish(self, *arguments: str, cwd: Path | None = None) -> None:
        output = self._folder / "output.txt"
        code = wait(start(arguments, cwd or self._folder, output), LONGEST_COMMAND)
        assert code == 0, f"{' '.join(arguments)} ended with {code}:\n{output.read_text()}"

    def _run_with_kills(self, command: Command, scenario: Path, most: int) -> None:
        """Give a command until it ends by itself; the first `most` processes may be killed."""
        for number in range(most + 1):
            arguments = next_arguments(command, scenario)
            if arguments is None:
                return
            before = champion_and_changes(scenario)
            checkpoints = checkpoint_manifests(scenario / "run")
            if number == most:
                self._finish(*arguments, cwd=scenario)
                return
            output = self._folder / "output.txt"
            began = time.monotonic()
            process = start(arguments, scenario, output)
            code = wait(process, self._dice.uniform(0, self._seconds[command.phase]))
            if code is not None:
                assert code == 0, f"{arguments} ended with {code}:\n{output.read_text()}"
                self.counts.ended_before[command.phase] += 1
                shorter = min(time.monotonic() - began, self._seconds[command.phase])
                self._seconds[command.phase] = shorter
                return
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            self.counts.kills[command.phase] += 1
            assert checkpoints.items() <= checkpoint_manifests(scenario / "run").items()
            check_registry(scenario, before)

    def _compare(self, scenario: Path) -> None:
        """Every file that is compared, with the same bytes as in the undisturbed scenario."""
        actual = comparable(scenario)
        different = [
            name
            for name in sorted(self._expected.keys() | actual.keys())
            if self._expected.get(name) != actual.get(name)
        ]
        told = {name: (self._expected.get(name), actual.get(name)) for name in different[:1]}
        assert different == [], f"{scenario}: {different}, expected and found: {str(told)[:2000]}"
        report = audit(scenario / "registry", NAME)
        assert report.findings == (), report.findings


class ReplayKillSoak(KillSoak):
    """One command: a night that goes on from the champion and replays what that was trained on."""

    def prepare(self) -> None:
        """Train the first night, and the second without a kill."""
        rows = (DATA / "train.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        target = {"path": "registry", "name": NAME, "promote": "always"}
        continual = {"from": "champion", "replay": {"fraction": 0.3}}
        for name, own in {"first": rows[:20], "second": rows[20:]}.items():
            data = self._folder / f"{name}-data"
            data.mkdir()
            (data / "train.jsonl").write_text("".join(own), encoding="utf-8")
            shutil.copy(DATA / "valid.jsonl", data)
            settings = SETTINGS | {"data": str(data), "registry": target, "continual": continual}
            write_config(self._folder / f"{name}.yaml", **settings)
        config = str(self._folder / "first.yaml")
        self._finish("train", "-c", config, "--run-dir", str(self._folder / "first"))
        scenario = self._new_scenario("undisturbed")
        began = time.monotonic()
        self._finish(*self._commands()[0].arguments, cwd=scenario)
        self._seconds["train"] = time.monotonic() - began
        self._expected = comparable(scenario)
        assert (scenario / "run" / "replay.jsonl").read_bytes().count(b"\n") == 14

    def _new_scenario(self, name: str) -> Path:
        scenario = self._folder / name
        shutil.copytree(self._folder / "registry", scenario / "registry", symlinks=True)
        return scenario

    def _commands(self) -> list[Command]:
        config = str(self._folder / "second.yaml")
        return [Command("train", ("train", "-c", config, "--run-dir", "run"))]


def next_arguments(command: Command, scenario: Path) -> tuple[str, ...] | None:
    """What a person gives after a kill: the same, or `--resume`; None for a rollback that is done.

    A kill between making the run's folder and its first file leaves nothing to resume. A rollback
    without a version goes one back each time, so its effect is looked at first.
    """
    if command.phase == "train" and RunDirectory(scenario / "run").is_nonempty():
        return (*command.arguments, "--resume")
    if command.phase == "rollback":
        _, changes = champion_and_changes(scenario)
        if changes[-1][0] == "rollback":
            return None
    return command.arguments


def champion_and_changes(scenario: Path) -> tuple[str | None, list[tuple[str, str]]]:
    """The champion, and action and version of each change that took place.

    A change that a kill cut short is a line of the history before the link moves; the next writer
    finishes it.
    """
    root = scenario / "registry"
    if not (root / NAME).exists():
        return None, []
    champion = registry.read_champion(root, NAME)
    changes: list[tuple[str, str]] = []
    for entry in registry.history(root, NAME):
        if entry["action"] in ("promote", "rollback"):
            changes.append((entry["action"], entry["version"]))
    if changes and changes[-1][1] != champion:  # no writer has come since
        changes.pop()
    return champion, changes


def check_registry(scenario: Path, before: tuple[str | None, list[tuple[str, str]]]) -> None:
    """After a kill the champion is the old or the new one, and its version is whole."""
    champion, changes = champion_and_changes(scenario)
    old_champion, old_changes = before
    assert changes[: len(old_changes)] == old_changes, (old_changes, changes)
    assert len(changes) <= len(old_changes) + 1, (old_changes, changes)
    assert champion in {old_champion, *(version for _, version in changes[len(old_changes) :])}
    if champion is not None:
        folder = scenario / "registry" / NAME / "versions" / champion
        assert {path.name for path in folder.iterdir()} >= {MANIFEST_NAME, "adapters.safetensors"}


def checkpoint_manifests(run_dir: Path) -> dict[str, bytes]:
    """The manifest of each checkpoint that stands; every checkpoint is verified."""
    manifests = {}
    checkpoints = RunDirectory(run_dir).checkpoints
    for path in list_checkpoints(checkpoints) if checkpoints.exists() else []:
        read_checkpoint(path)
        manifests[path.name] = (path / MANIFEST_NAME).read_bytes()
    return manifests


def comparable(scenario: Path) -> dict[str, bytes]:
    """What a finished scenario left, without what a clock or a process decides."""
    found = {}
    run = scenario / "run"
    for path in sorted(run.rglob("*")):
        name = str(path.relative_to(scenario))
        if path.is_file() and name not in NOT_COMPARED:
            content = path.read_bytes().replace(bytes(scenario), b"SCENARIO")
            is_hashing = name in HASHES_OF_METRICS
            found[name] = METRICS_HASH.sub(b"", content) if is_hashing else content
            if name == "run/plan.json":
                found[name] = RESUMPTIONS.sub(b"", content)
    lines = (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    kept = [{k: v for k, v in record.items() if k not in SPEEDS} for record in records]
    found["metrics"] = json.dumps(kept).encode()
    champion, changes = champion_and_changes(scenario)
    versions = sorted(registry.list_versions(scenario / "registry", NAME))
    found["registry"] = json.dumps([champion, changes, versions]).encode()
    return found


def start(arguments: tuple[str, ...], cwd: Path, output: Path) -> int:
    """Fork a process that is `nested-tune` with these arguments; return its id."""
    sys.stdout.flush()
    sys.stderr.flush()
    process = os.fork()
    if process == 0:
        become_command(arguments, cwd, output)
    return process


def become_command(arguments: tuple[str, ...], cwd: Path, output: Path) -> NoReturn:
    """Be the command, from here to the end of the process."""
    code = 1
    try:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.chdir(cwd)
        for folder in seams.load_all(backend.KernelFolder):
            folder.use()
        from flows.cli import main

        code = main(arguments)
        atexit._run_exitfuncs()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(process: int, seconds: float) -> int | None:
    """The exit code of a process, or None if it still runs after so many seconds."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        left = deadline - time.monotonic()
        if left <= 0:
            return None
        time.sleep(min(left, 0.002))
