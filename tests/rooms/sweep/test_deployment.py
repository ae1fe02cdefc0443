"""The deployment of a sweep: what `deploy` makes of it, and its form."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from flows.rooms.deploy.planned_deployments import FINETUNE_ENTRYPOINT, make_plan
from flows.rooms.deploy.pool_sizes import route_by_forecast
from flows.rooms.sweep.flow import SweepParameters, sweep
from nested_core.errors import ConfigError
from tests.example import example_config
from tests.flows.test_form import check_fields, definitions
from tests.rooms.deploy.test_pool_sizes import planned


def test_each_registry_name_has_a_sweep_whose_runs_its_manual_deployment_trains(tmp_path) -> None:
    config = {"model": "m", "data": "d", "registry": {"path": "/srv/adapters", "name": "bot"}}
    (tmp_path / "bot.yaml").write_text(yaml.safe_dump(config | {"samples": ["{{ adapter }}"]}))
    plan = make_plan(config=tmp_path / "bot.yaml")
    (manual,) = (each for each in plan.deployments if each.name == "bot-manual")
    (deployment,) = (each for each in plan.deployments if each.name == "bot-sweep")
    assert deployment.full_name == "sweep/bot-sweep"
    assert "watched" in deployment.tags
    given = deployment.parameters["config"]
    assert given["base"] == manual.parameters["config"]
    assert given["base"]["samples"] == ["{{ adapter }}"]
    assert given["deployment"] == "finetune/bot-manual"
    assert SweepParameters.model_validate(given).base.registry.promote == "better"


def test_a_sweep_without_a_base_is_refused(tmp_path: Path) -> None:
    deployment: dict[str, Any] = {"name": "mine", "entrypoint": "flows.rooms.sweep.flow.sweep"}
    deployment |= {"work_pool": {"name": "cpu"}, "parameters": {"config": {"grid": {}}}}
    (tmp_path / "prefect.yaml").write_text(yaml.safe_dump({"deployments": [deployment]}))
    with pytest.raises(ConfigError, match=r"has its configuration in parameters\.config\.base"):
        make_plan(tmp_path / "prefect.yaml")


@pytest.mark.parametrize("deployment", ["promote/x", "other-flow/x", "finetune/x/y", "/x"])
def test_a_sweep_starts_no_other_flow(deployment: str) -> None:
    with pytest.raises(ValidationError, match="deployment"):
        SweepParameters(base=example_config(), grid={"seed": [1]}, deployment=deployment)


def test_its_form_keeps_the_order_of_the_schema_and_asks_for_model_and_data() -> None:
    check_fields(sweep)
    schema = definitions(sweep)["FineTuneConfig"]
    assert list(schema["properties"])[:2] == ["model", "data"] == schema["required"]


@pytest.mark.slow("forecasts four configurations")
def test_the_fine_tune_of_a_sweep_goes_to_a_pool_that_holds_its_largest_point(tmp_path) -> None:
    plan = planned(tmp_path, {"mlx-small": 0.02, "mlx-80": 80})
    (sweep,) = (each for each in plan.deployments if each.name == "sized-sweep")
    grid = {"batch_size": [4, 32], "learning_rate": [1e-3, 1e-4]}
    varied = sweep.model_copy(
        update={"parameters": {"config": sweep.parameters["config"] | {"grid": grid}}}
    )
    queued = [
        each.model_copy(
            update={"work_pool": each.work_pool.model_copy(update={"work_queue_name": "urgent"})}
        )
        for each in plan.deployments
        if each.entrypoint == FINETUNE_ENTRYPOINT
    ]
    plan, lines = route_by_forecast(replace(plan, deployments=(*queued, varied)), print)
    found = {each.full_name: each.work_pool for each in plan.deployments}
    assert found["finetune/sized-nightly"].name == "mlx-small"
    assert found["finetune/sized-manual"].name == "mlx-80"
    assert "(for sweep/sized-sweep), so it is for pool mlx-80" in lines[1]
    assert found["finetune/sized-manual"].work_queue_name is None  # a queue of the pool it left
    assert found["sweep/sized-sweep"] == varied.work_pool  # it trains nothing itself
