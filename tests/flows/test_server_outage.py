"""A run whose server does not answer for a while: pages and tags are left out, and it goes on."""

from __future__ import annotations

import logging
from uuid import uuid4

import httpx
import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.runtime import deployment

from flows.flow_runs.nights import tag_flow_run
from nested_core.text.document import Document
from tasks.artifact_client import ArtifactClient
from tasks.promote import read_origin

pytestmark = pytest.mark.usefixtures("prefect_server")


def connect_nowhere(sync_client: bool) -> SyncPrefectClient:
    """A client of a server that refuses connections, as one does that starts again."""
    return SyncPrefectClient("http://127.0.0.1:9/api")


def publish_page() -> None:
    with ArtifactClient() as artifacts:
        artifacts.publish_page("away-night", Document("night", []), "a page")
        artifacts.publish_table("away-table", [{"a": 1}], "a table")


@pytest.mark.parametrize(
    ("module", "ask", "left_out"),
    [
        (
            "tasks.artifact_client",
            publish_page,
            ["the page away-night is not", "the page away-table is not"],
        ),
        ("tasks.prefect_server", tag_flow_run, ["the run has no tags"]),
    ],
)
def test_what_only_shows_is_logged_and_left_out(module, ask, left_out, caplog, monkeypatch) -> None:
    @flow
    def night() -> str:
        monkeypatch.setattr(f"{module}.get_client", connect_nowhere)
        ask()
        return "went on"

    with caplog.at_level(logging.WARNING):
        assert night() == "went on"
    for words in left_out:
        assert words in caplog.text
    assert "ConnectError" in caplog.text


def test_a_promotion_is_recorded_with_the_deployments_id_where_its_name_cannot_be_read(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    started_by = str(uuid4())

    def refuse() -> str:
        raise httpx.ConnectError("All connection attempts failed")

    monkeypatch.setitem(deployment.FIELDS, "id", lambda: started_by)
    monkeypatch.setitem(deployment.FIELDS, "name", refuse)

    @flow
    def night() -> str | None:
        return read_origin().deployment

    with caplog.at_level(logging.WARNING):
        assert night() == started_by
    assert "the history has the deployment's id" in caplog.text
