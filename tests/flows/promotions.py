"""Versions judged under a policy, and runs of a deployment of the flow `promote`."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow

from flows.promote import PromoteParameters, promote
from nested_core import registry as core
from tests.builders.registering import register
from tests.core.registry.conftest import write_run

NAME = "capitals"


def register_judged(folder: Path, registry: Path, seed: int, policy: str = "always") -> str:
    """Register the version of a seed under a policy, judged against the champion of now."""
    run = write_run(folder / f"run-{seed}", seed)
    is_first = NAME not in core.list_names(registry)
    champion = None if is_first else core.read_champion(registry, NAME)
    section = {"path": "x", "name": "y", "promote": policy}
    provenance = {"champion_at_gate": champion, "config": {"registry": section}}
    return register(run, registry, NAME, provenance)


def parameters(registry: Path, version: str, **changes: Any) -> PromoteParameters:
    given = {"registry": str(registry), "name": NAME, "version": version}
    return PromoteParameters(**given | changes)


def deployed_run(given: PromoteParameters) -> UUID:
    """A flow run of a deployment of `promote`: only those can be suspended."""
    with get_client(sync_client=True) as client:
        flow_id = client.create_flow(promote)
        deployment_id = client.create_deployment(flow_id=flow_id, name=str(uuid4()))
        values = {"config": given.model_dump(mode="json")}
        return client.create_flow_run_from_deployment(deployment_id, parameters=values).id


def execute(run_id: UUID) -> State[Any]:
    """What a worker's process does with a flow run: run the flow from its top."""
    with get_client(sync_client=True) as client:
        flow_run = client.read_flow_run(run_id)
        values = flow_run.parameters
        with suppress(Pause):  # ends the process, until the run is resumed
            run_flow(promote, flow_run=flow_run, parameters=values, return_type="state")
        state = client.read_flow_run(run_id).state
    assert state is not None
    return state
