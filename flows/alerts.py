"""Alerts: automations that send a notification, the block that they send it to, and a test of both.

A webhook's URL is a secret: it is kept in a block of the server, which shows it to nobody, and is
in no message of ours.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID, uuid4

from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.schemas.automations import Automation
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from pydantic import SecretStr

from flows.current_user import current_user
from nested_core.errors import ConfigError, NestedTuneError
from nested_core.text.foreign_text import escape

WEBHOOK_BLOCK_NAME = "nested-tune"
# Text in JSON, as chat programs take it (Slack, Mattermost, Google Chat).
WEBHOOK_PAYLOAD_TEMPLATE = '{{"text": {{% filter tojson %}}{subject}\n{body}{{% endfilter %}}}}'
TEST_ALERT_NAME = "nested-tune alert: a test"
SECONDS_TO_SEND = 30.0


def find_or_make_block(client: SyncPrefectClient, notify: str) -> UUID:
    """The block that a TYPE/NAME names, or one that is made for a webhook's URL."""
    if "://" not in notify:
        block_type, _, name = notify.partition("/")
        try:
            return client.read_block_document_by_name(name, block_type).id
        except ObjectNotFound:
            raise ConfigError(
                f"--notify: the server has no block of the type {escape(block_type)!r} under the "
                "name given. Make a notification block in the UI under Blocks and name it as "
                "TYPE/NAME, such as slack-webhook/ops, or give the URL of a webhook, which begins "
                "with https://, best in a file: --notify @FILE."
            ) from None
    if not _is_web_address(notify):
        raise ConfigError("--notify: a webhook's URL begins with https:// or http:// and a host.")
    headers = SecretDict({"Content-Type": "application/json"})
    webhook = Webhook(url=SecretStr(notify), headers=headers)
    saved: Any = webhook.save(WEBHOOK_BLOCK_NAME, overwrite=True)
    return UUID(str(saved))


def _is_web_address(url: str) -> bool:
    try:
        address = urlsplit(url)
    except ValueError:  # such as a bracket that is not closed
        return False
    return address.scheme in ("http", "https") and bool(address.hostname)


def alert_action(
    client: SyncPrefectClient, block: UUID | None, text: dict[str, str]
) -> dict[str, Any]:
    """The action that sends an alert's subject and body to a block.

    It does nothing where there is no block, or where the block has been deleted.
    """
    if block is None:
        return {"type": "do-nothing"}
    try:
        document = client.read_block_document(block, include_secrets=False)
    except ObjectNotFound:
        return {"type": "do-nothing"}
    if document.block_type_name == Webhook.get_block_type_name():
        payload = WEBHOOK_PAYLOAD_TEMPLATE.format(**text)
        return {"type": "call-webhook", "block_document_id": str(block), "payload": payload}
    return {"type": "send-notification", "block_document_id": str(block)} | text


def alert_block(automation: Automation) -> UUID | None:
    """The block that an automation on the server sends to; None where it tells nobody."""
    blocks = (getattr(action, "block_document_id", None) for action in automation.actions)
    return next((block for block in blocks if block is not None), None)


def send_test_alert(client: SyncPrefectClient) -> str:
    """Have the server send one alert; returns what became of it.

    NestedTuneError where it could not be sent, or was not within 30 seconds.
    """
    automation = next(iter(client.read_automations_by_name(TEST_ALERT_NAME)), None)
    if automation is None or alert_block(automation) is None:
        raise ConfigError(
            "--test-alert: nobody is told yet. Give --notify: a block, or a URL in @FILE."
        )
    event_id = uuid4()
    event = {
        "id": str(event_id),
        "event": "nested-tune.test-alert",
        "occurred": datetime.now(UTC).isoformat(),
        "resource": {"prefect.resource.id": "nested-tune.alerts"},
        "payload": {"by": current_user()},
    }
    client.request("POST", "/events", json=[event]).raise_for_status()
    result = _wait_for_action(client, automation.id, event_id)
    payload = result["payload"]
    status = payload.get("status_code", 200)
    if result["event"].endswith(".failed") or status >= 300:
        reason = payload.get("reason", f"the webhook answered {status}")
        raise NestedTuneError(f"The test alert was not sent: {reason:.300}")
    return "test alert: sent"


def _wait_for_action(
    client: SyncPrefectClient, automation: UUID, triggering_event: UUID
) -> dict[str, Any]:
    """The event that says what became of the action of an automation."""
    wanted = {
        "event": {"name": [f"prefect.automation.action.{end}" for end in ("executed", "failed")]},
        "resource": {"id": [f"prefect.automation.{automation}"]},
        "related": {"id": [f"prefect.event.{triggering_event}"]},
    }
    deadline = time.monotonic() + SECONDS_TO_SEND
    while time.monotonic() < deadline:
        answer = client.request("POST", "/events/filter", json={"filter": wanted})
        answer.raise_for_status()
        if events := answer.json()["events"]:
            event: dict[str, Any] = events[0]
            return event
        time.sleep(0.5)
    raise NestedTuneError(
        f"The test alert was not sent within {SECONDS_TO_SEND:.0f} seconds. Are the server's "
        "services running? `prefect server start` runs them unless it is told not to."
    )
