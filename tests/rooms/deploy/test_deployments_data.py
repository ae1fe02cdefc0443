"""What is written in deployments/: sound, closed to the network, and the same in every file."""

from __future__ import annotations

import os
import plistlib
import subprocess
import sys
from collections.abc import Mapping
from configparser import ConfigParser
from importlib import import_module
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import yaml
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.flows import Flow
from prefect.settings import Settings

from flows.finetune import FinetuneParameters
from flows.flow_runs.allowed_folders import require_known_name
from flows.process.environment import packaged_folder
from flows.reconcile import ReconcileParameters
from flows.rooms.deploy import planned_deployments
from flows.rooms.deploy.planned_deployments import (
    PlannedDeployment,
    begin_name,
    make_plan,
    read_deployments_file,
)
from nested_core import seams
from nested_core.config.schema import FineTuneConfig
from nested_core.config.sections import RegistrySection
from nested_core.errors import ConfigError
from nested_core.records.outcome_names import Outcome
from tests.left_out import needs_rooms
from tests.registry_care import audit

ROOT = Path(__file__).resolve().parents[2]
FOLDER = packaged_folder("deployments")
PLAN = make_plan()
DEPLOYMENTS = {  # of the adapter
    each.name.removeprefix("geography-"): each
    for each in PLAN.deployments
    if each.name != "auto"  # for all adapters
}
POOLS = yaml.safe_load((FOLDER / "work-pools.yaml").read_text())["work_pools"]


@pytest.fixture(autouse=True)
def _roots(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folders of SUPPORT's registry and of the examples, as a worker's settings name them."""
    monkeypatch.setenv("NESTED_TUNE_ROOTS", f"{ROOT}{os.pathsep}/srv")


def settings() -> dict[str, str]:
    lines = (FOLDER / "settings.env").read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


@pytest.mark.parametrize("deployment", PLAN.deployments, ids=lambda each: each.full_name)
def test_every_deployment_names_a_flow_that_is_there_and_a_pool_that_is_made(deployment) -> None:
    module, _, function = deployment.entrypoint.rpartition(".")
    assert isinstance(getattr(import_module(module), function), Flow)
    assert deployment.work_pool.name in [pool["name"] for pool in POOLS]


def training_configs() -> Mapping[str, FineTuneConfig]:
    return {
        name: FinetuneParameters.model_validate(DEPLOYMENTS[name].parameters["config"])
        for name in ("nightly", "manual")
    }


@pytest.mark.parametrize("name", ["nightly", "manual"])
def test_each_deployment_that_trains_has_tiers_clipping_and_automatic_promotion(name: str) -> None:
    config = training_configs()[name]
    assert config.nested.frequencies == (1, 2, 4)
    assert config.training.max_grad_norm == 1.0
    assert config.registry.promote == "better"


def test_the_nightly_schedule_is_off_until_a_person_switches_it_on() -> None:
    (schedule,) = DEPLOYMENTS["nightly"].schedules
    assert schedule.active is False


def test_no_training_holds_a_lease_that_a_server_which_is_away_could_end_it_by() -> None:
    limited = [name for name, each in DEPLOYMENTS.items() if each.concurrency_limit]
    assert limited == ["hourly"]


def test_an_hourly_look_waits_for_the_one_before_and_is_not_lost() -> None:
    limit = DEPLOYMENTS["hourly"].concurrency_limit
    assert isinstance(limit, ConcurrencyLimitConfig)
    assert (limit.limit, limit.collision_strategy.value) == (1, "ENQUEUE")
    one = ReconcileParameters(registry="registry", names=("capitals", "rivers"))
    assert (one.subject, ReconcileParameters(registry="r").subject) == ("capitals, rivers", "r")


def test_the_automation_that_frees_dead_runs_leaves_approvals() -> None:
    watched = [name for name, each in DEPLOYMENTS.items() if "watched" in each.tags]
    assert {"hourly", "manual", "nightly", "rollback"} <= {*watched}
    assert "approved" not in watched


@needs_rooms("housekeeping")
def test_housekeeping_is_on_every_week_for_the_adapter_alone() -> None:
    deployment = DEPLOYMENTS["housekeeping"]
    (schedule,) = deployment.schedules
    assert (schedule.active, schedule.cron) == (True, "47 12 * * 0")
    parameters = seams.load("flows.rooms.housekeeping.flow:HousekeepingParameters")
    config = parameters.model_validate(deployment.parameters["config"])
    assert (config.registry, config.name, config.dry_run) == ("registry", "geography", False)


def test_the_settings_have_the_server_remove_old_events_and_runs(monkeypatch) -> None:
    for name, value in settings().items():
        if "VACUUM" in name or "RETENTION" in name:
            monkeypatch.setenv(name, value)
    server = Settings().server
    vacuum = server.services.db_vacuum
    assert vacuum.enabled_vacuum_types == {"events", "flow_runs", "orphans"}
    periods = (server.events.retention_period, vacuum.retention_period)
    assert [period.days for period in periods] == [7, 90]


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


@pytest.mark.slow("a process that imports all of Prefect")
def test_what_a_worker_imports_when_a_run_has_crashed_loads_no_mlx() -> None:
    code = "import flows.finetune, sys; print({'mlx', 'mlx_lm', 'polars'} & set(sys.modules))"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == "set()\n"  # so the second report of the crash comes soon


SUPPORT: dict[str, Any] = {
    "model": "a/model",
    "data": "data/support",
    "iters": 50,
    "registry": {"path": "/srv/adapters", "name": "support-bot"},
}


def write(path: Path, **changes: Any) -> Path:
    path.write_text(yaml.safe_dump(SUPPORT | changes))
    return path


def test_each_registry_name_has_a_set_of_its_own_that_keeps_nothing_of_the_example(
    tmp_path: Path,
) -> None:
    plan = make_plan(config=write(tmp_path / "support.yaml"))
    deployments = [each for each in plan.deployments if seams.room_of(each.entrypoint) is None]
    assert [deployment.full_name for deployment in deployments] == [
        "finetune/support-bot-nightly",
        "finetune/support-bot-manual",
        "promote/support-bot-approved",
        "reconcile/support-bot-hourly",
        "rollback/support-bot-rollback",
        "promote/auto",
    ]
    parameters = [deployment.parameters for deployment in deployments[:-1]]
    promotion = {"promote": "better"}
    published = SUPPORT | {"registry": SUPPORT["registry"] | promotion}
    goes_on: dict[str, Any] = {
        "from": "champion",
        "skip_unchanged": True,
        "replay": {"fraction": 0.5},
        "policy": "auto",
        "window": "2h",
    }
    nightly: dict[str, Any] = {"continual": goes_on, "gate": {"max_ancestor_loss_increase": 0.1}}
    if not (seams.is_there("replay") and seams.is_there("minutes")):
        del goes_on["policy"], goes_on["window"]
    if not seams.is_there("replay"):
        del goes_on["replay"]
        nightly["gate"] = {}
    assert parameters[0] == {"config": published | nightly}
    assert parameters[1] == {"config": published}
    approved = {"registry": "/srv/adapters", "name": "support-bot", "requires_approval": True}
    assert parameters[2] == {"config": approved}
    assert parameters[3] == {"config": {"registry": "/srv/adapters", "names": ["support-bot"]}}
    assert parameters[4] == {"config": {"registry": "/srv/adapters", "name": "support-bot"}}
    assert "geography" not in repr([plan.deployments, plan.pull, plan.automations])
    assert all("support-bot" in each.tags for each in plan.deployments[:-1])


def test_what_a_configuration_says_wins_over_what_a_deployment_says(tmp_path: Path) -> None:
    registry = SUPPORT["registry"] | {"promote": "approve"}
    config = write(tmp_path / "c.yaml", registry=registry, continual={"from": None})
    nightly = make_plan(config=config).deployments[0].parameters["config"]
    assert nightly["registry"]["promote"] == "approve"
    assert nightly["continual"] == {"from": None, "skip_unchanged": True}
    config = write(tmp_path / "r.yaml", registry=registry, training={"reference": "mlx_lm"})
    nightly = make_plan(config=config).deployments[0].parameters["config"]
    assert nightly["continual"] == {"from": "champion", "skip_unchanged": True}
    config = write(tmp_path / "m.yaml", registry=registry, training={"minutes": 5})
    nightly = make_plan(config=config).deployments[0].parameters["config"]
    assert nightly["continual"] == {"from": "champion", "skip_unchanged": True}
    config = write(tmp_path / "k.yaml", registry=registry | {"keep_data": False})
    nightly = make_plan(config=config).deployments[0].parameters["config"]
    assert "policy" not in nightly["continual"]


@pytest.mark.parametrize(
    "registry",
    [
        *(None, {}, {"promote": "never"}, {"path": "registry", "name": None}),
        *("registry", ["a"], {"path": ["registry"], "name": "a"}, {"path": "r", "name": 7}),
    ],
)
def test_a_configuration_without_a_registry_name_is_refused(tmp_path: Path, registry: Any) -> None:
    with pytest.raises(ConfigError, match=r"c\.yaml: deployments need .* registry\.name"):
        make_plan(config=write(tmp_path / "c.yaml", registry=registry))


@pytest.mark.parametrize("replay", [0.5, True])
def test_a_number_for_replay_is_refused_by_its_key(tmp_path: Path, replay: Any) -> None:
    config = write(tmp_path / "c.yaml", continual={"from": "champion", "replay": replay})
    with pytest.raises(ConfigError, match=r"continual\.replay"):
        make_plan(config=config)


def test_a_configuration_that_a_flow_would_refuse_is_refused_before_anything_is_deployed(
    tmp_path: Path,
) -> None:
    config = write(tmp_path / "c.yaml", resume_adapter_file="x.safetensors", iterz=3)
    with pytest.raises(ConfigError, match="finetune/support-bot-nightly") as refused:
        make_plan(config=config)
    assert "did you mean iters?" in str(refused.value)


@pytest.mark.parametrize(
    "continual", [{"policy": "auto"}, {"policy": "rebuild"}, {"replay": {"fraction": 0.5}}]
)
def test_minutes_with_what_they_cannot_count_are_refused_before_anything_is_deployed(
    tmp_path: Path, continual: dict[str, Any]
) -> None:
    given = {"from": "champion"} | continual
    config = write(tmp_path / "c.yaml", training={"minutes": 5}, continual=given)
    with pytest.raises(ConfigError, match=r"nightly cannot be used:\n  training.minutes: 5 m"):
        make_plan(config=config)


@pytest.mark.parametrize("key", ["model", "data", "gate.general_data"])
def test_a_path_outside_of_the_roots_is_refused_before_anything_is_deployed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "outside").mkdir()
    monkeypatch.setenv("NESTED_TUNE_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("NESTED_TUNE_ROOTS")
    outside = str(tmp_path / "outside")
    changes: dict[str, Any] = {"registry": {"path": "registry", "name": "bot"}}
    section, _, name = key.rpartition(".")
    config = write(tmp_path / "c.yaml", **changes)
    make_plan(config=config)  # data/support lies in the home, if it is there
    of_gate = {"gate": {name: outside, "max_general_loss_increase": 0.1}}
    changes |= of_gate if section else {name: outside}
    config = write(tmp_path / "c.yaml", **changes)
    said = rf"nightly: {key}: {outside} is outside of the folders .*\({tmp_path}/home\)"
    with pytest.raises(ConfigError, match=said):
        make_plan(config=config)
    monkeypatch.setenv("NESTED_TUNE_ROOTS", str(tmp_path))
    make_plan(config=config)
    monkeypatch.delenv("NESTED_TUNE_ROOTS")
    monkeypatch.setenv("NESTED_TUNE_HOME", str(tmp_path / "of another machine"))
    make_plan(config=config)


def test_python_scorers_which_no_flow_runs_are_refused_before_anything_is_deployed(
    tmp_path: Path,
) -> None:
    task = {"name": "own", "file": "s.jsonl", "score": "python", "function": "own:judge"}
    gate = {"allow_python_scorers": True, "tasks": [task]}
    with pytest.raises(ConfigError, match="nightly: gate.allow_python_scorers: a flow takes it"):
        make_plan(config=write(tmp_path / "c.yaml", gate=gate))


def test_a_file_of_ones_own_names_one_adapter_and_is_left_as_it_is(tmp_path: Path) -> None:
    training: dict[str, Any] = {"name": "mine", "entrypoint": "flows.finetune.finetune"}
    training |= {"work_pool": {"name": "mlx-gpu"}, "parameters": {"config": SUPPORT}}
    file = tmp_path / "prefect.yaml"
    file.write_text(yaml.safe_dump({"deployments": [training]}))
    plan = make_plan(file)
    assert (plan.adapter, plan.deployments) == (
        "support-bot",
        (PlannedDeployment.model_validate(training),),
    )
    other = SUPPORT | {"registry": {"path": "r", "name": "other"}}
    second = training | {"name": "second", "parameters": {"config": other}}
    file.write_text(yaml.safe_dump({"deployments": [training, second]}))
    with pytest.raises(ConfigError, match="the one adapter that they train"):
        make_plan(file)


TRAINS: dict[str, Any] = {"name": "mine", "entrypoint": "flows.finetune.finetune"}
TRAINS |= {"work_pool": {"name": "mlx-gpu"}}
COMPLETE = TRAINS | {"parameters": {"config": SUPPORT}}
OF_NO_ROOM = COMPLETE | {"entrypoint": "flows.rooms.gone.flow.gone"}
LIMIT = {"limit": 1, "collision_strategy": "WAIT"}


def scheduled(schedule: dict[str, Any]) -> dict[str, Any]:
    return {"deployments": [COMPLETE | {"schedules": [schedule]}]}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([TRAINS], "expected keys and values"),
        (None, "expected keys and values"),
        ({"deployment": [TRAINS]}, "deployment: unknown key; did you mean deployments?"),
        ({"deployments": TRAINS}, "deployments: Input should be a list"),
        ({"deployments": [TRAINS]}, "deployments.0: what trains has its configuration in param"),
        ({"deployments": [TRAINS | {"parameters": None}]}, "deployments.0.parameters: "),
        ({"deployments": [OF_NO_ROOM]}, "belongs to the room gone, which is not installed here"),
        ({"deployments": [{"name": "mine"}]}, "deployments.0.work_pool: Field required"),
        ({"deployments": [COMPLETE | {"work_pool": None}]}, "deployments.0.work_pool: "),
        ({"deployments": [COMPLETE | {"triggers": []}]}, "deployments.0.triggers: unknown key"),
        ({"deployments": [COMPLETE], "build": None}, "build: unknown key"),
        (scheduled({"cronn": "0 2 * * *"}), "schedules.0.cronn: "),
        (scheduled({"slug": "nightly"}), "a schedule has one of cron, interval, rrule"),
        (scheduled({"cron": "0 2 * *"}), "schedules.0: Invalid cron string"),
        (scheduled({"cron": "0 2 * * *", "zone": "UTC"}), "schedules.0.zone: "),
        (
            {"deployments": [COMPLETE | {"concurrency_limit": LIMIT}]},
            "concurrency_limit.collision_strategy: Input should be 'ENQUEUE' or 'CANCEL_NEW'",
        ),
    ],
)
def test_a_file_of_ones_own_that_is_none_is_refused(tmp_path, content, expected) -> None:
    file = tmp_path / "prefect.yaml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(ConfigError) as refused:
        make_plan(file)
    assert str(file) in str(refused.value)
    assert expected in str(refused.value)


def test_the_shipped_file_leaves_out_the_flows_of_rooms_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "prefect.yaml"
    gone = {"name": "gone", "entrypoint": "flows.rooms.gone.flow.gone", "work_pool": {"name": "p"}}
    file.write_text(yaml.safe_dump({"deployments": [COMPLETE, gone]}))
    monkeypatch.setattr(planned_deployments, "packaged_folder", lambda name: tmp_path)
    assert [each.name for each in read_deployments_file().deployments] == ["mine"]
    with pytest.raises(ConfigError, match="belongs to the room gone"):
        read_deployments_file(file)


def test_alerts_are_told_by_the_type_of_a_state_and_by_no_name_that_is_ours() -> None:
    """States of ours are named by their outcome; Late is a name that Prefect's server gives."""
    alerts = [each["trigger"] for each in PLAN.automations if "notify" in each]
    reactive = [trigger for trigger in alerts if trigger["posture"] == "Reactive"]
    expected = {event for trigger in reactive for event in trigger["expect"]}
    of_runs = {event for event in expected if event.startswith("prefect.flow-run.")}
    waits = f"prefect.flow-run.{Outcome.WAITS_FOR_APPROVAL}"
    assert of_runs == {"prefect.flow-run.*", "prefect.flow-run.Late", waits}
    alert = next(each for each in PLAN.automations if "failed or crashed" in each["name"])
    assert alert["trigger"]["match"]["prefect.state-type"] == ["FAILED", "CRASHED"]


def test_deploy_begins_the_name_of_its_configuration_in_the_home_of_the_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_HOME", str(tmp_path))
    monkeypatch.delenv("NESTED_TUNE_ROOTS")
    config = tmp_path / "bot.yaml"
    config.write_text("{model: m, data: d, registry: {path: registry, name: bot}}")
    assert begin_name(make_plan(config=config)).endswith("registry: bot begun")
    assert begin_name(make_plan(config=config)).endswith("registry: bot is there already")
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", str(uuid4()))
    monkeypatch.chdir(tmp_path)
    require_known_name(RegistrySection(path="registry", name="bot"))
    assert audit(tmp_path / "registry", "bot").findings == ()


def test_deploy_begins_no_name_in_a_home_that_another_user_owns(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("NESTED_TUNE_HOME", str(tmp_path))
    monkeypatch.delenv("NESTED_TUNE_ROOTS")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    config = tmp_path / "bot.yaml"
    config.write_text("{model: m, data: d, registry: {path: registry, name: bot}}")
    assert "was not begun here" in begin_name(make_plan(config=config))
    assert not (tmp_path / "registry").exists()
