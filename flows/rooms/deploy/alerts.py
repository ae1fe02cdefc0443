"""Automations, the block that those of them which are alerts send to, and a test of it.

A webhook's URL is a secret: it is kept in a block of the server, which shows it to nobody, and is
in no message of ours.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import httpx
from prefect.blocks.core import Block
from prefect.blocks.webhook import Webhook
from prefect.client.orchestration import SyncPrefectClient
from prefect.events.filters import AutomationFilter, AutomationFilterName
from prefect.events.schemas.automations import Automation, AutomationCore
from prefect.exceptions import ObjectNotFound
from prefect.types import SecretDict
from pydantic import SecretStr

from nested_core.errors import ConfigError, NestedTuneError
from nested_core.process.current_user import current_user
from nested_core.text.foreign_text import escape

NO_ALERTS_WARNING = (
    "alerts: NOBODY IS NOTIFIED of a run that failed, crashed or is late. Make a notification "
    "block in the UI under Blocks, and give it: `nested-tune deploy --notify TYPE/NAME`, or "
    "--notify @FILE with a webhook's URL in the file"
)
WEBHOOK_BLOCK_NAME = "nested-tune"
# Text in JSON, as chat programs take it (Slack, Mattermost, Google Chat).
WEBHOOK_PAYLOAD_TEMPLATE = '{{"text": {{% filter tojson %}}{subject}\n{body}{{% endfilter %}}}}'


def find_or_make_block(client: SyncPrefectClient, notify: str) -> UUID:
    """Return the id of the block that `notify` names as TYPE/NAME; for a URL make a webhook block.

    Raises ConfigError for a block that the server does not have, and for no URL of the web.
    """
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
    """Return the action that sends an alert's subject and body to a block.

    Without a block, or if it has been deleted, the action does nothing.
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
    """Return the block that an automation on the server sends to; None where it tells nobody."""
    blocks = (getattr(action, "block_document_id", None) for action in automation.actions)
    return next((block for block in blocks if block is not None), None)


def read_automations(client: SyncPrefectClient, names: list[str]) -> list[Automation]:
    """Return those automations of a server that have one of these names."""
    named = AutomationFilter(name=AutomationFilterName(any_=names))
    return client.read_automations(automations=named)


def send_test_alert(client: SyncPrefectClient, names: list[str]) -> str:
    """Send a test to the block of these alerts; return a line that says so.

    This process sends it, which shows that the block works; real alerts are sent by the server.
    Raises ConfigError if no block is set, NestedTuneError if the test could not be sent.
    """
    block_id = next(filter(None, map(alert_block, read_automations(client, names))), None)
    if block_id is None:
        raise ConfigError(
            "--test-alert: nobody is notified yet. Give --notify: a block, or a URL in @FILE."
        )
    subject, body = "A test of nested-tune's alerts", f"{current_user()} asked for it. All is well."
    block: Any = Block.load_from_ref(block_id)
    try:
        if isinstance(block, Webhook):
            asyncio.run(block.call(payload={"text": f"{subject}\n{body}"})).raise_for_status()
        else:
            block.notify(body, subject)
    except httpx.HTTPStatusError as error:  # whose text contains the URL, a secret
        reason = f"the webhook answered {error.response.status_code}"
        raise NestedTuneError(f"The test alert was not sent: {reason}") from None
    except Exception as error:  # of the block's library; its text may contain the secret
        raise NestedTuneError(f"The test alert was not sent: {type(error).__name__}") from None
    return "test alert: sent"


def put_automations(
    client: SyncPrefectClient, automations: list[dict[str, Any]], block: UUID | None
) -> Iterator[str]:
    """Make or update each automation; the last line says so where nobody is told of alerts."""
    is_told = False
    alerts = read_automations(client, [each["name"] for each in automations if "notify" in each])
    usual = next(filter(None, map(alert_block, alerts)), None)
    for planned in automations:
        wanted = complete_automation(client, planned, block, usual)
        yield f"automation {wanted.name!r}: {_put_automation(client, wanted)}"
        is_told = is_told or ("notify" in planned and wanted.actions[0].type != "do-nothing")
    if not is_told:
        yield NO_ALERTS_WARNING


def complete_automation(
    client: SyncPrefectClient, plan: dict[str, Any], block: UUID | None, usual: UUID | None = None
) -> AutomationCore:
    """Return an automation of automations.yaml with the id of its notification block.

    block: the block that alerts are sent to. None keeps the block that the alert has on the server;
        an alert that is not there yet gets `usual`, the block of the other alerts.
    """
    completed = {key: value for key, value in plan.items() if key != "notify"}
    existing = read_automations(client, [plan["name"]])
    if "notify" in plan:
        if block is None:
            block = next(filter(None, map(alert_block, existing)), None) if existing else usual
        completed["actions"] = [alert_action(client, block, plan["notify"])]
    completed["enabled"] = existing[0].enabled if existing else True
    return AutomationCore.model_validate(completed)


def _put_automation(client: SyncPrefectClient, planned: AutomationCore) -> str:
    """Create or update an automation, delete others of its name, and return what was done.

    If two processes create it at once, both then see two and keep the one with the lower id. An
    automation that is as planned is not updated, since it would forget what it waits for, such as
    the next heartbeat of an active run.
    """
    if read_automations(client, [planned.name]):
        done = "put in place" if planned.enabled else "put in place, and stays paused"
    else:
        client.create_automation(planned)
        done = "made"
    first, *doubles = sorted(read_automations(client, [planned.name]), key=attrgetter("id"))
    for automation in doubles:
        with _ignoring_missing():
            client.delete_automation(automation.id)
    if _describe_automation(first) == _describe_automation(planned):
        return "there already" if done == "put in place" else done
    with _ignoring_missing():
        client.update_automation(first.id, planned)
    return done


def _describe_automation(automation: AutomationCore) -> dict[str, Any]:
    """Return what an automation does and when, but not whether it is switched on."""
    described = automation.model_dump(
        mode="json", include={"description", "trigger", "actions"}, exclude_none=True
    )
    for key in ("after", "expect", "for_each"):
        described["trigger"][key] = sorted(described["trigger"].get(key, ()))
    return described


@contextmanager
def _ignoring_missing() -> Iterator[None]:
    """Go on where the server answers that something is not there: another deploy removed it."""
    try:
        yield
    except httpx.HTTPStatusError as error:
        if error.response.status_code != httpx.codes.NOT_FOUND:
            raise
