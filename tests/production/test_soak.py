"""Hundreds of tiny runs through the queue in one go: each one accounted for, none stuck.

SOAK_RUNS says how many (`make soak RUNS=10` for a quick look); the figures are printed (`-s`).
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect.client.schemas.objects import TERMINAL_STATES, FlowRun, StateType
from prefect.states import Scheduled

from nested_core import registry as core
from tests.production.postgresql import Cluster
from tests.production.processes import processes_with, seconds_of_children
from tests.production.stack import NAME, Stack

RUNS = int(os.environ.get("SOAK_RUNS", "500"))
REJECTED_ONE_IN = 25  # the gate is given a bound that no training meets
WORKERS = ("device-0", "device-1")
SECONDS_A_RUN = 60
SECONDS_BETWEEN_LOOKS = 5.0
LINES_EVERY = 60.0
# Four steps: each of the tiers [1, 2, 4] is updated at the last of them.
TINY: dict[str, Any] = {"iters": 4, "steps_per_report": 4, "steps_per_eval": 4, "save_every": 4}
PAGE = 200
JUDGED_AGAIN = "the champion changed while the gate was at work: running it once more"
ASKED_EARLY = "the database system is starting up"  # what pg_isready hears while it waits
# Two of the server's recorders met: the one that lost tries again, and says "discarding event" only
# where that fails too (prefect/server/services/task_run_recorder.py, record_bulk_task_run_events).
TRIED_AGAIN = 'duplicate key value violates unique constraint "pk_task_run"'

pytestmark = [
    pytest.mark.production,
    pytest.mark.soak,
    pytest.mark.timeout(600 + SECONDS_A_RUN * RUNS),
]


@pytest.fixture
def stack(tmp_path: Path, binaries: Path) -> Iterator[Stack]:
    """A stack of two devices, each with a worker and a lock of its own; no worker is started."""
    made = Stack(tmp_path, Cluster(binaries))
    try:
        made.start()
        made.prefect("work-pool", "set-concurrency-limit", "mlx-gpu", str(len(WORKERS)))
        yield made
    finally:
        made.stop()


def is_to_be_rejected(index: int) -> bool:
    return index % REJECTED_ONE_IN == REJECTED_ONE_IN - 1


def schedule_all(stack: Stack) -> list[UUID]:
    """Every run, scheduled for now; each has a seed of its own, and so an adapter of its own."""
    with stack.connected() as client:
        there = client.read_deployment_by_name(f"finetune/{NAME}-manual")
        client.update_deployment(there.id, _limit(len(WORKERS)))
        found = []
        for index in range(RUNS):
            config = there.parameters["config"] | TINY | {"seed": index}
            if is_to_be_rejected(index):
                config |= {"gate": {"min_relative_change": 1e6}}
            run = client.create_flow_run_from_deployment(
                there.id, parameters={"config": config}, state=Scheduled(), name=f"soak {index:03d}"
            )
            found.append(run.id)
    return found


def start_workers(stack: Stack) -> None:
    """One for each device, and so one run at a time in each; both share this machine's cores."""
    for name in WORKERS:
        device = {"NESTED_TUNE_DEVICE_LOCK": f"{stack.folder.name}-{name}"}
        one_core = {"OPENBLAS_NUM_THREADS": "1"}
        stack.start_worker("mlx-gpu", "--limit", "1", name=name, **device, **one_core)
    stack.start_worker("cpu")


def flow_runs(stack: Stack, deployment: str) -> list[FlowRun]:
    """Every run of a deployment, page by page."""
    with stack.connected() as client:
        there = client.read_deployment_by_name(deployment).id
        wanted = {"deployments": {"id": {"any_": [str(there)]}}, "limit": PAGE, "sort": "ID_DESC"}
        found: list[FlowRun] = []
        while len(found) % PAGE == 0:
            page = client.request("POST", "/flow_runs/filter", json=wanted | {"offset": len(found)})
            runs = [FlowRun.model_validate(each) for each in page.json()]
            found += runs
            if not runs:
                break
    return found


def count_ended(stack: Stack, deployment: str) -> int:
    """How many runs of a deployment have ended; counted by the server, which is cheap for it."""
    with stack.connected() as client:
        wanted = {
            "deployments": {"id": {"any_": [str(client.read_deployment_by_name(deployment).id)]}},
            "flow_runs": {"state": {"type": {"any_": [state.value for state in TERMINAL_STATES]}}},
        }
        return int(client.request("POST", "/flow_runs/count", json=wanted).json())


def wait_for_all(stack: Stack, deployment: str, count: int, seconds: float) -> list[FlowRun]:
    """The runs of a deployment once `count` of them have ended, saying now and then how far."""
    began = told = time.monotonic()
    deadline = began + seconds
    while (ended := count_ended(stack, deployment)) < count:
        now = time.monotonic()
        if now > deadline:
            names = Counter(run.state_name for run in flow_runs(stack, deployment))
            raise AssertionError(f"{names}\n{stack.logs()}")
        if now - told > LINES_EVERY:
            told = now
            print(f"{deployment}: {ended} of {count} in {now - began:.0f} s", flush=True)
        time.sleep(SECONDS_BETWEEN_LOOKS)
    return flow_runs(stack, deployment)


def test_every_scheduled_run_ends_and_the_registry_agrees(stack: Stack) -> None:
    ids = schedule_all(stack)
    began = time.monotonic()
    start_workers(stack)
    trainings = wait_for_all(stack, f"finetune/{NAME}-manual", RUNS, SECONDS_A_RUN * RUNS + 120)
    seconds = time.monotonic() - began
    rejected = sum(map(is_to_be_rejected, range(RUNS)))
    assert {run.id for run in trainings} == set(ids)
    states = Counter(run.state_type for run in trainings)
    expected = {StateType.COMPLETED: RUNS - rejected, StateType.FAILED: rejected}
    assert states == Counter(expected), stack.logs()
    report(stack, seconds)
    assert flow_runs(stack, "promote/auto") == [], "each run promotes by its own policy"
    assert {run.run_count for run in trainings} == {1}
    failed = {run.id for run in trainings if run.state_name == "Rejected: unchanged"}
    assert failed == {id for index, id in enumerate(ids) if is_to_be_rejected(index)}
    check_registry(stack, trainings)
    ours = set(processes_with(f"NESTED_TUNE_HOME={stack.home}"))
    assert ours & set(processes_with("PREFECT__FLOW_RUN_ID=")) == set()
    check_tasks(stack, RUNS - rejected)
    assert errors_in(stack.folder / "server.log") == []
    assert "discarding event" not in (stack.folder / "server.log").read_text()
    in_database = errors_in(stack.database.folder / "log")
    harmless = (TRIED_AGAIN, ASKED_EARLY)
    assert [line for line in in_database if not any(word in line for word in harmless)] == []


def report(stack: Stack, seconds: float) -> None:
    """How long a run took, and how much of that the processes of runs computed."""
    spent = {name: seconds_of_children(worker.pid) for name, worker in stack.workers.items()}
    training = sum(spent[name] for name in WORKERS) / RUNS
    print(
        f"\n{RUNS} runs in {seconds:.0f} s, {seconds / RUNS:.1f} s a run on {os.cpu_count()} cores"
    )
    print(f"CPU seconds a run: {training:.1f}")


def check_registry(stack: Stack, trainings: list[FlowRun]) -> None:
    """Each verified adapter is there once, and each promotion stands in the history."""
    said = [str(run.state.message) for run in trainings if run.state is not None]
    verified = {words.split()[1].rstrip(":") for words in said if words.startswith("verified ")}
    versions = core.list_versions(stack.registry, NAME)
    assert {version[:12] for version in versions} == verified
    history = core.history(stack.registry, NAME)
    promoted = sum(words.endswith("promoted") for words in said)
    assert promoted <= len(history) <= promoted + len(reconciled(stack, history))
    assert core.read_champion(stack.registry, NAME) == history[-1]["version"]
    assert len({entry["version"] for entry in history}) == len(history)
    audited = stack.nested_tune("audit", NAME, "--registry", str(stack.registry))
    assert audited.returncode == 0, audited.stdout + audited.stderr


def check_tasks(stack: Stack, passed: int) -> None:
    """The server has a record of every task, and of its end.

    Two devices promote to one name: a run whose rival was replaced while its gate was at work says
    so, and is judged once more, by a second task.
    """
    again = Counter(log["flow_run_id"] for log in logs_with(stack, JUDGED_AGAIN))
    assert set(again.values()) <= {1}, "no run is judged more than twice"
    expected = dict.fromkeys(("validate", "load", "train"), RUNS)
    expected |= {"gate": RUNS + len(again), "register": passed, "promote": passed}
    with stack.connected() as client:

        def count(**wanted: Any) -> int:
            found = client.request("POST", "/task_runs/count", json={"task_runs": wanted})
            return int(found.json())

        assert {task: count(name={"like_": f"{task} "}) for task in expected} == expected
        assert count(state={"type": {"any_": ["PENDING", "RUNNING", "SCHEDULED"]}}) == 0


def logs_with(stack: Stack, sentence: str) -> list[dict[str, Any]]:
    """The lines of flow runs' logs that hold a sentence, page by page."""
    wanted = {"logs": {"text": {"query": f'"{sentence}"'}}, "limit": PAGE}
    found: list[dict[str, Any]] = []
    with stack.connected() as client:
        while len(found) % PAGE == 0:
            page = client.request("POST", "/logs/filter", json=wanted | {"offset": len(found)})
            if not page.json():
                break
            found += page.json()
    return found


def reconciled(stack: Stack, history: list[dict[str, Any]]) -> list[str]:
    """The versions that may have been promoted by the hourly flow: while one of its runs ran."""
    runs = [run for run in flow_runs(stack, f"reconcile/{NAME}-hourly") if run.end_time is not None]
    spans = [(run.start_time, run.end_time) for run in runs if run.start_time is not None]
    times = {entry["version"]: datetime.fromisoformat(entry["time"]) for entry in history}
    return [v for v, time in times.items() if any(a <= time <= b for a, b in spans if b)]


def errors_in(log: Path) -> list[str]:
    """The lines of a log that tell of an error."""
    words = ("ERROR", "CRITICAL", "FATAL", "PANIC", "Traceback")
    return [line for line in log.read_text().splitlines() if any(word in line for word in words)]


def _limit(runs: int) -> Any:
    from prefect.client.schemas.actions import DeploymentUpdate

    return DeploymentUpdate(concurrency_limit=runs)
