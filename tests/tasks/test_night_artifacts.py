"""A night as the server knows it, for the lead's page."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

from prefect.client.schemas.objects import FlowRun
from prefect.states import Running

from tasks.night_artifacts import night_of


def test_the_night_that_ends_now_has_the_name_that_it_is_about_to_have() -> None:
    due = datetime(2026, 11, 22, 2, tzinfo=UTC)
    run = FlowRun(
        id=uuid4(),
        flow_id=uuid4(),
        name="support-bot, 22 Nov 02:00",
        state=Running(),
        state_name="Running",
        expected_start_time=due,  # type: ignore[arg-type]
        estimated_run_time=timedelta(seconds=90),
    )
    night = night_of(run, "Kept the champion")
    assert (night.flow_run, night.due, night.minutes) == (run.id, due, 1.5)
    assert night.outcome == "Kept the champion"
    assert night_of(run, None).outcome == "Running"
