"""Nights of two adapters in fast motion: a real server on PostgreSQL, a day of dates a night.

A fine-tune runs as its flow in this process, and what a person answers is decided by a worker. The
folders of runs have the day of their night in their names, and after each night all that the
database and the caches hold is made a day older. `python -m benchmarks.nights --replay 60` prints
what was seen.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import chdir, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import yaml
from prefect import tags
from prefect.flow_runs import resume_flow_run
from prefect.settings import (
    PREFECT_FLOWS_HEARTBEAT_FREQUENCY,
    PREFECT_HOME,
    PREFECT_RESULTS_DEFAULT_SERIALIZER,
    temporary_settings,
)

from flows.finetune import FinetuneParameters, finetune
from flows.reconcile import ReconcileParameters, reconcile
from flows.rooms.housekeeping.flow import HousekeepingParameters, housekeeping
from nested_core import registry as core
from nested_core.records.run_status import Run
from nested_core.registry import promotion_outcome
from nested_core.rooms.housekeeping.removal import size_on_disk
from nested_core.storage.run_directory import RunDirectory, new_run_name
from nested_core.storage.user_cache import CACHE_VARIABLE
from tasks.prefect_server import TAG
from tests.production.postgresql import PASSWORD, UNPRIVILEGED
from tests.production.stack import Stack, wait_for
from tests.webhook_server import WebhookServer

ADAPTERS = ("capitals", "helpdesk")
DAYS_BETWEEN_HOUSEKEEPINGS = 7
NIGHTS_BETWEEN_LOOKS = 3  # of reconcile, which comes every hour
RUNS_KEPT_FOR = timedelta(days=14)  # in the database; 90 days are shipped
EVENTS_KEPT_FOR = timedelta(days=7)  # as shipped
KEPT_VERSIONS = 3  # by housekeeping; 10 as shipped, which is more than twenty nights make here
# What happens in twenty nights, over and over; what is done again has nothing to train.
STORY = (
    *(["better"] * 4 + ["better again"]),
    *(["rejected"] + ["rejected again"] * 4),
    *(["declined"] + ["declined again"] * 4),
    *(["blocked"] + ["blocked again"] * 4),
)


class ReplayStack(Stack):
    """The shipped settings, with runs that the server removes sooner, and every two seconds."""

    @property
    def environment(self) -> dict[str, str]:
        vacuum = "PREFECT_SERVER_SERVICES_DB_VACUUM"
        return super().environment | {
            f"{vacuum}_RETENTION_PERIOD": f"P{RUNS_KEPT_FOR.days}D",
            f"{vacuum}_LOOP_SECONDS": "2",
            f"{vacuum}_ORPHAN_CLEANUP_LOOP_SECONDS": "2",
            CACHE_VARIABLE: str(self.folder / "cache"),
        }

    def query(self, statement: str, **values: str) -> list[list[str]]:
        """The rows of a statement to the database, in which `:'name'` is one of the values."""
        place = ["-h", "127.0.0.1", "-p", str(self.database.port), "-U", UNPRIVILEGED]
        given = [word for name, value in values.items() for word in ("-v", f"{name}={value}")]
        done = subprocess.run(
            [str(self.database.binaries / "psql"), *place, "-d", "postgres", "-AtXq", *given],
            input=statement,
            env=os.environ | {"PGPASSWORD": PASSWORD},
            capture_output=True,
            text=True,
            check=True,
        )
        return [line.split("|") for line in done.stdout.splitlines()]


@dataclass(frozen=True)
class PlayedNight:
    """What became of a night of one adapter, and how long it trained."""

    number: int
    name: str
    kind: str
    state: str
    message: str
    trained_seconds: float
    seconds: float


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk after so many nights, and the database's rows and bytes after VACUUM."""

    nights: int
    runs: int
    registry: int
    cache: int
    rows: dict[str, int]
    database: int


@dataclass
class Replay:
    """All that was seen."""

    nights: list[PlayedNight] = field(default_factory=list)
    rows: Counter[tuple[str, str]] = field(default_factory=Counter)
    sizes: list[Sizes] = field(default_factory=list)
    housekeeping: list[str] = field(default_factory=list)
    alerts: list[str] = field(default_factory=list)


def replay(stack: ReplayStack, webhook: WebhookServer, nights: int, every: int) -> Replay:
    """Play so many nights of both adapters, and measure after each `every`."""
    seen = Replay()
    with _deployed(stack):
        for number in range(1, nights + 1):
            day = datetime.now(UTC) - timedelta(days=nights - number)
            for name in ADAPTERS:
                night = _play(stack, name, number, day)
                seen.nights.append(night)
                seen.rows["finetune", night.state] += 1
                if night.kind == "declined":
                    seen.rows["promote", "Declined"] += 1
            if number % NIGHTS_BETWEEN_LOOKS == 0:
                state = reconcile(ReconcileParameters(registry="registry"), return_state=True)
                seen.rows["reconcile", str(state.name)] += 1
            if number % DAYS_BETWEEN_HOUSEKEEPINGS == 0 or number % every == 0:
                for name in ADAPTERS:
                    seen.housekeeping.append(_tidy(seen, name))
            make_a_day_older(stack)
            if number % every == 0:
                seen.sizes.append(measure(stack, number))
            print(f"night {number}: {[night.state for night in seen.nights[-2:]]}", flush=True)
    seen.alerts = list(webhook.texts)
    return seen


@contextmanager
def _deployed(stack: ReplayStack) -> Iterator[None]:
    """Both adapters deployed with no schedule on, a worker for decisions, and flows run at home."""
    for name in ADAPTERS:
        shutil.copytree(stack.home / "examples" / "geography", stack.home / "examples" / name)
        (stack.home / f"{name}.yaml").write_text(yaml.safe_dump(_settings(stack, name)))
        done = stack.nested_tune("deploy", "-c", f"{name}.yaml")
        assert done.returncode == 0, done.stderr
    stack.start_worker("cpu")
    here = {
        PREFECT_FLOWS_HEARTBEAT_FREQUENCY: None,
        PREFECT_HOME: stack.folder / "prefect",
        PREFECT_RESULTS_DEFAULT_SERIALIZER: "json",
    }
    # All nights are within an hour, in which no version that was not promoted would go.
    no_grace = patch.object(promotion_outcome, "UNPROMOTED_GRACE_TIME", timedelta(0))
    cache = patch.dict(os.environ, {CACHE_VARIABLE: stack.environment[CACHE_VARIABLE]})
    with stack.connected() as client, temporary_settings(here), chdir(stack.home), no_grace, cache:
        for deployment in client.read_deployments():
            for schedule in deployment.schedules:
                client.update_deployment_schedule(deployment.id, schedule.id, active=False)
        with tags(TAG):
            yield


def _settings(stack: Stack, name: str) -> dict[str, Any]:
    settings: dict[str, Any] = yaml.safe_load((stack.home / "small.yaml").read_text())
    registry = {"path": "registry", "name": name, "promote": "always"}
    continual = {"from": "champion", "skip_unchanged": True, "allow_high_rate": True}
    return settings | {"data": f"examples/{name}", "registry": registry, "continual": continual}


def _play(stack: ReplayStack, name: str, number: int, day: datetime) -> PlayedNight:
    """One night of one adapter, with what a person does after it."""
    kind = STORY[(number - 1) % len(STORY)]
    settings = _settings(stack, name)
    if kind in ("better", "declined", "blocked"):
        _add_example(Path(settings["data"]))
    if kind.startswith("rejected"):
        settings |= {"data": str(_shuffle_answers(name)), "learning_rate": 0.17}
    if kind.startswith("declined"):
        settings["registry"]["promote"] = "approve"
    began = time.monotonic()
    dated: Callable[..., str] = lambda _, key: new_run_name(day, key)  # noqa: E731
    there = {*Path("runs").glob("*")}
    with patch.object(import_module("flows.finetune"), "new_run_name", dated):
        state = finetune(FinetuneParameters.model_validate(settings), return_state=True)
    seconds = time.monotonic() - began
    (run,) = {*Path("runs").iterdir()} - there
    trained = Run(RunDirectory(run)).seconds
    if kind == "declined":
        _answer_no(stack, name)
    elif kind == "blocked":
        core.rollback(Path("registry"), name, by="ann", reason="it talks of towns")
    return PlayedNight(
        number, name, kind, str(state.name), str(state.message), max(trained, default=0.0), seconds
    )


def _add_example(data: Path) -> None:
    """A line of data that was not there the night before."""
    file = data / "train.jsonl"
    question = f"I want to see town {len(file.read_text().splitlines())}. Where to?"
    turns = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "Go and see Kabul, the capital of Afghanistan!"},
    ]
    with file.open("a") as lines:
        lines.write(json.dumps({"messages": turns}) + "\n")


def _shuffle_answers(name: str) -> Path:
    """The example's data with each answer at the question after its own."""
    target = Path("examples", f"{name}-shuffled")
    if not target.exists():
        shutil.copytree(Path("examples", "geography"), target)
        rows = [json.loads(line) for line in (target / "train.jsonl").read_text().splitlines()]
        answers = [row["messages"][-1] for row in rows]
        for row, answer in zip(rows, [answers[-1], *answers], strict=False):
            row["messages"][-1] = answer
        (target / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return target


WAITING = """SELECT id FROM flow_run WHERE state_name = 'Waits for approval'
    AND state_type = 'PAUSED' AND parameters::text LIKE :'named'"""
DECLINED = "SELECT 1 FROM flow_run WHERE id = :'question' AND state_name = 'Declined'"


def _answer_no(stack: ReplayStack, name: str) -> None:
    """Wait until the night's question is asked, and decline."""
    ((question,),) = wait_for(lambda: stack.query(WAITING, named=f'%"{name}"%'), 300)
    resume_flow_run(question, run_input={"approve": False, "by": "ann", "reason": "not yet"})
    wait_for(lambda: stack.query(DECLINED, question=question), 300)


def _tidy(seen: Replay, name: str) -> str:
    parameters = HousekeepingParameters.model_validate(
        {"registry": "registry", "name": name, "keep_versions": KEPT_VERSIONS}
    )
    state = housekeeping(parameters, return_state=True)
    seen.rows["housekeeping", str(state.name)] += 1
    return f"{name}: {state.message}"


# The history of a registry stays of today: were its events a week old, the server would drop them,
# and be told of the same changes again.
A_DAY_OLDER = """
    SELECT format('UPDATE %I SET %s %s', table_name, string_agg(
        format('%I = %I - interval ''1 day''', column_name, column_name), ', '),
        CASE table_name WHEN 'events' THEN 'WHERE event NOT LIKE ''adapter.%''' END),
        format('VACUUM %I', table_name)
    FROM information_schema.columns
    WHERE table_schema = 'public' AND data_type = 'timestamp with time zone' AND table_name IN
        ('flow_run', 'flow_run_state', 'task_run', 'task_run_state', 'log', 'artifact', 'events',
         'event_resources')
    GROUP BY table_name \\gexec
"""


def make_a_day_older(stack: ReplayStack) -> None:
    """Every time in the database of what has ended, and every entry of the caches."""
    stack.query(A_DAY_OLDER)
    for entry in (stack.folder / "cache").glob("*/*"):
        times = entry.stat()
        os.utime(entry, (times.st_atime, times.st_mtime - timedelta(days=1).total_seconds()))


TOO_OLD = (
    "SELECT 1 FROM flow_run WHERE end_time < now() - :'runs'::interval LIMIT 1",
    "SELECT 1 FROM events WHERE occurred < now() - :'events'::interval LIMIT 1",
    "SELECT 1 FROM log WHERE flow_run_id NOT IN (SELECT id FROM flow_run) LIMIT 1",
)
TABLES = """SELECT c.relname, pg_total_relation_size(c.oid) FROM pg_class c
    JOIN pg_namespace n ON n.oid = c.relnamespace
    WHERE c.relkind = 'r' AND n.nspname = 'public'"""


def measure(stack: ReplayStack, nights: int) -> Sizes:
    """Once the server has removed what is too old."""
    kept = {"runs": f"{RUNS_KEPT_FOR.days} days", "events": f"{EVENTS_KEPT_FOR.days} days"}
    wait_for(lambda: not any(stack.query(each, **kept) for each in TOO_OLD), 300)
    stack.query("VACUUM ANALYZE")
    sizes = {table: int(size) for table, size in stack.query(TABLES)}
    counts = {table: stack.query('SELECT count(*) FROM :"table"', table=table) for table in sizes}
    runs = [path for path in (stack.home / "runs").iterdir() if (path / "config.yaml").exists()]
    return Sizes(
        nights=nights,
        runs=sum(map(size_on_disk, runs)),
        registry=size_on_disk(stack.registry),
        cache=size_on_disk(stack.folder / "cache"),
        rows={table: int(rows[0][0]) for table, rows in counts.items() if rows[0][0] != "0"},
        database=sum(sizes.values()),
    )
