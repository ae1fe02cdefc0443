"""`deploy` where there is nothing to deploy to, and where another one is under way."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate, WorkPoolUpdate
from prefect.schedules import Schedule

from flows.rooms.deploy.command import read_notify, run_deploy
from flows.rooms.deploy.deploy import _make_work_pools, deploy, put_deployment
from flows.rooms.deploy.planned_deployments import make_plan, read_work_pools
from nested_core.errors import ConfigError
from nested_core.seams import is_there


@pytest.mark.slow("a process that imports Prefect")
def test_without_a_server_deploy_exits_2_and_says_what_to_set(nested_tune) -> None:
    refused = nested_tune("deploy", COLUMNS="80")  # a process of its own, which has no server
    assert refused.code == 2
    assert "PREFECT_API_URL is not set" in refused.message()


@pytest.mark.slow("a process that imports Prefect")
def test_a_server_that_does_not_answer_is_said_in_a_paragraph(nested_tune) -> None:
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
    pools = read_work_pools()
    with get_client(sync_client=True) as client:
        for pool in client.read_work_pools():  # of other tests on this server
            client.delete_work_pool(pool.name)

        def meanwhile(pool: WorkPoolCreate) -> Any:
            monkeypatch.undo()
            list(_make_work_pools(client, pools))
            return client.create_work_pool(pool)

        monkeypatch.setattr(client, "create_work_pool", meanwhile)
        first, again = list(_make_work_pools(client, pools)), list(_make_work_pools(client, pools))
    assert "made, limit" in first[0]
    assert all("there already" in line for line in [*first[1:], *again])


@pytest.mark.usefixtures("prefect_server")
def test_a_pool_without_a_limit_as_a_worker_makes_it_gets_one_and_another_limit_is_kept() -> None:
    plan = make_plan()
    with get_client(sync_client=True) as client:
        list(_make_work_pools(client, plan.work_pools))
        for name, limit in (("mlx-gpu", None), ("cpu", 3)):
            client.update_work_pool(name, WorkPoolUpdate(concurrency_limit=limit))
        lines = list(_make_work_pools(client, plan.work_pools))
        limits = [client.read_work_pool(name).concurrency_limit for name in ("mlx-gpu", "cpu")]
    assert limits == [1, 3]
    assert lines[0] == "work pool mlx-gpu: there without a limit, and has one now, limit 1"


TEMPLATES = [
    "Hello {{ name }}, bye",
    "{{ whole }}",
    "{{ $HF_TOKEN }}",
    "{{ adapter }} of {{ registry }} in {{ $NESTED_TUNE_HOME }}",
    "{{ prefect.variables.x }} {{ prefect.blocks.secret.y }} {{ $",
]


@pytest.mark.slow("puts everything on a server")
def test_a_configurations_own_braces_reach_the_server_and_no_variable_of_the_environment(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_only_in_tests")
    monkeypatch.setenv("NESTED_TUNE_HOME", str(tmp_path))
    content = {
        "model": "models/{{ $HF_TOKEN }}",
        "data": "data/{{ name }}",
        "samples": TEMPLATES,
        "registry": {"path": "registry {{ x }}", "name": "braces"},
    }
    config = tmp_path / "braces.yaml"
    config.write_text(yaml.safe_dump(content))
    plan = make_plan(config=config)
    list(deploy(plan))
    with get_client(sync_client=True) as client:
        nightly = client.read_deployment_by_name("finetune/braces-nightly")
        manual = client.read_deployment_by_name("finetune/braces-manual")
        hourly = client.read_deployment_by_name("reconcile/braces-hourly")
        everything = client.request("POST", "/deployments/filter", json={}).text
        run = client.create_flow_run_from_deployment(nightly.id)
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)
    for values in (nightly.parameters["config"], manual.parameters["config"]):
        assert {key: values[key] for key in content.keys() - {"registry"}} == {
            key: content[key] for key in content.keys() - {"registry"}
        }
    assert run.parameters["config"]["samples"] == TEMPLATES
    assert hourly.parameters["config"]["registry"] == "registry {{ x }}"
    assert nightly.pull_steps is not None
    assert nightly.pull_steps[0]["prefect.deployments.steps.set_working_directory"] == {
        "directory": str(tmp_path)
    }
    assert nightly.job_variables["command"].endswith(
        " -m nested_core.process.our_packages prefect.engine"
    )
    assert "$" not in nightly.job_variables["command"]
    assert "hf_only_in_tests" not in everything


@pytest.mark.slow("puts everything on a server")
def test_that_nobody_is_told_of_alerts_is_said_once_and_at_the_end(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    with get_client(sync_client=True) as client:
        for alert in client.read_automations():  # of other tests, which send it somewhere
            client.delete_automation(alert.id)
    given = {"config": None, "file": None, "notify": None, "test_alert": False, "pool": "process"}
    run_deploy(argparse.Namespace(**given, json=False, output=None))()
    printed = capsys.readouterr()
    assert "NOBODY IS NOTIFIED" not in printed.err
    assert printed.out.count("NOBODY IS NOTIFIED") == 1
    page = r"geography-nights: http\S+/artifacts/artifact/[0-9a-f-]{36}"
    page = page if is_there("nights") else r"of all runs: http\S+/runs\n"
    assert re.search(f"page {page}", printed.err)
    assert [line for line in printed.out.splitlines() if line.startswith("  prefect ")] == [
        "  prefect worker start --pool cpu",
        "  prefect worker start --pool mlx-gpu",
        "  prefect deployment run finetune/geography-nightly",
    ]


@pytest.mark.slow("puts everything on a server twice")
def test_deploying_again_puts_what_the_file_says_and_keeps_what_a_person_switched_on(
    prefect_server: None, tmp_path: Path
) -> None:
    config = tmp_path / "again.yaml"
    content = {"model": "m", "data": "d", "registry": {"path": "registry", "name": "again"}}
    config.write_text(yaml.safe_dump(content | {"seed": 1}))
    list(deploy(make_plan(config=config)))
    with get_client(sync_client=True) as client:
        nightly = client.read_deployment_by_name("finetune/again-nightly")
        client.update_deployment_schedule(nightly.id, nightly.schedules[0].id, active=True)
        (alert,) = client.read_automations_by_name("nested-tune alert: an unusual night")
        client.pause_automation(alert.id)
        client.create_deployment(
            nightly.flow_id, "old", parameters=nightly.parameters, tags=["nested-tune"]
        )
        config.write_text(yaml.safe_dump(content | {"seed": 2}))
        done = list(deploy(make_plan(config=config)))
        client.resume_automation(alert.id)
        nightly = client.read_deployment_by_name("finetune/again-nightly")
        names = {deployment.name for deployment in client.read_deployments()}
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)
    assert "deployment finetune/again-nightly: in pool mlx-gpu, schedule nightly on" in done
    assert "deployment finetune/old: removed, for an earlier deploy left it" in done
    assert nightly.parameters["config"]["seed"] == 2
    assert "old" not in names
    again = [line for line in done if line.startswith("automation")]
    (paused,) = [line for line in again if not line.endswith("there already")]
    assert paused == f"automation {alert.name!r}: put in place, and stays paused"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"entrypoint": "flows.nowhere.flow"}, "No module named 'flows.nowhere'"),
        ({"entrypoint": "flows.finetune.nothing"}, "nothing"),
        ({"schedules": (Schedule(cron="0 2 * * *", timezone="Mars/Base"),)}, "Mars/Base"),
    ],
)
def test_a_deployment_that_cannot_be_made_is_refused_with_its_name(
    prefect_server: None, changes: dict[str, Any], expected: str
) -> None:
    planned = make_plan().deployments[0].model_copy(update=changes)
    with (
        get_client(sync_client=True) as client,
        pytest.raises(ConfigError, match="geography-nightly") as refused,
    ):
        put_deployment(client, planned, [])
    assert expected in str(refused.value)
