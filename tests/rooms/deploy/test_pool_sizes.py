"""`deploy` puts a fine-tune into the smallest pool whose devices hold what `explain` forecasts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from flows.process.environment import packaged_folder
from flows.rooms.deploy.deploy import deploy
from flows.rooms.deploy.planned_deployments import (
    DeploymentPlan,
    make_plan,
    read_deployments_file,
)
from flows.rooms.deploy.pool_sizes import route_by_forecast
from nested_core.errors import ConfigError
from tests.example import write_config
from tests.left_out import needs_rooms


def planned(folder: Path, pools: dict[str, float]) -> DeploymentPlan:
    """The plan of the example for these pools; its forecast is some 0.006 GB."""
    config = write_config(
        folder / "small.yaml",
        registry={"path": str(folder / "registry"), "name": "sized"},
        training={"memory_limit_gb": 64},  # and nothing rests on this machine's
    )
    shipped = packaged_folder("deployments") / "prefect.yaml"
    content = yaml.safe_load(shipped.read_text()) | {"pools": pools}
    names = {deployment.name for deployment in read_deployments_file().deployments}
    content["deployments"] = [each for each in content["deployments"] if each["name"] in names]
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("NESTED_TUNE_ROOTS", f"{Path.cwd()}{os.pathsep}{folder}")
        return make_plan(folder / "mine.yaml", config)


@pytest.mark.slow("puts everything on a server")
def test_what_trains_goes_to_the_smallest_pool_that_holds_it_and_the_rest_stays(
    tmp_path: Path, prefect_server: None
) -> None:
    pools = {"mlx-80": 80, "mlx-tiny": 0.001, "mlx-16": 16}
    plan, lines = route_by_forecast(planned(tmp_path, pools), print)
    pools_of = {each.full_name: each.work_pool.name for each in plan.deployments}
    trains = {name for name in pools_of if name.startswith("finetune/")}
    assert trains == {"finetune/sized-nightly", "finetune/sized-manual"}
    assert {pools_of[name] for name in trains} == {"mlx-16"}
    assert {pools_of[name] for name in pools_of.keys() - trains} == {"cpu"}
    assert lines[0].startswith("finetune/sized-nightly: needs about 0.0")
    assert lines[0].endswith("GB, so it is for pool mlx-16")
    done = list(deploy(plan))
    assert "work pool mlx-80: made, limit 1" in done
    assert any(
        line.startswith("deployment finetune/sized-nightly: in pool mlx-16") for line in done
    )


@needs_rooms("memory", "planning")
def test_a_fine_tune_that_no_pool_holds_is_refused_with_its_forecast(tmp_path: Path) -> None:
    plan = planned(tmp_path, {"mlx-tiny": 0.001, "mlx-less": 0.0001})
    with pytest.raises(ConfigError, match=r"needs about 0\.0\d+ GB, and no pool holds that much"):
        route_by_forecast(plan, print)


def test_a_file_that_says_nothing_of_sizes_leaves_the_plan_as_it_is(tmp_path: Path) -> None:
    plan = planned(tmp_path, {})
    assert route_by_forecast(plan, print) == (plan, [])
