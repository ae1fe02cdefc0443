"""What is written in deployments/: sound, closed to the network, and the same in every file."""

from __future__ import annotations

import plistlib
import subprocess
import sys
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.events.schemas.automations import AutomationCore
from prefect.flows import Flow

from flows.finetune import FinetuneParameters
from flows.packaged_files import packaged_folder
from flows.sweep import SweepParameters
from nested_core.config.schema import FineTuneConfig

ROOT = Path(__file__).resolve().parents[2]
FOLDER = packaged_folder("deployments")
PROJECT = yaml.safe_load((FOLDER / "prefect.yaml").read_text())
DEPLOYMENTS: dict[str, dict[str, Any]] = {each["name"]: each for each in PROJECT["deployments"]}
POOLS = yaml.safe_load((FOLDER / "work-pools.yaml").read_text())["work_pools"]


def settings() -> dict[str, str]:
    lines = (FOLDER / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("name", DEPLOYMENTS)
def test_every_deployment_names_a_flow_that_is_there_and_a_pool_that_is_made(name: str) -> None:
    module, _, function = DEPLOYMENTS[name]["entrypoint"].rpartition(".")
    assert isinstance(getattr(import_module(module), function), Flow)
    assert DEPLOYMENTS[name]["work_pool"]["name"] in [pool["name"] for pool in POOLS]


def training_configs() -> dict[str, FineTuneConfig]:
    nightly, manual, sweep = (
        DEPLOYMENTS[name]["parameters"]["config"] for name in ("nightly", "manual", "sweep")
    )
    return {
        "nightly": FinetuneParameters.model_validate(nightly).configuration(),
        "manual": FinetuneParameters.model_validate(manual).configuration(),
        "sweep": SweepParameters.model_validate(sweep).base,
    }


@pytest.mark.parametrize("name", ["nightly", "manual", "sweep"])
def test_each_deployment_that_trains_has_tiers_clipping_and_automatic_promotion(name: str) -> None:
    config = training_configs()[name]
    assert config.nested.frequencies == (1, 2, 4)
    assert config.training.max_grad_norm == 1.0
    assert config.registry.promote == "always"


def test_the_nightly_schedule_is_off_until_a_person_switches_it_on() -> None:
    (schedule,) = DEPLOYMENTS["nightly"]["schedules"]
    assert schedule["active"] is False
    assert DEPLOYMENTS["nightly"]["concurrency_limit"]["collision_strategy"] == "CANCEL_NEW"
    assert DEPLOYMENTS["manual"]["concurrency_limit"]["collision_strategy"] == "ENQUEUE"


def test_the_automation_that_frees_dead_runs_waits_for_three_heartbeats_and_leaves_approvals() -> (
    None
):
    automations = yaml.safe_load((FOLDER / "automations.yaml").read_text())["automations"]
    for automation in automations:
        wanted = {key: value for key, value in automation.items() if key != "notify"}
        AutomationCore.model_validate(wanted)
    trigger = automations[0]["trigger"]
    assert trigger["within"] == 3 * int(settings()["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"])
    watched = [name for name, each in DEPLOYMENTS.items() if "watched" in each["tags"]]
    assert sorted(watched) == ["hourly", "manual", "nightly", "rollback", "sweep"]


def test_the_settings_listen_here_alone_keep_no_pickle_and_hold_no_secret() -> None:
    values = settings()
    assert values["PREFECT_SERVER_API_HOST"] == "127.0.0.1"
    assert values["PREFECT_SERVER_CSRF_PROTECTION_ENABLED"] == "true"
    assert values["PREFECT_RESULTS_DEFAULT_SERIALIZER"] == "json"
    assert values["PREFECT_SERVER_ANALYTICS_ENABLED"] == "false"
    assert not [name for name in values if "AUTH" in name or "PASSWORD" in name or "TOKEN" in name]


def test_the_units_stop_the_worker_alone_in_a_way_that_leaves_its_training() -> None:
    unit = ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]  # names keep their case
    unit.read(FOLDER / "systemd" / "nested-tune-worker@.service")
    assert unit["Service"]["KillMode"] == "process"
    assert unit["Service"]["KillSignal"] == "SIGKILL"
    agent = plistlib.loads((FOLDER / "launchd" / "org.nested-tune.worker.plist").read_bytes())
    assert agent["AbandonProcessGroup"] is True


def test_the_containers_publish_the_server_to_this_machine_alone() -> None:
    compose = yaml.safe_load((FOLDER / "postgresql" / "compose.yaml").read_text())
    assert compose["services"]["server"]["ports"] == ["127.0.0.1:4200:4200"]
    assert "ports" not in compose["services"]["database"]


def test_what_a_worker_imports_when_a_run_has_crashed_loads_no_mlx() -> None:
    code = "import flows.finetune, sys; print({'mlx', 'mlx_lm', 'polars'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "set()\n"  # so the second report of the crash comes soon
