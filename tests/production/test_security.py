"""What a stranger can do: nothing without the password; no secret, pickle or port lies about."""

from __future__ import annotations

import json
import socket
import subprocess
from typing import Any

import httpx
import pytest
from websockets import Subprotocol
from websockets.exceptions import ConnectionClosedError
from websockets.sync.client import connect

from tests.production.stack import AUTH, NAME, TOKEN, Stack
from tests.production.test_production import champion
from tests.webhook_server import SECRET_PATH

pytestmark = [pytest.mark.production, pytest.mark.timeout(600)]
USER, _, PASSWORD = AUTH.partition(":")


def test_without_the_password_nothing_is_read_and_nothing_done(stack: Stack) -> None:
    api = stack.url
    closed = {
        "flow runs": httpx.post(f"{api}/flow_runs/filter", json={}),
        "settings": httpx.get(f"{api}/admin/settings"),
        "variables": httpx.post(f"{api}/variables/filter", json={}),
        "logs": httpx.post(f"{api}/logs/filter", json={}),
        "an event": httpx.post(f"{api}/events", json=[]),
        "wrong password": httpx.get(f"{api}/admin/version", auth=(USER, "wrong")),
    }
    # 403 comes first where a form's token is missing, 401 where only the password is.
    said = {name: answer.status_code for name, answer in closed.items()}
    assert [name for name, status in said.items() if status not in (401, 403)] == []
    assert [said["settings"], said["wrong password"]] == [401, 401]
    # That it is there, and its page without data, is all that is shown.
    for path in ("/health", "/ready"):
        assert httpx.get(f"{api}{path}").status_code == 200


def test_no_event_comes_in_over_a_socket_without_the_password(stack: Stack) -> None:
    url = f"{stack.url.replace('http', 'ws', 1)}/events/in"
    with connect(url, subprotocols=[Subprotocol("prefect")]) as stranger:
        stranger.send(json.dumps({"event": "adapter.verified"}))
        with pytest.raises(ConnectionClosedError, match="Expected 'auth' message"):
            stranger.recv(timeout=30)


def test_a_page_elsewhere_cannot_use_the_browser_of_who_is_signed_in(stack: Stack) -> None:
    forged = httpx.post(
        f"{stack.url}/flow_runs/filter",
        json={},
        auth=(USER, PASSWORD),
        headers={"Origin": "http://elsewhere.test"},
    )
    assert forged.status_code == 403
    assert "CSRF" in forged.text
    asked = httpx.options(
        f"{stack.url}/flow_runs/filter",
        headers={"Origin": "http://elsewhere.test", "Access-Control-Request-Method": "POST"},
    )
    assert asked.headers.get("access-control-allow-origin") != "http://elsewhere.test"


def test_the_server_listens_on_this_machine_alone(stack: Stack) -> None:
    addresses = subprocess.run(["hostname", "-I"], capture_output=True, text=True, check=True)
    for address in addresses.stdout.split():
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        with socket.socket(family) as stranger:
            stranger.settimeout(5)
            assert stranger.connect_ex((address, stack.port)) != 0, address


def test_the_workers_token_is_in_no_parameter_log_or_artifact(stack: Stack) -> None:
    registry = {"path": "registry", "name": "tokens", "promote": "always"}
    stack.wait(stack.submit("finetune/geography-manual", registry=registry))
    assert champion(stack, "tokens") is not None
    seen: dict[str, Any] = {}
    with stack.connected() as client:
        for what in ("flow_runs", "task_runs", "artifacts", "logs", "deployments", "variables"):
            answer = client.request("POST", f"/{what}/filter", json={"limit": 200})  # type: ignore[arg-type]
            seen[what] = answer.json()
    assert seen["flow_runs"]
    assert seen["logs"]
    assert TOKEN not in json.dumps(seen)


def test_the_url_of_the_webhook_is_in_no_log_and_in_no_answer_but_a_block_that_is_asked_for(
    stack: Stack,
) -> None:
    ended = stack.wait(stack.submit("finetune/geography-manual", data="examples/missing"))
    assert ended.state is not None
    assert ended.state.is_failed()
    kinds = ("automations", "block_documents", "deployments", "flow_runs", "events")
    places: list[Any] = [f"/{kind}/filter" for kind in kinds]
    with stack.connected() as client:
        for place in places:
            assert SECRET_PATH not in client.request("POST", place, json={}).text
    assert SECRET_PATH not in stack.logs()


def test_no_result_is_kept_as_a_pickle(stack: Stack) -> None:
    unknown: dict[str, Any] = {"registry": str(stack.registry), "name": NAME, "version": "0" * 64}
    ended = stack.wait(stack.submit("promote/auto", **unknown))  # it keeps what it ends with
    assert ended.state is not None
    assert ended.state.is_failed()
    kept = [path for path in (stack.folder / "prefect").rglob("storage/*") if path.is_file()]
    assert kept
    for path in kept:
        json.loads(path.read_bytes())


def test_doctor_finds_all_well_and_names_the_mend_of_what_is_not(stack: Stack) -> None:
    well = stack.nested_tune("doctor", "--json")
    found = {check["name"]: check for check in json.loads(well.stdout)["checks"]}
    assert [check for check in found.values() if not check["ok"]] == []
    assert found["pool mlx-gpu"]["seen"] == "limit 1"
    assert "postgresql" in found["database"]["seen"]
    with stack.connected() as client:
        (automation,) = client.read_automations_by_name("nested-tune: free dead runs")
        client.pause_automation(automation.id)
    try:
        ill = stack.nested_tune("doctor", "--json")
        found = {check["name"]: check for check in json.loads(ill.stdout)["checks"]}
        assert ill.returncode == 1
        assert found["automations"]["seen"] == "paused: nested-tune: free dead runs"
        assert found["automations"]["mend"] == (
            "prefect automation resume 'nested-tune: free dead runs'"
        )
    finally:
        stack.prefect("automation", "resume", "nested-tune: free dead runs")
