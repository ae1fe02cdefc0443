"""The artifacts of a flow run on Prefect's server: each published once, and replaced in place.

Prefect's pages show artifacts as markdown, cells and descriptions too. Everything that comes in
here as text is escaped; the markup is what a document's own tree adds.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from typing import Self
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter
from prefect.client.schemas.objects import Artifact
from prefect.client.schemas.sorting import ArtifactSort
from prefect.utilities.context import get_task_and_flow_run_ids

from nested_core.text.document import Document
from nested_core.text.foreign_text import escape_markdown
from nested_core.text.value_format import format_value
from tasks.prefect_server import tolerating_server_outage

_INVALID_KEY_CHARACTERS = re.compile("[^a-z0-9]+")
_DIGEST_DIGITS = 6


def artifact_key(adapter: str | None, page: str) -> str:
    """The key of one of an adapter's pages: `support-bot-night`; without an adapter `night`.

    Prefect lists all artifacts of a key on one page, which is this adapter's history. A key has
    lower case, digits and dashes only: a name with anything else gets some digits of its digest, so
    that no two names share a key.
    """
    if adapter is None:
        return page
    plain = _INVALID_KEY_CHARACTERS.sub("-", adapter.lower()).strip("-")
    if plain != adapter:
        plain = f"{plain}-{hashlib.sha256(adapter.encode()).hexdigest()[:_DIGEST_DIGITS]}"
    return f"{plain}-{page}"


class ArtifactClient:
    """Publishes artifacts of a flow run over one connection: of that in whose context it is used.

    `flow_run` is another one, that has ended.

    What is published again under a key replaces what was there, in the same row of the server's
    database; so does what a flow run publishes after it is tried again. A server that is away takes
    nothing and fails nothing: the log says which page is not up to date.
    """

    def __init__(self, flow_run: UUID | None = None) -> None:
        self._flow_run = flow_run
        self._client = get_client(sync_client=True)
        self._published: dict[str, UUID] = {}

    def __enter__(self) -> Self:
        self._client.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._client.__exit__(*exception)

    def publish_page(self, key: str, page: Document, description: str) -> None:
        """Put a page beside the flow run."""
        self._publish("markdown", key, str(page), description)

    def publish_table(self, key: str, rows: Sequence[dict[str, object]], description: str) -> None:
        """Put a table beside the flow run; integers, true, false and null stay what they are."""
        table = [{escape_markdown(name): _table_cell(v) for name, v in r.items()} for r in rows]
        self._publish("table", key, json.dumps(table), description)

    def publish_progress(self, key: str, percent: float, description: str) -> None:
        """Put a progress bar beside the flow run, from 0 to 100."""
        self._publish("progress", key, percent, description)

    def _publish(self, type_name: str, key: str, data: str | float, description: str) -> None:
        """Make an artifact, or replace the content of the one that this flow run has."""
        shown = escape_markdown(description)
        task_run, flow_run = get_task_and_flow_run_ids()
        if self._flow_run is not None:
            task_run, flow_run = None, self._flow_run
        with tolerating_server_outage(f"the page {key} is not up to date"):
            artifact = self._published.get(key) or self._find_earlier(key, flow_run)
            if artifact is not None:
                self._client.update_artifact(artifact, ArtifactUpdate(data=data, description=shown))
            else:
                created = ArtifactCreate(
                    key=key,
                    type=type_name,
                    description=shown,
                    data=data,
                    flow_run_id=flow_run,
                    task_run_id=task_run,
                )
                artifact = self._client.create_artifact(created).id
            self._published[key] = artifact

    def _find_earlier(self, key: str, flow_run: UUID | None) -> UUID | None:
        """What this flow run has published under a key already."""
        if flow_run is None:
            return None
        wanted = ArtifactFilter.model_validate(
            {"key": {"any_": [key]}, "flow_run_id": {"any_": [flow_run]}}
        )
        earlier = self._client.read_artifacts(artifact_filter=wanted, limit=1)
        return earlier[0].id if earlier else None


def find_newest_artifact(client: SyncPrefectClient, key: str) -> Artifact | None:
    """The artifact of a key that was updated last; None before there is one."""
    wanted = ArtifactFilter.model_validate({"key": {"any_": [key]}})
    newest = client.read_artifacts(artifact_filter=wanted, sort=ArtifactSort.UPDATED_DESC, limit=1)
    return newest[0] if newest else None


def artifact_path(artifact: UUID) -> str:
    """Where the page of an artifact is on the server, which shows its content at once.

    The page of a key, `/artifacts/key/...`, lists artifacts and shows none.
    """
    return f"/artifacts/artifact/{artifact}"


def publish_page(
    adapter: str | None, name: str, page: Document, description: str, flow_run: UUID | None = None
) -> None:
    """Put a page of an adapter beside the flow run at work, or beside another one."""
    with ArtifactClient(flow_run) as artifacts:
        artifacts.publish_page(artifact_key(adapter, name), page, description)


def _table_cell(value: object) -> object:
    is_plain = value is None or isinstance(value, bool | int)
    return value if is_plain else escape_markdown(format_value(value))
