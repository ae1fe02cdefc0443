"""`deploy --pool`: Prefect's own templates and workers' code, with what is ours in them."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import WorkPoolCreate
from prefect.client.schemas.objects import Flow, FlowRun
from prefect.workers.base import BaseWorker

from flows.process.environment import packaged_folder
from flows.rooms.deploy.command import PoolType, _forecast_request
from flows.rooms.deploy.container_pools import NO_REQUEST, PROCESS_MIB, Request, make_job_template
from flows.rooms.deploy.deploy import _make_work_pools, deploy
from flows.rooms.deploy.planned_deployments import DeploymentPlan, make_plan, read_work_pools
from nested_core.errors import ConfigError
from tests.left_out import needs_rooms

CONFIG = packaged_folder("deployments") / "geography.yaml"
REQUEST = Request(memory_mib=2048, gpus=2)
of_docker = pytest.mark.production  # needs the extras docker and kubernetes, as few have them


def plan_for(pool: PoolType) -> DeploymentPlan:
    """The example's plan; skipped without the package of that pool's worker."""
    pytest.importorskip(f"prefect_{pool}", reason=f"the extra {pool} is not installed")
    return make_plan(pool=pool, request=REQUEST)


def configure(plan: DeploymentPlan, name: str) -> Any:
    """What the worker's own code makes of a deployment of the plan, for a run of it."""
    (planned,) = (each for each in plan.deployments if each.name == name)
    pool = next(each for each in plan.work_pools if each.name == planned.work_pool.name)
    worker = BaseWorker.get_worker_class_from_type(str(pool.type))
    assert worker is not None
    values = planned.describe()["job_variables"]
    configuration = asyncio.run(
        worker.job_configuration.from_template_and_values(pool.base_job_template, values)
    )
    run = FlowRun(id=uuid4(), flow_id=uuid4(), name="geography, 29 Nov 02:00")
    configuration.prepare_for_flow_run(run, flow=Flow(id=run.flow_id, name="finetune", labels={}))
    return configuration


@of_docker
@pytest.mark.usefixtures("prefect_server")
def test_a_container_of_docker_has_image_volume_request_and_prefects_own_command() -> None:
    plan = plan_for("docker")
    trains, decides = configure(plan, "geography-nightly"), configure(plan, "geography-hourly")
    for each in (trains, decides):
        assert each.image == "nested-tune:latest"
        assert each.volumes == ["nested-tune:/work"]
        assert each.env["NESTED_TUNE_REGISTRIES"] == "registry"
        assert each.command == "prefect flow-run execute"
    options = trains.container_create_kwargs
    assert options["mem_reservation"] == "2048m"
    assert options["device_requests"] == [{"count": 2, "capabilities": [["gpu"]]}]
    assert decides.container_create_kwargs is None


@of_docker
@pytest.mark.usefixtures("prefect_server")
def test_a_job_of_kubernetes_is_what_the_schema_of_its_api_says() -> None:
    schema = pytest.importorskip("kubernetes_validate", reason="pip install kubernetes-validate")
    plan = plan_for("kubernetes")
    for name in ("geography-nightly", "geography-hourly"):
        manifest = configure(plan, name).job_manifest
        schema.validate(manifest, "1.32", strict=False)
        pod = manifest["spec"]["template"]["spec"]
        for key in ("completions", "parallelism"):  # Prefect's: of a job, and ignored in a pod
            del pod[key]
        schema.validate(manifest, "1.32", strict=True)
        (container,) = pod["containers"]
        assert container["args"] == ["prefect", "flow-run", "execute"]
        assert container["volumeMounts"] == [{"name": "work", "mountPath": "/work"}]
        resources = container["resources"]
        asks = {"requests": {"memory": "2048Mi"}, "limits": {"nvidia.com/gpu": 2}}
        assert {k: v for k, v in resources.items() if v} == (asks if "nightly" in name else {})
    pod["containers"][0]["resources"]["limits"] = {"nvidia.com/gpu": [2]}
    with pytest.raises(schema.ValidationError):
        schema.validate(manifest, "1.32", strict=True)


@of_docker
@pytest.mark.parametrize("pool", ["docker", "kubernetes"])
def test_nothing_of_the_deploying_machine_reaches_the_server(
    prefect_server: None, pool: PoolType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_HOME", "/srv/of-this-machine")
    plan = plan_for(pool)
    with get_client(sync_client=True) as client:
        for there in client.read_work_pools():
            client.delete_work_pool(there.name)
        list(deploy(plan))
        everything = client.request("POST", "/deployments/filter", json={}).text
        pools = client.request("POST", "/work_pools/filter", json={}).text
        for deployment in client.read_deployments():
            client.delete_deployment(deployment.id)
        for there in client.read_work_pools():
            client.delete_work_pool(there.name)
    nightly = next(d for d in json.loads(everything) if d["name"] == "geography-nightly")
    step = nightly["pull_steps"][0]["prefect.deployments.steps.set_working_directory"]
    assert step == {"directory": "/work"}
    assert nightly["entrypoint"] == "flows.finetune.finetune"
    home, folder = os.path.expanduser("~/"), str(Path(__file__).parents[3])
    for ours in ("of-this-machine", sys.executable, sys.prefix, home, folder, socket.gethostname()):
        assert ours not in everything + pools


def test_a_pool_of_another_type_is_refused_and_stays(prefect_server: None) -> None:
    missing, planned = read_work_pools()
    with get_client(sync_client=True) as client:
        for there in client.read_work_pools():
            client.delete_work_pool(there.name)
        client.create_work_pool(WorkPoolCreate(name=planned.name, type="docker"))
        with pytest.raises(ConfigError, match="cpu of this server is of type docker"):
            list(_make_work_pools(client, [missing, planned]))
        assert [pool.name for pool in client.read_work_pools()] == [planned.name]
        assert client.read_work_pool(planned.name).type == "docker"
        client.delete_work_pool(planned.name)


def test_without_the_package_of_the_worker_its_extra_is_named(monkeypatch) -> None:
    monkeypatch.setattr(BaseWorker, "get_worker_class_from_type", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'nested-tune\[kubernetes\]'"):
        make_job_template("kubernetes", {})


@needs_rooms("planning", "memory")
@pytest.mark.slow("loads a model, as explain does")
def test_a_request_is_the_forecast_of_explain_and_what_a_process_needs(tmp_path, capsys) -> None:
    content = yaml.safe_load(CONFIG.read_text())
    content |= {key: str(CONFIG.parents[1] / content[key]) for key in ("model", "data")}
    config = tmp_path / "geography.yaml"
    config.write_text(yaml.safe_dump(content))
    request = _forecast_request("docker", config)
    assert request.memory_mib is not None
    assert PROCESS_MIB < request.memory_mib < PROCESS_MIB + 100
    assert f"asks for {request.memory_mib} MiB of memory and no GPU" in capsys.readouterr().err
    config.write_text(yaml.safe_dump(content | {"model": str(tmp_path / "absent")}))
    assert _forecast_request("docker", config) == NO_REQUEST
    config.write_text("learning_rate: fast")
    assert _forecast_request("docker", config) == NO_REQUEST
    assert "no request of memory or GPU" in capsys.readouterr().err
