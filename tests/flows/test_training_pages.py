"""What the pages of a run that trains cost: rows of the server's database, and processor time."""

from __future__ import annotations

import sqlite3
import time
from collections import Counter
from contextlib import closing
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from prefect import flow, runtime, task
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from nested_core.records.plan import TrainingPlan
from nested_core.storage.run_directory import RunDirectory
from nested_core.training.reports.run_progress import RunProgress
from tasks.artifact_client import ArtifactClient
from tasks.training_progress import TrainingPages
from tests.example import example_config
from tests.flows.test_run_view import PLAN
from tests.prefect_home import DATABASE

pytestmark = pytest.mark.usefixtures("prefect_server")
SECONDS_A_STEP = 15.0  # of a model of some size: 2,000 steps are 8 hours
MOST_ROWS = 20
MOST_SECONDS = 2.0  # of this process: training goes on while a page waits for the server


def replay(artifacts: ArtifactClient, steps: int) -> float:
    """Report every step, and an evaluation in ten, as hours go by; the pages' processor time."""
    config = example_config(registry={"path": "registry", "name": f"replayed-{steps}"})
    plan = TrainingPlan(**(vars(PLAN) | {"steps": steps, "iterations": steps}))
    progress = RunProgress(RunDirectory(Path("run")), plan)
    pages = TrainingPages(config, progress)
    seconds = 0.0
    for step in range(1, steps + 1):
        progress.seconds += SECONDS_A_STEP
        started = time.process_time()
        record = {"step": step, "iteration": step, "loss": 3 / step, "tokens_per_second": 1234.5}
        evaluation = {"val_loss": 3.5 / step} if step % 10 == 0 else {}
        progress.records.append(record | evaluation)
        if pages.is_due() or step == steps:
            pages.show(artifacts)
        seconds += time.process_time() - started
    return seconds


@task(name="train")
def train(steps: int) -> float:
    with ArtifactClient() as artifacts:
        return replay(artifacts, steps)


@flow(name="replayed")
def replayed(steps: int) -> tuple[UUID, float]:
    return UUID(str(runtime.flow_run.id)), train(steps)


def artifacts_of(flow_run: UUID) -> dict[str, Any]:
    wanted = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run]))
    with get_client(sync_client=True) as client:
        return {str(a.key): a for a in client.read_artifacts(artifact_filter=wanted)}


def page_rows(database: Path, adapter: str) -> Counter[str]:
    """The rows that an adapter's artifacts have in each table, with those of their events."""
    keys = f"{adapter}-%"
    queries = {
        "artifact": "select count(*) from artifact where key like ?",
        "artifact_collection": "select count(*) from artifact_collection where key like ?",
        "events": "select count(*) from events where event like 'prefect.artifact%' and "
        "(resource like '%' || ? || '%' or payload like '%' || ? || '%')",
    }
    rows: Counter[str] = Counter()
    with closing(sqlite3.connect(database)) as connection:
        for table, query in queries.items():
            values = (keys,) * query.count("?")
            rows[table] = connection.execute(query, values).fetchone()[0]
    return rows


@pytest.mark.slow("makes the pages of 2,000 steps")
def test_pages_cost_a_run_of_2000_steps_what_they_cost_one_of_20(prefect_home: Path) -> None:
    costs = {}
    for steps in (20, 2000):
        flow_run, seconds = replayed(steps)
        adapter = f"replayed-{steps}"
        made = artifacts_of(flow_run)
        assert sorted(made) == [f"{adapter}-loss-curve", f"{adapter}-training-progress"]
        assert made[f"{adapter}-training-progress"].data == 100.0
        assert f"step {steps:,})" in made[f"{adapter}-loss-curve"].data
        assert seconds < MOST_SECONDS
        costs[steps] = page_rows(prefect_home / DATABASE, adapter)
        print(steps, seconds, costs[steps])
    assert costs[20] == costs[2000]
    assert sum(costs[2000].values()) <= MOST_ROWS
