"""What whoever listens hears of an adapter: verified, rejected, promoted and rolled_back."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client

from flows.finetune import FinetuneParameters, finetune
from flows.rollback import RollbackParameters, rollback
from nested_core import registry as core
from tests.core.registry.conftest import write_run
from tests.example import example_settings
from tests.waiting import SECONDS

pytestmark = pytest.mark.usefixtures("prefect_server")


def events_of(name: str, count: int) -> list[tuple[str, dict[str, Any]]]:
    """The events on `adapter.NAME`, oldest first; the server takes a while to list them."""
    wanted = {"resource": {"id": [f"adapter.{name}"]}, "event": {"prefix": ["adapter."]}}
    deadline = time.monotonic() + SECONDS
    while True:
        with get_client(sync_client=True) as client:
            answer = client.request("POST", "/events/filter", json={"filter": wanted})
        found = [(e["event"], e["payload"]) for e in answer.json()["events"]][::-1]
        if len(found) >= count or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def run_flow(folder: Path, name: str, promote: str, **changes: Any) -> Any:
    target = {"path": str(folder / "registry"), "name": name, "promote": promote}
    settings = {"iters": 4, "val_batches": 1, "registry": target, "run_dir": str(folder / "run")}
    values = example_settings(**settings | changes)
    return finetune(FinetuneParameters.model_validate(values), return_state=True)


def test_a_verified_and_promoted_adapter_is_announced_with_what_promote_needs(
    tmp_path: Path,
) -> None:
    state = run_flow(tmp_path, "announced", "always")
    version = core.read_champion(tmp_path / "registry", "announced")
    assert version is not None
    assert re.fullmatch(
        rf"verified {version[:6]}: val loss [0-9.]+ -> [0-9.]+; promoted", str(state.message)
    )
    assert events_of("announced", 2) == [
        (
            "adapter.verified",
            {
                "version": version,
                "registry": str(tmp_path / "registry"),
                "run_dir": str(tmp_path / "run"),
            },
        ),
        ("adapter.promoted", {"version": version, "previous": None}),
    ]


@pytest.mark.slow("a flow that trains and judges a run of its own")
def test_a_version_that_waits_for_approval_is_verified_and_not_promoted(tmp_path: Path) -> None:
    state = run_flow(tmp_path, "waiting", "approve")
    (version,) = core.list_versions(tmp_path / "registry", "waiting")
    assert state.is_completed()
    assert str(state.message).endswith(
        f"; waiting for approval of {version[:12]}: registry.promote is approve"
    )
    assert [event for event, _ in events_of("waiting", 1)] == ["adapter.verified"]
    assert core.read_champion(tmp_path / "registry", "waiting") is None


@pytest.mark.slow("a flow run of its own")
def test_a_rejected_adapter_is_announced_with_the_reason(tmp_path: Path) -> None:
    gate = {"min_relative_change": 1e6}  # more than any training does
    state = run_flow(tmp_path, "refused", "always", gate=gate)
    assert state.is_failed()
    ((event, payload),) = events_of("refused", 1)
    assert event == "adapter.rejected"
    assert payload["run_dir"] == str(tmp_path / "run")
    verdict = json.loads((tmp_path / "run" / "gate.json").read_bytes())
    assert verdict["reasons"][0]["code"] in payload["reason"]


def test_a_rollback_is_announced(tmp_path: Path) -> None:
    registry, name = tmp_path / "registry", "back"
    versions = [
        core.register(write_run(tmp_path / str(seed), seed), registry, name, {}) for seed in (1, 2)
    ]
    for version in versions:
        core.promote(registry, name, version, by="ann")
    rollback(RollbackParameters(registry=str(registry), name=name, by="ann"))
    assert events_of(name, 1) == [
        ("adapter.rolled_back", {"version": versions[0], "previous": versions[1]})
    ]
