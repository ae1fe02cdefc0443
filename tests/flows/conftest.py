"""A real Prefect server for the flows, and the real command line as a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch
from uuid import UUID, uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
from prefect.client.schemas.objects import State, TaskRun
from prefect.events.worker import EventsWorker
from prefect.exceptions import ObjectNotFound
from prefect.logging.handlers import APILogWorker
from prefect.settings import PREFECT_API_URL, PREFECT_FLOWS_HEARTBEAT_FREQUENCY, temporary_settings

from flows import cli
from flows.process import local_server
from flows.process.local_server import LocalServer
from flows.reconcile import reconcile
from tasks.prefect_server import TAG
from tests.child_output import note_output
from tests.example import write_config
from tests.fork_server import python
from tests.waiting import SECONDS

build_parser_once = cache(cli.build_parser)  # of all commands, with a flag for each key
ROOT = Path(__file__).resolve().parents[2]
PATIENT_BROKER = "tests.flows.patient_messaging"
PROGRAM = Path(sys.executable).with_name("nested-tune")
MAX_LINES = 14


@contextlib.contextmanager
def serving_prefect(home: Path) -> Iterator[None]:
    """A server with a database of its own; without heartbeats, which cost a second a flow run.

    Its database has its tables already, and no test asks for the types of Prefect's blocks: to look
    after both takes three of the nine seconds of CPU time of a start.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_HOME", str(home))
        patch.setenv("PREFECT_SERVER_EVENTS_MESSAGING_BROKER", PATIENT_BROKER)
        patch.setenv("PREFECT_API_DATABASE_MIGRATE_ON_START", "false")
        patch.setenv("PREFECT_API_BLOCKS_REGISTER_ON_START", "false")
        patch.setenv("PYTHONPATH", str(ROOT))
        server = LocalServer()
    try:
        server.serve()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local_server, "SECONDS_TO_START", SECONDS)
            server.wait()
        settings = {PREFECT_API_URL: server.url, PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None}
        with temporary_settings(settings):
            yield
            drain_prefect()
    finally:
        server.stop()


@pytest.fixture(autouse=True)
def _prefect_is_quiet(own_random_state: None) -> Iterator[None]:
    """End Prefect's threads after each test, and undo what it drew from the global `random`.

    Runs get their names from it, and so does each ping of the connection that events are sent by,
    every twenty seconds, in a thread that would outlive the test: hypothesis sees that as a test
    that draws from two sources.
    """
    yield
    drain_prefect()


def drain_prefect() -> None:
    """Have Prefect's threads send what they hold back, and end them."""
    APILogWorker.drain_all()
    EventsWorker.drain_all()


def flow_run_id(state: State[Any]) -> UUID:
    """The flow run that ended in a state."""
    assert state.state_details.flow_run_id is not None
    return state.state_details.flow_run_id


def task_runs(state: State[Any], *names: str) -> dict[str, TaskRun]:
    """The task runs of a flow run by their names' first word, in order, once all are recorded.

    The server takes task runs from events, some time after the flow has ended; `names` are awaited.
    """
    wanted = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id(state)]))
    deadline = time.monotonic() + SECONDS
    while True:
        with get_client(sync_client=True) as client:
            found = client.read_task_runs(flow_run_filter=wanted)
        found.sort(key=lambda run: str(run.start_time))
        runs = {run.name.split(" ")[0]: run for run in found}
        is_final = all(run.state is not None and run.state.is_final() for run in found)
        if (is_final and set(names) <= set(runs)) or time.monotonic() > deadline:
            return runs
        time.sleep(0.1)


@pytest.fixture
def new_name() -> str:
    """A name that nothing on the shared server has, should this test run there again."""
    return f"adapter-{uuid4().hex[:12]}"


@contextlib.contextmanager
def naming(registry: Path, name: str) -> Iterator[UUID]:
    """A deployment that names a registry for an adapter, as `nested-tune deploy` makes several."""
    with get_client(sync_client=True) as client:
        config = {"registry": str(registry), "names": [name]}
        made = client.create_deployment(
            client.create_flow(reconcile),
            f"{name}-hourly",
            parameters={"config": config},
            tags=[TAG],
        )
        yield made
        with contextlib.suppress(ObjectNotFound):
            client.delete_deployment(made)


@dataclass(frozen=True)
class Ended:
    """A process that has ended: its exit code and what it wrote."""

    code: int
    stdout: str
    stderr: str

    @property
    def document(self) -> Any:
        """Standard output, which must be one JSON document."""
        return json.loads(self.stdout)

    def message(self) -> str:
        """The error that a person reads: no traceback, few lines, on standard error alone."""
        assert "Traceback" not in self.stderr
        assert self.stdout == ""
        text = self.stderr[self.stderr.rindex("nested-tune: ") :]
        assert len(text.splitlines()) <= MAX_LINES
        return text


def start(*arguments: object, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    """Start `nested-tune` with these arguments, outside the project's folder."""
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    command = [str(PROGRAM), *map(str, arguments)]
    return subprocess.Popen(command, cwd=cwd, env=os.environ | environment, **pipes)


def ended(process: subprocess.Popen[str], seconds: float = SECONDS) -> Ended:
    """Wait for a process; it is killed where it takes longer."""
    try:
        stdout, stderr = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    note_output(process.args, process.returncode, stdout, stderr)
    return Ended(process.returncode, stdout, stderr)


def completed(*arguments: object, cwd: Path, **environment: str) -> Ended:
    """Run `nested-tune` with these arguments to its end, in a process that need not start anew."""
    done = python(PROGRAM, *arguments, cwd=cwd, env=os.environ | environment, timeout=SECONDS)
    return Ended(done.returncode, done.stdout, done.stderr)


def called(*arguments: object, cwd: Path) -> Ended:
    """Call the command line in this process: where a process of its own is not the subject."""
    stdout, stderr = io.StringIO(), io.StringIO()
    with (
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(stdout),
        patch.object(sys, "__stdout__", stdout),  # where --json writes its document
        patch.object(cli, "build_parser", lambda command: build_parser_once()),
        contextlib.redirect_stderr(stderr),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("default", UserWarning)  # the command shows them
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as end:  # of --version and --help
            code = int(end.code or 0)
    words = " ".join(map(str, arguments))
    note_output(f"nested-tune {words}", code, stdout.getvalue(), stderr.getvalue())
    return Ended(code, stdout.getvalue(), stderr.getvalue())


@pytest.fixture
def nested_tune(tmp_path: Path) -> Callable[..., Ended]:
    """Run the command line to its end in the test's folder; in a process if it has variables."""

    def run(*arguments: object, **environment: str) -> Ended:
        if environment:
            return completed(*arguments, cwd=tmp_path, **environment)
        return called(*arguments, cwd=tmp_path)

    return run


@dataclass(frozen=True)
class CommandRun:
    """A run that `nested-tune train --json` made, with its configuration file."""

    folder: Path
    ended: Ended

    @property
    def run_dir(self) -> Path:
        return self.folder / "run"

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"


def make_command_run(folder: Path) -> CommandRun:
    """The run of the fixture `command_run`: all layers of the example, eight steps."""
    write_config(folder / "config.yaml", num_layers=-1, iters=8)
    words = ("train", "-c", "config.yaml", "--run-dir", "run", "--json")
    return CommandRun(folder, called(*words, cwd=folder))
