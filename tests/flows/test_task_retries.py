"""Tasks that meet a real I/O error on a real server: how often each is tried."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.schemas.objects import State

from nested_core.errors import DamagedError
from nested_core.models.session import Session
from nested_core.pipeline import steps
from nested_core.registry.link_and_views import NameFolder
from nested_core.storage.run_directory import RunDirectory
from tasks.finetune import gate, load, register, train, validate
from tasks.promote import promote
from tasks.retrying import retry_on_transient_error
from tests.builders import registering
from tests.builders.file_damage import make_directory
from tests.core.registry.conftest import write_run
from tests.example import Finished, example_config, train_example
from tests.flows.conftest import task_runs
from tests.left_out import slow_except

pytestmark = [
    pytest.mark.usefixtures("prefect_server"),
    pytest.mark.slow("fails each task on Prefect's server"),
]


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    done = train_example(tmp_path_factory.mktemp("judged") / "run", iters=4, val_batches=0)
    steps.judge(done.config, done.run)
    return done


def tries(task: Any, *arguments: Any) -> tuple[State[Any], int]:
    """The state that a task ends in without waiting between tries, and how often it was tried."""
    impatient = task.with_options(retry_delay_seconds=0) if task.retries else task

    @flow
    def one_task() -> None:
        impatient(*arguments)

    state = one_task(return_state=True)
    return state, task_runs(state, task.name)[task.name].run_count


@pytest.fixture
def run(judged: Finished, tmp_path: Path) -> RunDirectory:
    return RunDirectory(Path(shutil.copytree(judged.run.path, tmp_path / "run")))


CASES: dict[str, tuple[Any, Callable[[RunDirectory], Path], int]] = {
    "validate": (validate, lambda run: run.dataset, 3),
    "train": (train, lambda run: run.result, 3),
    "gate": (gate, lambda run: run.gate, 1),
}


@pytest.mark.filterwarnings("ignore:.*made again from the checkpoints")
@pytest.mark.parametrize("name", slow_except(CASES, "train", "gate", reason="another flow run"))
def test_an_io_error_that_may_pass_is_tried_again_as_the_table_says(run, tmp_path, name) -> None:
    task, place, expected = CASES[name]
    target = {"path": str(tmp_path / "registry"), "name": "capitals", "promote": "always"}
    config = example_config(iters=4, val_batches=0, registry=target)
    make_directory(place(run))
    state, count = tries(task, config, run.path)
    assert count == expected
    with pytest.raises(IsADirectoryError):
        state.result()


def test_damage_is_not_tried_again(run: RunDirectory, tmp_path: Path) -> None:
    target = {"path": str(tmp_path / "registry"), "name": "capitals", "promote": "always"}
    config = example_config(iters=4, val_batches=0, registry=target)
    make_directory(run.dataset)
    state, count = tries(register, config, run.path, Session())
    assert count == 1
    with pytest.raises(DamagedError, match=r"dataset\.json"):
        state.result()
    assert (register.retries, register.retry_condition_fn) == (3, retry_on_transient_error)


def test_an_io_error_of_the_registry_that_may_pass_is_tried_again(tmp_path, monkeypatch) -> None:
    registry = tmp_path / "registry"
    policy = {"config": {"registry": {"path": "r", "name": "capitals", "promote": "always"}}}
    version = registering.register(write_run(tmp_path / "run", 1), registry, "capitals", policy)

    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "I/O error")

    monkeypatch.setattr(NameFolder, "_move_link", fail)
    state, count = tries(promote, registry, "capitals", version)
    assert count == 4
    with pytest.raises(OSError, match="I/O error"):
        state.result()


def test_a_second_try_completes_where_the_error_has_passed(judged, run) -> None:
    expected = run.tiers.read_bytes()
    shutil.rmtree(run.initial)
    make_directory(run.tiers)

    def mend_then_ask(*asked: Any) -> bool:
        run.tiers.rmdir()
        return retry_on_transient_error(*asked)

    state, count = tries(
        load.with_options(retry_condition_fn=mend_then_ask), judged.config, run.path
    )
    assert (state.is_completed(), count) == (True, 2)
    assert run.tiers.read_bytes() == expected
    assert (run.initial / "adapters.safetensors").is_file()


def test_a_folder_that_does_not_exist_is_not_tried_again(judged: Finished, tmp_path: Path) -> None:
    state, count = tries(validate, judged.config, tmp_path / "gone")
    assert count == 1
    with pytest.raises(FileNotFoundError):
        state.result()
