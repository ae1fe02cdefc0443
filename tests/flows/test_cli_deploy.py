"""`deploy` where there is nothing to deploy to, and where another one is under way."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect.client.orchestration import get_client
from prefect.workers.process import ProcessWorker

from flows.commands.deployment import read_notify
from flows.deploy import _make_work_pools
from flows.deployment_plan import read_deployments_yaml
from flows.packaged_files import packaged_folder
from nested_core.errors import ConfigError
from tests.flows.conftest import Ended


def test_without_a_server_deploy_exits_2_and_says_what_to_set(
    nested_tune: Callable[..., Ended],
) -> None:
    refused = nested_tune("deploy", COLUMNS="80")  # a process of its own, which has no server
    assert refused.code == 2
    assert "PREFECT_API_URL is not set" in refused.message()


def test_a_server_that_does_not_answer_is_said_in_a_paragraph(
    nested_tune: Callable[..., Ended],
) -> None:
    nowhere = {"PREFECT_API_URL": "http://127.0.0.1:9/api", "PREFECT_CLIENT_MAX_RETRIES": "0"}
    failed = nested_tune("deploy", **nowhere)
    assert failed.code == 1
    assert "Expected a Prefect server at PREFECT_API_URL" in failed.message()


def test_where_alerts_go_is_read_from_a_file_so_that_no_list_of_processes_shows_it(
    tmp_path: Path,
) -> None:
    (tmp_path / "url").write_text("https://chat.example/hooks/secret\n")
    assert read_notify(f"@{tmp_path / 'url'}") == "https://chat.example/hooks/secret"
    assert read_notify("slack-webhook/ops") == "slack-webhook/ops"
    (tmp_path / "empty").touch()
    with pytest.raises(ConfigError, match="empty: the file holds 0 words. Expected a notification"):
        read_notify(f"@{tmp_path / 'empty'}")


def test_work_pools_that_another_deploy_makes_meanwhile_are_made(
    prefect_server: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two machines that start together may deploy together."""
    pools = read_deployments_yaml(packaged_folder("deployments") / "work-pools.yaml")["work_pools"]
    template = ProcessWorker.get_default_base_job_template
    with get_client(sync_client=True) as client:

        def meanwhile() -> Any:
            monkeypatch.undo()
            list(_make_work_pools(client, pools))
            return template()

        monkeypatch.setattr(ProcessWorker, "get_default_base_job_template", meanwhile)
        first, again = list(_make_work_pools(client, pools)), list(_make_work_pools(client, pools))
    assert "made, limit" in first[0]
    assert all("there already" in line for line in [*first[1:], *again])
