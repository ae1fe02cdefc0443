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
from nested_core.rooms.services.reporting_services import Services, configured_services
from nested_core.storage.atomic import write_json
from nested_core.storage.json_file import JsonFile
from nested_core.storage.run_directory import RunDirectory
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
    with Services(config).attaching_verdict_at_end(run):
        with Services(config).reporting(run, None) as callback:
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
    assert again == first
    assert first["resume"] == "allow"
    assert name == "trackio" or len(first["id"]) == 21
    logged = client.named("log")
    assert logged[0] == ((TRAIN,), {"step": 10})
    assert "val_loss" not in logged[1][0][0]  # a loss that is not finite is no number
    sent = repr(logged + client.named("log_artifact") + client.named("Text"))
    assert all(text in sent for text in ("gate.json", "report.html", "passed"))
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


def no_route(*_: object, **__: object) -> None:
    raise OSError("no route")


def disk_is_full(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.fixture
def trackio(monkeypatch: pytest.MonkeyPatch) -> Client:
    """A client in the place of trackio's."""
    client = Client("trackio", [])
    monkeypatch.setitem(sys.modules, "trackio", client)
    return client


@pytest.mark.parametrize(
    ("gate", "patched", "said"),
    [
        (GATE, ("init", no_route), "the verdict was not attached: trackio: no route"),
        ("{", None, "report_to: the verdict was not attached"),
        (GATE, ("write", disk_is_full), "the verdict was not attached: .*No space left"),
    ],
    ids=["no service", "a damaged verdict", "a full disk"],
)
def test_what_fails_at_the_end_is_warned_of_and_takes_nothing_away(
    trackio, tmp_path, monkeypatch, gate, patched, said
) -> None:
    run = RunDirectory(tmp_path)
    write_json(run.result, {})
    if gate == "{":
        run.gate.write_text(gate)
    else:
        write_json(run.gate, gate)
    if patched is not None:
        name, fail = patched
        owner = JsonFile if name == "write" else trackio
        monkeypatch.setattr(owner, name, fail, raising=False)
    with (
        pytest.warns(UserWarning, match=said),
        Services(example_config(report_to="trackio")).attaching_verdict_at_end(run),
    ):
        pass
    assert trackio.named("finish") == []  # nothing was opened


def test_a_service_that_stops_answering_is_warned_of_once_and_the_run_goes_on_without_it(
    trackio, tmp_path, monkeypatch
) -> None:
    swanlab = Client("swanlab", [])
    monkeypatch.setitem(sys.modules, "swanlab", swanlab)
    config = example_config(report_to="trackio,swanlab")
    run = RunDirectory(tmp_path)

    def train_while_trackio_stops_answering() -> None:
        with Services(config).attaching_verdict_at_end(run):
            with Services(config).reporting(run, None) as callback:
                callback.on_train_loss_report(TRAIN)
                monkeypatch.setattr(trackio, "log", no_route, raising=False)
                for iteration in (20, 30):
                    callback.on_train_loss_report(TRAIN | {"iteration": iteration})
                monkeypatch.setattr(swanlab, "finish", no_route, raising=False)
            monkeypatch.undo()
            monkeypatch.setitem(sys.modules, "swanlab", swanlab)
            monkeypatch.delitem(sys.modules, "trackio", raising=False)
            write_json(run.result, {})
            write_json(run.gate, GATE)

    with pytest.warns(UserWarning, match="report_to: ") as caught:
        train_while_trackio_stops_answering()
    assert [str(warning.message) for warning in caught] == [
        "report_to: trackio took no report of iteration 20, and is sent no more of this training, "
        "which goes on: no route",
        "report_to: swanlab was not closed: no route",
        "report_to: the verdict was not attached: trackio: No module named 'trackio'",
    ]
    assert len(trackio.named("finish")) == 1  # what it took before is not held back
    steps = [options["step"] for _, options in swanlab.named("log") if "step" in options]
    assert steps[:3] == [10, 20, 30]
    assert "passed" in repr(swanlab.calls)
