"""A night as the server knows it, and the links of the lead's page."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate
from prefect.client.schemas.objects import FlowRun
from prefect.states import Running

from flows.rooms.nights.watcher import _list_links, night_of


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


@pytest.mark.usefixtures("prefect_server")
def test_the_page_of_nights_links_the_newest_pages_that_the_server_has() -> None:
    with get_client(sync_client=True) as client:
        assert _list_links(client, "linked") == []
        made = [
            client.create_artifact(ArtifactCreate(key="linked-night", type="markdown", data=day))
            for day in ("first", "second")
        ]
        assert _list_links(client, "linked") == [("night", f"/artifacts/artifact/{made[1].id}")]
