"""All that runs in production, on this machine: database, server with auth, workers, home."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import httpx
import yaml
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterDeploymentId, FlowRunFilterId
from prefect.client.schemas.objects import FlowRun, State, StateType
from prefect.client.schemas.responses import SetStateStatus
from prefect.deployments import run_deployment
from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_URL, temporary_settings

from flows.process.environment import packaged_folder
from tests.example import DATA, MODEL, example_settings
from tests.production.hosts import Host
from tests.production.postgresql import Cluster
from tests.production.processes import command_of, end, free_port, processes_with, start_logged

ROOT = Path(__file__).resolve().parents[2]
AUTH = "admin:only-in-tests"
TOKEN = "hf_only_in_tests"  # what a worker has in its environment
NAME = "geography"
LONGEST_RUN = 400.0  # on a machine that others use, and which compiles its kernels first
# Seconds from the death of a process until its run is Crashed: 300 without a heartbeat, 300 of
# looking again, and what a loaded machine takes. Those that were seen are in benchmarks/faults.md.
DEAD_WITHIN = 900
PREFECT = (sys.executable, "-m", "prefect")
NESTED_TUNE = str(Path(sys.executable).with_name("nested-tune"))
# Training that takes seconds, and passes the gate.
SMALL: dict[str, Any] = {"iters": 12, "steps_per_report": 2, "steps_per_eval": 6, "save_every": 2}


@dataclass
class Stack:
    """The processes, and a client's view of them."""

    folder: Path
    database: Cluster
    port: int = field(default_factory=free_port)
    address: str = "127.0.0.1"  # where the server listens
    server: subprocess.Popen[bytes] | None = None
    workers: dict[str, subprocess.Popen[bytes]] = field(default_factory=dict)
    hosts: dict[str, Host] = field(default_factory=dict)  # of workers that do not run here

    @property
    def home(self) -> Path:
        """Where the flows run: NESTED_TUNE_HOME."""
        return self.folder / "home"

    @property
    def registry(self) -> Path:
        return self.home / "registry"

    @property
    def url(self) -> str:
        return f"http://{self.address}:{self.port}/api"

    @property
    def environment(self) -> dict[str, str]:
        """The shipped settings, with this test's port, secrets and folders."""
        lines = (packaged_folder("deployments") / "settings.env").read_text().splitlines()
        values = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
        return values | {
            "PREFECT_API_URL": self.url,
            "PREFECT_API_AUTH_STRING": AUTH,
            "PREFECT_SERVER_API_AUTH_STRING": AUTH,
            "PREFECT_SERVER_API_PORT": str(self.port),
            "PREFECT_SERVER_CORS_ALLOWED_ORIGINS": self.url.removesuffix("/api"),
            "PREFECT_SERVER_DATABASE_CONNECTION_URL": self.database.url,
            "PREFECT_HOME": str(self.folder / "prefect"),
            "NESTED_TUNE_HOME": str(self.home),
            "HF_TOKEN": TOKEN,
            "PYTHONPATH": os.pathsep.join([".", str(ROOT), os.environ.get("PYTHONPATH", "")]),
        }

    def start_server(self) -> None:
        command = [*PREFECT, "server", "start", "--host", self.address, "--port", str(self.port)]
        log = self.folder / "server.log"
        self.server = start_logged(command, log, self.folder, self.environment)
        deadline = time.monotonic() + 150
        while not self.is_healthy():
            assert self.server.poll() is None, log.read_text()[-2000:]
            assert time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.3)

    def is_healthy(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health", timeout=5).status_code == 200
        except httpx.HTTPError:
            return False

    def kill_server(self) -> None:
        assert self.server is not None
        os.killpg(self.server.pid, signal.SIGKILL)
        self.server.wait()

    def start_worker(
        self, pool: str, *flags: str, name: str | None = None, **environment: str
    ) -> None:
        """Start a worker of a pool, known here by its name, else by the pool's."""
        name = name or pool
        known_as = f"{name}-{time.time():.0f}"
        command = [*PREFECT, "worker", "start", "--pool", pool, "--name", known_as, *flags]
        if name in self.hosts:
            command = self.hosts[name].words("env", "-C", str(self.home), *command)
        log = self.folder / f"worker-{name}.log"
        self.workers[name] = start_logged(command, log, self.home, self.environment | environment)

    def start(self, *flags: str) -> None:
        """Database and server, with everything deployed; no worker yet."""
        self.prepare_home()
        self.database.create()
        self.database.start()
        self.start_server()
        deployed = self.nested_tune("deploy", "-c", "small.yaml", *flags)
        assert deployed.returncode == 0, deployed.stderr + self.logs()

    def prepare_home(self) -> None:
        """The example's model and data, copied: a link would lead out of the allowed roots.

        Beside them are a person's modules of our packages' names, which Python finds first.
        """
        for source in (MODEL, DATA):
            shutil.copytree(source, self.home / "examples" / source.name)
        (self.home / "flows").mkdir()
        for module in ("flows/__init__.py", "tasks.py"):
            (self.home / module).write_text("raise RuntimeError('not what a flow should import')\n")
        settings = example_settings(**SMALL)
        settings |= {"model": f"examples/{MODEL.name}", "data": f"examples/{DATA.name}"}
        settings["registry"] = {"path": "registry", "name": NAME, "promote": "always"}
        (self.home / "small.yaml").write_text(yaml.safe_dump(settings))

    def nested_tune(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command at home, as the person who keeps this up would give it."""
        return subprocess.run(
            [NESTED_TUNE, *arguments],
            cwd=self.home,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )

    @contextmanager
    def connected(self) -> Iterator[SyncPrefectClient]:
        """A client of this server; what Prefect does inside the block goes there too."""
        here = {PREFECT_API_URL: self.url, PREFECT_API_AUTH_STRING: AUTH}
        with temporary_settings(updates=here), get_client(sync_client=True) as client:
            yield client

    def submit(self, deployment: str, *, due: datetime | None = None, **changes: Any) -> UUID:
        """Start a run of a deployment with these keys of its configuration changed.

        `due` is when the run was to begin, for its name; it begins at once.
        """
        with self.connected() as client:
            there = client.read_deployment_by_name(deployment)
            values = {"config": there.parameters.get("config", {}) | changes}
            run: Any = run_deployment(
                deployment, parameters=values, scheduled_time=due, timeout=0, as_subflow=False
            )
        return UUID(str(run.id))

    def flow_run(self, run_id: UUID) -> FlowRun:
        with self.connected() as client:
            return client.read_flow_run(run_id)

    def wait(self, run_id: UUID, *names: str, seconds: float = LONGEST_RUN) -> FlowRun:
        """Wait until a run is in a state of one of these names, or ended where none is given."""
        deadline = time.monotonic() + seconds
        while True:
            run = self.flow_run(run_id)
            if run.state_name in names or (not names and run.state and run.state.is_final()):
                return run
            assert time.monotonic() < deadline, f"{run.state}\n{self.logs()}"
            time.sleep(0.5)

    def runs_of(self, deployment: str) -> list[FlowRun]:
        with self.connected() as client:
            there = client.read_deployment_by_name(deployment).id
            wanted = FlowRunFilter(deployment_id=FlowRunFilterDeploymentId(any_=[there]))
            found: list[FlowRun] = client.read_flow_runs(flow_run_filter=wanted)
        return found

    def is_running(self, run_id: UUID, task: str) -> bool:
        """Whether a task of this name, which others follow in its run's name, is under way."""
        with self.connected() as client:
            wanted = FlowRunFilter(id=FlowRunFilterId(any_=[run_id]))
            found = client.read_task_runs(flow_run_filter=wanted)
        return any(r.name.split()[0] == task and r.state_name == "Running" for r in found)

    def processes_of(self, run_id: UUID) -> list[int]:
        """Every process that a worker started for a run."""
        return processes_with(f"PREFECT__FLOW_RUN_ID={run_id}")

    def flow_process(self, run_id: UUID) -> int:
        """The one of them that runs the flow."""
        found: int = wait_for(lambda: self.engine_processes(run_id))[-1]
        return found

    def flow_parent(self, run_id: UUID) -> int:
        """The one of them that the worker started: the parent of what trains."""
        found: int = wait_for(lambda: self.engine_processes(run_id))[0]
        return found

    def engine_processes(self, run_id: UUID) -> list[int]:
        """Parent and flow process of a run, in this order, as far as they live."""
        return [p for p in self.processes_of(run_id) if "prefect.engine" in command_of(p)]

    def cancel(self, run_id: UUID) -> None:
        """What `prefect flow-run cancel` and the button ask the server for.

        Not by the command: importing Prefect takes it longer than a short training lasts.
        """
        with self.connected() as client:
            answer = client.set_flow_run_state(run_id, State(type=StateType.CANCELLING))
        assert answer.status is SetStateStatus.ACCEPT, answer

    def retry(self, run_id: UUID) -> None:
        """What `prefect flow-run retry` and the button do."""
        self.prefect("flow-run", "retry", str(run_id))

    def prefect(self, *arguments: str) -> str:
        """Run one of Prefect's own commands, which must succeed; return what it prints."""
        done = subprocess.run(
            [*PREFECT, *arguments],
            cwd=self.home,
            env=os.environ | self.environment,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def logs(self) -> str:
        return "\n".join(f"{p.name}: {p.read_text()[-1500:]}" for p in self.folder.glob("*.log"))

    def stop(self, *, keeps_database: bool = False) -> None:
        """End everything that was started: workers as their unit does, with SIGKILL."""
        for worker in self.workers.values():
            worker.kill()
            worker.wait()
        if self.server is not None and self.server.poll() is None:
            end(self.server)
        for orphan in processes_with(f"NESTED_TUNE_HOME={self.home}"):
            os.kill(orphan, signal.SIGKILL)
        if keeps_database:
            self.database.stop()
        else:
            self.database.remove()


def wait_for(look: Callable[[], Any], seconds: float = 90) -> Any:
    """What `look` sees, once it sees something."""
    deadline = time.monotonic() + seconds
    while not (seen := look()):
        assert time.monotonic() < deadline
        time.sleep(0.2)
    return seen
