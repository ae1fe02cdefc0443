"""Which host has the folder of a flow run: kept as labels of the flow run on Prefect's server.

Workers of one pool may be on several hosts, each with a runs/ of its own. A run that is tried again
on another host than it began on would find no folder there, and train from the first step.
"""

from __future__ import annotations

import socket
from pathlib import Path
from uuid import UUID

from prefect import runtime
from prefect.context import FlowRunContext
from prefect.types import KeyValueLabels

from nested_core.errors import ConfigError
from tasks.prefect_server import asking_server

HOST_LABEL, FOLDER_LABEL = "nested-tune.host", "nested-tune.run_dir"


def note_run_place(folder: Path) -> None:
    """Keep this host's name and the run's folder as labels of this process's flow run."""
    labels: KeyValueLabels = {HOST_LABEL: socket.gethostname(), FOLDER_LABEL: str(folder.resolve())}
    with asking_server("the run has no label of the host that has its folder") as client:
        client.update_flow_run_labels(UUID(str(runtime.flow_run.id)), labels)


def require_begun_here() -> None:
    """Raise ConfigError where this flow run, which has no folder here, has one on another host."""
    context = FlowRunContext.get()
    labels = {} if context is None or context.flow_run is None else context.flow_run.labels
    here, host, folder = socket.gethostname(), labels.get(HOST_LABEL), labels.get(FOLDER_LABEL)
    if host is None or host == here:
        return
    raise ConfigError(
        f"This run began on the host {host}, which has its folder {folder} with the checkpoints, "
        f"and {here} has no such folder. Nothing was trained here. Retry the run when a worker of "
        f"{host} takes it, or copy the folder to {here} under the same path and retry (rsync -a "
        f"{host}:{folder}/ {folder}/). A runs/ that all hosts of a pool share needs neither. A new "
        f"run of the deployment begins from the first step."
    )
