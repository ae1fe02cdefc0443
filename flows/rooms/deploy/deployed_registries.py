"""Which registry of an adapter a Prefect server's deployments name: for it alone events are sent.

A copy of a registry, or one that was moved, is another folder: it is silent until `nested-tune
deploy` names it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterTags
from prefect.client.schemas.responses import DeploymentResponse

from nested_core.storage.output_places import resolve_path
from tasks.events import ServerPages
from tasks.prefect_server import TAG

READ_PAGE_SIZE = 200
ENTER_STEP = "prefect.deployments.steps.set_working_directory"


def read_deployments(client: SyncPrefectClient) -> list[DeploymentResponse]:
    """Return all deployments of a server that carry our tag."""
    wanted = DeploymentFilter(tags=DeploymentFilterTags(all_=[TAG]))
    found: list[DeploymentResponse] = []
    while page := client.read_deployments(
        deployment_filter=wanted, limit=READ_PAGE_SIZE, offset=len(found)
    ):
        found += page
    return found


def read_server_deployments(client: SyncPrefectClient) -> dict[str, DeploymentResponse]:
    """Return all deployments of a server that carry our tag, by FLOW/DEPLOYMENT."""
    responses = read_deployments(client)
    flows = {flow_id: client.read_flow(flow_id).name for flow_id in {r.flow_id for r in responses}}
    return {f"{flows[response.flow_id]}/{response.name}": response for response in responses}


def why_silent(client: SyncPrefectClient, registry: Path, name: str) -> str | None:
    """Return why the server is told nothing of an adapter of this registry; None where it is."""
    folder = resolve_path(registry)
    if any(_names_registry(each, folder, name) for each in read_deployments(client)):
        return None
    return (
        f"Prefect's server got no event of {name}: none of its deployments names {folder} as "
        f"its registry, as is right for a copy. `nested-tune deploy -c CONFIG` names it."
    )


def _names_registry(deployment: DeploymentResponse, folder: Path, name: str) -> bool:
    """Tell if a deployment's parameters name an adapter, or all, of the registry in a folder.

    A relative path starts in the folder that the deployment's runs enter.
    """
    place, names = adapters_in(deployment.parameters)
    if place is None or name not in (names or (name,)):
        return False
    steps = [step[ENTER_STEP] for step in deployment.pull_steps or () if ENTER_STEP in step]
    home = steps[-1]["directory"] if steps else "."
    return resolve_path(Path(home, Path(place).expanduser())) == folder


def adapters_in(parameters: dict[str, Any]) -> tuple[str | None, tuple[str, ...]]:
    """Return the registry that a deployment's parameters name, and its adapters; () for all."""
    config = parameters.get("config")
    if not isinstance(config, dict):
        return None, ()
    section = config.get("base", config).get("registry")
    if isinstance(section, dict):  # of a flow that trains
        place, names = section.get("path"), [section.get("name")]
    else:
        place, names = section, [config["name"]] if "name" in config else config.get("names") or []
    return None if place is None else str(place), tuple(str(n) for n in names if n is not None)


SERVER = ServerPages(why_silent=why_silent)
