"""Asks a person about a version that its policy promotes only then: a run of promote/auto.

The run that registered the version asks, and so does the hourly reconcile for what nobody was asked
about. A key for each version makes both ask for one and the same run: no event has to arrive.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.client.schemas.responses import SetStateStatus
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Scheduled, State

from nested_core.registry.promotion_policy import WAITING_OUTCOME
from tasks.server_outage import tolerating_server_outage

PROMOTION = "promote/auto"


def request_approval_if_waiting(registry: Path, name: str, version: str, outcome: str) -> None:
    """Ask about a version whose promotion ended with `outcome`, where that waits for a person.

    Where the server is away, the next reconcile asks.
    """
    if not outcome.startswith(WAITING_OUTCOME):
        return
    with tolerating_server_outage(f"nobody is asked about {name} {version:.12} yet"):
        try:
            _request_approval(registry.resolve(), name, version)
        except ObjectNotFound:
            get_run_logger().warning(
                "Nobody is asked about %s %.12s: this server has no deployment %s, which "
                "`nested-tune deploy` makes. `nested-tune promote` promotes a run by name.",
                name,
                version,
                PROMOTION,
            )


def _request_approval(registry: Path, name: str, version: str) -> None:
    """Start promote/auto for a version, or find the run that was started for it."""
    config = {"registry": str(registry), "name": name, "version": version}
    run: Any = run_deployment(
        PROMOTION,
        parameters={"config": config | {"requires_approval": True}},
        timeout=0,
        as_subflow=False,
        idempotency_key=f"approve {registry} {name} {version}",
        tags=[name],
    )
    if has_ended_unasked(run):
        with get_client(sync_client=True) as client:
            again: State[None] = Scheduled()
            result = client.set_flow_run_state(run.id, again)
        if result.status != SetStateStatus.ACCEPT:
            get_run_logger().warning("%s cannot be asked about again: %s", name, result.details)


def has_ended_unasked(run: FlowRun) -> bool:
    """Whether a run crashed, or failed before it put its question; it is then to begin again.

    A question that was cancelled, or that nobody answered in time, leaves things as they are.
    """
    if run.state is None:
        return False
    has_asked = bool(run.empirical_policy.pause_keys)
    return run.state.is_crashed() or (run.state.is_failed() and not has_asked)
