"""When the shipped automations fire, by the server's own code: triggers, buckets and a clock."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from prefect.settings import (
    PREFECT_SERVER_DATABASE_CONNECTION_URL,
    PREFECT_SERVER_DATABASE_TIMEOUT,
    temporary_settings,
)

from flows.process.environment import packaged_folder
from flows.rooms.deploy.planned_deployments import read_automations_yaml
from flows.rooms.nights.run_list import SECONDS_OF_SILENCE
from nested_core.records.outcome_names import Outcome
from tests.prefect_home import DATABASE, new_prefect_home

AUTOMATIONS = {each["name"].partition(": ")[2]: each for each in read_automations_yaml()}
FREE, RESUME = "free dead runs", "resume what crashed"
STUCK, REMINDER = "a run does not begin", "an approval still waits"
NO_WORKER = "a work pool has no worker"
ASKED, DAY = (0, "Waits for approval"), 86_400
RUNNING = {"Running": "RUNNING", "heartbeat": None, "Pending": "PENDING", "Submitting": "PENDING"}
BEATS = [(0, "Running"), (1, "heartbeat"), (31, "heartbeat")]


@dataclass(frozen=True)
class Case:
    """What happens to one run, or pool, in seconds; when the server looks; what fires."""

    title: str
    events: list[tuple[int, str]]
    looks: range | list[int]
    fires: list[str]
    run_count: int = 1
    flow: str = "finetune"
    subject: str = "flow-run"


CASES = [
    Case("dead after its heartbeats", BEATS, range(60, 400, 5), [FREE]),
    Case("not yet after 4 minutes", BEATS, range(60, 271, 5), []),
    Case("dead before its first heartbeat", [(0, "Pending"), (4, "Running")], [305], [FREE]),
    Case("dead while it is pending", [(0, "Pending"), (1, "Submitting")], [305], [FREE]),
    Case("a state that is no end", [*BEATS, (40, "Waiting")], range(60, 400, 5), [FREE]),
    Case("begun again and dead", [*BEATS, (40, "Running")], range(60, 400, 5), [FREE]),
    *(
        Case(
            f"alive, the server away for {gap} s", [*BEATS, (gap + 60, "heartbeat")], [gap + 32], []
        )
        for gap in (45, 90, 120, 150, 200, 240)
    ),
    *(
        Case(f"ended {end}", [*BEATS, (40, end)], range(60, 400, 5), [])
        for end in (
            "Completed",
            "Failed",
            "Cancelled",
            "Promoted",
            "Skipped: hopeless",
            "Rejected: worse",
        )
    ),
    Case("crashed", [(0, "Crashed")], [21], [RESUME]),
    Case("crashed, then a late heartbeat", [(0, "Crashed"), (10, "heartbeat")], [21], [RESUME]),
    Case("crashed, and retried by a person", [(0, "Crashed"), (10, "AwaitingRetry")], [21], []),
    Case("crashed, and ended after all", [(0, "Crashed"), (10, "Promoted")], [21], []),
    Case("crashed a second time", [(0, "Crashed")], [21], [], run_count=2),
    Case("crashed before it began", [(0, "Crashed")], [21], [], run_count=0),
    # In production the first of the two ends such a run, where it is watched.
    Case("taken, and not begun", [(0, "Pending"), (4, "Submitting")], [590, 601], [FREE, STUCK]),
    Case("begun after 9 minutes", [(0, "Pending"), (540, "Running")], [601], [FREE]),
    Case("asked a day ago", [ASKED], [DAY - 10, DAY + 1], [REMINDER], flow="promote"),
    Case("asked and answered", [ASKED, (DAY - 9, "Resuming")], [DAY + 1], [], flow="promote"),
    Case("asked, and asked anew", [ASKED, (9, "Superseded")], [DAY + 1], [], flow="promote"),
    Case("the night that asked", [ASKED], [DAY + 1], []),
    Case("another flow that crashed", [(0, "Crashed")], [21], [], flow="rollback"),
    Case("a pool's worker gone", [(0, "not-ready")], [110, 121], [NO_WORKER], subject="work-pool"),
    Case(
        "a worker that is started again",
        [(0, "not-ready"), (60, "ready")],
        range(5, 300, 5),
        [],
        subject="work-pool",
    ),
    Case(
        "a pool that a person paused",
        [(0, "not-ready"), (60, "paused")],
        [121],
        [],
        subject="work-pool",
    ),
]


def event_of(case: Case, run: str, name: str, at: Any) -> Any:
    from prefect.server.events.schemas.events import ReceivedEvent

    resource = {
        "prefect.resource.id": f"prefect.{case.subject}.{run}",
        "prefect.resource.name": "x",
        "prefect.run-count": str(case.run_count),
        "prefect.state-type": RUNNING.get(name) or name.upper(),
    }
    related = [
        {"prefect.resource.id": f"prefect.tag.{tag}", "prefect.resource.role": "tag"}
        for tag in ("nested-tune", "watched")
    ]
    related += [
        {
            "prefect.resource.id": "prefect.flow.1",
            "prefect.resource.role": "flow",
            "prefect.resource.name": case.flow,
        },
        {"prefect.resource.id": "prefect.deployment.1", "prefect.resource.role": "deployment"},
    ]
    return ReceivedEvent.model_validate(
        {
            "occurred": at,
            "event": f"prefect.{case.subject}.{name}",
            "resource": resource,
            "related": related,
            "id": uuid4(),
            "received": at,
        }
    )


async def find_fired() -> dict[str, list[str]]:
    """The title of each case -> the automations that fired for it, in order."""
    import prefect.types._datetime as prefect_time
    from prefect.server.database import provide_database_interface
    from prefect.server.events import triggers
    from prefect.server.events.models import automations
    from prefect.server.events.schemas.automations import Automation

    fired: list[str] = []

    async def note(firing: Any) -> None:
        fired.append(str(firing.trigger.automation.name).partition(": ")[2])

    database: Any = provide_database_interface()
    await database.create_db()
    async with database.session_context(begin_transaction=True) as session:
        for name in (FREE, RESUME, STUCK, REMINDER, NO_WORKER):
            planned = deepcopy(AUTOMATIONS[name]) | {"actions": [{"type": "do-nothing"}]}
            planned.pop("notify", None)
            create: Any = automations.create_automation
            await create(session, Automation.model_validate(planned))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triggers, "act", note)
        triggers.clear_loaded_automations()
        await triggers.reconcile_automations(force=True)
        start, found = prefect_time.now("UTC"), {}
        for case in CASES:
            run = str(uuid4())
            happens = [(at, 0, name) for at, name in case.events]
            happens += [(at, 1, "") for at in case.looks]
            for at, is_look, name in sorted(happens):
                moment: Any = start + timedelta(seconds=at)
                if is_look:
                    patch.setattr(triggers, "_events_clock", None)  # as at real time
                    for trigger in list(triggers.triggers.values()):
                        await triggers.proactive_evaluation(trigger, moment)
                else:
                    await triggers.reactive_evaluation(event_of(case, run, name, moment))
            found[case.title] = fired.copy()
            fired.clear()
            async with database.session_context(begin_transaction=True) as session:
                sweep: Any = triggers.sweep_closed_buckets
                await sweep(session, start + timedelta(days=1))
        triggers.clear_loaded_automations()
    return found


@pytest.fixture(scope="module")
def fired(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, list[str]]]:
    """What fired in each case, on a database of its own."""
    home = new_prefect_home(tmp_path_factory.mktemp("triggers"))
    url = f"sqlite+aiosqlite:///{home / DATABASE}"
    # A statement may take long on a machine that does much else.
    settings = {PREFECT_SERVER_DATABASE_CONNECTION_URL: url, PREFECT_SERVER_DATABASE_TIMEOUT: 300.0}
    with temporary_settings(settings):
        yield asyncio.run(find_fired())


@pytest.mark.slow("imports Prefect's server into this process, and has it look some hundred times")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.title)
def test_an_automation_fires_for_what_is_dead_or_crashed_and_for_nothing_else(case, fired) -> None:
    assert fired[case.title] == case.fires


def test_every_name_in_which_a_run_ends_is_no_sign_of_death() -> None:
    """A `*` is one character at least: prefect/server/events/schemas/automations.py."""
    names = [*map(str, set(Outcome) - {Outcome.RUNNING}), "Completed", "Failed", "Cancelled"]
    for automation in (FREE, RESUME):
        expect = AUTOMATIONS[automation]["trigger"]["expect"]
        patterns = [re.escape(each).replace(r"\*", ".+") for each in expect]
        missing = [
            name
            for name in names
            if not any(re.fullmatch(each, f"prefect.flow-run.{name}") for each in patterns)
        ]
        assert missing == [], automation


def test_the_bounds_of_the_automation_and_of_reconcile_are_ten_heartbeats() -> None:
    settings = Path(packaged_folder("deployments") / "settings.env").read_text()
    assert "PREFECT_FLOWS_HEARTBEAT_FREQUENCY=30\n" in settings
    assert AUTOMATIONS[FREE]["trigger"]["within"] == 10 * 30 == SECONDS_OF_SILENCE
