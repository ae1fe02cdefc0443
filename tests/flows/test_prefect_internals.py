"""What of Prefect is used here that its documentation does not promise, each looked at.

An upgrade that breaks one of them breaks a test that names it. Whoever imports another module of
Prefect adds it here: to the public ones, or as a line with a test of what is expected of it.
"""

from __future__ import annotations

import ast
import inspect
import logging
from importlib import import_module
from pathlib import Path

import pytest

from nested_core import seams

ROOT = Path(__file__).resolve().parents[2]
# Modules whose names are documented; of `prefect.states` and the like, whatever they export.
PUBLIC = {
    "prefect",
    "prefect.artifacts",
    "prefect.blocks.core",
    "prefect.blocks.webhook",
    "prefect.cache_policies",
    "prefect.client.orchestration",
    "prefect.client.schemas.actions",
    "prefect.client.schemas.filters",
    "prefect.client.schemas.objects",
    "prefect.client.schemas.responses",
    "prefect.client.schemas.schedules",
    "prefect.client.schemas.sorting",
    "prefect.deployments",
    "prefect.events",
    "prefect.exceptions",
    "prefect.flow_runs",
    "prefect.flows",
    "prefect.input",
    "prefect.schedules",
    "prefect.settings",
    "prefect.states",
    "prefect.tasks",
    "prefect.workers.base",
}
# "module.name" -> where it is used.
PRIVATE = {
    "prefect.context.FlowRunContext": "flows/flow_runs/nights.py",
    "prefect.events.filters.AutomationFilter": "flows/rooms/deploy/alerts.py",
    "prefect.events.filters.AutomationFilterName": "flows/rooms/deploy/alerts.py",
    "prefect.events.schemas.automations.Automation": "flows/rooms/deploy/alerts.py",
    "prefect.events.schemas.automations.AutomationCore": "flows/rooms/deploy/alerts.py",
    "prefect.logging.configuration.setup_logging": "flows/flow_runs/prefect_logs.py",
    "prefect.logging.handlers.PrefectConsoleHandler": "flows/flow_runs/prefect_logs.py",
    "prefect.server.api.server.create_app": "flows/process/local_server.py",
    "prefect.types.KeyValueLabels": "flows/flow_runs/run_place.py",
    "prefect.types.SecretDict": "flows/rooms/deploy/alerts.py",
    "prefect.utilities.callables.parameter_schema": "flows/rooms/deploy/deploy.py",
    "prefect.utilities.context.get_task_and_flow_run_ids": "tasks/artifact_client.py",
}


def imported_names() -> dict[str, str]:
    """Each "module.name" of Prefect that flows and tasks import, and a file that does."""
    found = {}
    for file in sorted([*ROOT.glob("flows/**/*.py"), *ROOT.glob("tasks/**/*.py")]):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "prefect":
                for alias in node.names:
                    found[f"{node.module}.{alias.name}"] = str(file.relative_to(ROOT))
    return found


def test_every_import_of_prefect_is_of_a_public_module_or_is_listed_here() -> None:
    private = {name for name in imported_names() if name.rpartition(".")[0] not in PUBLIC}
    rooms = {name: seams.room_of(path.replace("/", ".")) for name, path in PRIVATE.items()}
    assert private == {name for name, room in rooms.items() if room is None or seams.is_there(room)}


def test_logging_that_is_set_up_again_keeps_its_handlers() -> None:
    from prefect.logging.configuration import setup_logging
    from prefect.logging.handlers import PrefectConsoleHandler

    setup_logging()
    before = list(logging.getLogger().handlers)
    setup_logging()
    assert logging.getLogger().handlers == before
    (console,) = [each for each in before if isinstance(each, PrefectConsoleHandler)]
    assert callable(console.console.on_broken_pipe)


def test_the_words_of_the_engines_that_our_filter_looks_for_are_theirs() -> None:
    for module, words in (
        ("prefect.flow_engine", ["Finished in state", "Encountered exception during execution"]),
        ("prefect.task_engine", ["Finished in state"]),
        ("prefect._internal.concurrency.services", ["Still processing items"]),
    ):
        source = inspect.getsource(import_module(module))
        assert [each for each in words if each not in source] == [], module


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("prefect.server.concurrency.lease_storage.filesystem", "ConcurrencyLeaseStorage"),
        ("prefect.deployments.steps", "set_working_directory"),
        ("prefect.engine", "__file__"),
    ],
)
def test_what_the_deployments_files_name_is_there(setting: str, expected: str) -> None:
    text = "".join(
        (ROOT / "deployments" / name).read_text() for name in ("settings.env", "prefect.yaml")
    )
    assert setting in text
    from importlib.util import find_spec

    if setting == "prefect.engine":  # importing it runs a flow
        assert find_spec(setting) is not None
    else:
        assert hasattr(import_module(setting), expected)


@pytest.mark.slow("a run with Prefect's server")
def test_the_events_that_an_automation_counts_have_the_labels_that_it_matches() -> None:
    import prefect.server.models.events as events

    source = inspect.getsource(events.flow_run_state_change_event)
    assert '"prefect.run-count": str(flow_run.run_count)' in source
    assert '"prefect.state-type"' in source
