"""`report_to`: what each client is sent. mlflow is the real one; the others stand in and record."""

from __future__ import annotations

import errno
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nested_core.errors import ConfigError
from nested_core.pipeline.finetune import finetune
from nested_core.storage.atomic import write_json
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.untrusted_files import read_json_object
from nested_core.training.reports import reporting_services
from nested_core.training.reports.reporting_services import (
    ReportingCallback,
    attaching_verdict_at_end,
    configured_services,
    reporting_to_services,
)
from tests.core.report.verdicts import GATE
from tests.example import example_config

TRAIN = {"iteration": 10, "train_loss": 2.5, "learning_rate": 0.1}
VALID = {"iteration": 10, "val_loss": float("nan"), "val_time": 0.5}


class Client(ModuleType):
    """Stands in for a client: records what is called on it, and on what that returns."""

    def __init__(self, name: str, calls: list[tuple[str, Any, Any]]) -> None:
        super().__init__(name)
        self.__spec__ = ModuleSpec(name, None)
        self.calls = calls
        self.id = "known-there"
        self.summary: dict[str, str] = {}

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **options: Any) -> Any:
            self.calls.append((name, args, options))
            return self

        return call

    def named(self, name: str) -> list[tuple[Any, Any]]:
        return [(args, options) for called, args, options in self.calls if called == name]


def run_once(tmp_path: Path, services: str) -> RunDirectory:
    """What training and its end send: one report, one evaluation, the verdict with two files."""
    config = example_config(report_to=services, project_name="capitals")
    run = RunDirectory(tmp_path / "run-1")
    run.path.mkdir()
    with attaching_verdict_at_end(config, run):
        with reporting_to_services(config, run, None) as callback:
            assert callback is not None
            callback.on_train_loss_report(TRAIN)
            callback.on_val_loss_report(VALID)
        write_json(run.result, {})
        write_json(run.gate, GATE)
        (run.path / "report.html").write_text("<p>passed</p>")
    return run


@pytest.mark.parametrize("name", ["wandb", "swanlab", "trackio"])
def test_each_client_gets_the_losses_then_the_verdict_and_the_page_in_the_same_run(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client(name, [])
    monkeypatch.setitem(sys.modules, name, client)
    run_once(tmp_path, name)
    first, again = (options for _, options in client.named("init"))
    assert first["project"] == "capitals"
    assert first["config"]["iters"] == 8
    key = "name" if name == "trackio" else "id"
    assert again[key] == ("known-there" if name == "wandb" else first[key])
    assert again["resume"] == "allow"
    logged = client.named("log")
    assert logged[0] == ((TRAIN,), {"step": 10})
    assert "val_loss" not in logged[1][0][0]  # a loss that is not finite is no number
    sent = repr([call for call in client.calls if call[0] in ("add_file", "log_artifact", "Text")])
    assert "gate.json" in sent
    assert "report.html" in sent
    assert "passed" in repr(client.summary) + repr(client.calls)
    assert len(client.named("finish")) == 2


@pytest.mark.slow("imports mlflow and makes its database")
def test_mlflow_itself_has_the_losses_the_verdict_and_the_files(tmp_path, monkeypatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.chdir(tmp_path)  # where it keeps what is attached
    run_once(tmp_path, "mlflow")
    client = MlflowClient()
    experiment = client.get_experiment_by_name("capitals")
    assert experiment is not None
    (tracked,) = client.search_runs([experiment.experiment_id])
    assert tracked.info.run_name == "run-1"
    assert tracked.info.status == "FINISHED"
    assert tracked.data.metrics["train_loss"] == 2.5
    assert tracked.data.tags["verdict"] == "passed"
    names = {file.path for file in client.list_artifacts(tracked.info.run_id)}
    assert names == {"config.json", "gate.json", "report.html"}


def test_a_missing_or_unknown_service_is_said_before_there_is_a_run_folder(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    with pytest.raises(ConfigError, match="report_to: wandb is not installed. Install it"):
        finetune(example_config(report_to="mlflow, wandb"), run)
    assert not run.path.exists()
    with pytest.raises(ConfigError, match="report_to: tensorboard is not known. Choose from wandb"):
        configured_services(example_config(report_to="tensorboard"))


def test_a_service_that_fails_at_the_end_is_warned_of_and_takes_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client("trackio", [])
    monkeypatch.setitem(sys.modules, "trackio", client)
    run = RunDirectory(tmp_path)
    write_json(run.result, {})
    write_json(run.gate, GATE)

    def unreachable(**_: object) -> None:
        raise OSError("no route")

    monkeypatch.setattr(client, "init", unreachable, raising=False)
    with (
        pytest.warns(UserWarning, match="report_to: trackio cannot be used: no route"),
        attaching_verdict_at_end(example_config(report_to="trackio"), run),
    ):
        pass


def test_a_service_that_cannot_be_closed_is_warned_of_and_does_not_end_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client("trackio", [])
    monkeypatch.setitem(sys.modules, "trackio", client)

    def unreachable() -> None:
        raise OSError("no route")

    monkeypatch.setattr(client, "finish", unreachable, raising=False)
    services = ReportingCallback(example_config(report_to="trackio"), RunDirectory(tmp_path))
    services.on_train_loss_report(TRAIN)
    with pytest.warns(UserWarning, match="report_to: trackio was not closed: no route"):
        services.close()
    assert len(client.named("log")) == 1


def test_what_was_opened_is_closed_where_a_verdict_cannot_be_attached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client("trackio", [])
    monkeypatch.setitem(sys.modules, "trackio", client)
    run = RunDirectory(tmp_path)
    write_json(run.result, {})
    run.gate.write_text("{")
    with (
        pytest.warns(UserWarning, match="report_to: the verdict was not attached"),
        attaching_verdict_at_end(example_config(report_to="trackio"), run),
    ):
        pass
    assert len(client.named("finish")) == 1


def test_a_service_that_stops_answering_is_warned_of_once_and_the_run_goes_on_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clients = {name: Client(name, []) for name in ("trackio", "swanlab")}
    for name, client in clients.items():
        monkeypatch.setitem(sys.modules, name, client)

    def unreachable(*_: object, **__: object) -> None:
        raise OSError("no route")

    config = example_config(report_to="trackio,swanlab")
    run = RunDirectory(tmp_path)

    def train_while_trackio_stops_answering() -> None:
        with attaching_verdict_at_end(config, run):
            with reporting_to_services(config, run, None) as callback:
                assert callback is not None
                callback.on_train_loss_report(TRAIN)
                monkeypatch.setattr(clients["trackio"], "log", unreachable, raising=False)
                for iteration in (20, 30):
                    callback.on_train_loss_report(TRAIN | {"iteration": iteration})
            write_json(run.result, {})
            write_json(run.gate, GATE)

    with pytest.warns(UserWarning, match="report_to: ") as caught:
        train_while_trackio_stops_answering()
    messages = [str(warning.message) for warning in caught]
    assert messages == [
        "report_to: trackio took no report of iteration 20, and is sent no more of this training, "
        "which goes on: no route",
        "report_to: the verdict was not attached: trackio: no route",
        f"report_to: trackio lacks reports of this run, from iteration 20 on; all are in "
        f"{run.metrics}",
    ]
    assert len(clients["trackio"].named("finish")) == 2  # what it took before is not held back
    steps = [options["step"] for _, options in clients["swanlab"].named("log") if "step" in options]
    assert steps[:3] == [10, 20, 30]
    assert "passed" in repr(clients["swanlab"].calls)


def test_what_a_service_lacked_and_was_sent_anew_by_a_resumed_training_is_not_said_to_lack(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = Client("trackio", [])
    monkeypatch.setitem(sys.modules, "trackio", client)
    config, run = example_config(report_to="trackio"), RunDirectory(tmp_path)
    missing = {"run_ids": {"trackio": "run-1"}, "missing_from": {"trackio": 20}}
    write_json(run.report_to, missing)
    with (
        attaching_verdict_at_end(config, run),
        reporting_to_services(config, run, None) as callback,
    ):
        assert callback is not None
        for iteration in (10, 20):
            callback.on_train_loss_report(TRAIN | {"iteration": iteration})
    assert read_json_object(run.report_to) == missing | {"missing_from": {}}


def test_a_full_disk_at_the_end_is_no_error_of_a_run_that_is_done(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "trackio", Client("trackio", []))
    run = RunDirectory(tmp_path)
    write_json(run.result, {})
    write_json(run.gate, GATE)

    def disk_is_full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(reporting_services, "write_json", disk_is_full)
    with (
        pytest.warns(UserWarning, match="the verdict was not attached: .*No space left"),
        attaching_verdict_at_end(example_config(report_to="trackio"), run),
    ):
        pass
