"""Kernels that are compiled ahead in several processes: all of a run's, taken over, none waited for
in vain."""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from nested_core import backend
from nested_core.models.base_model import load_base_model
from nested_core.models.parameters import trainable_parameters
from nested_core.models.session import Session
from nested_core.pipeline.finetune import finetune
from nested_core.pipeline.hooks import Steps
from nested_core.rooms.kernel_folder import compiled_kernels, first_kernels, kernel_worker
from nested_core.rooms.kernel_folder.compiled_kernels import LOCK_NAME, KernelStore
from nested_core.rooms.kernel_folder.first_kernels import (
    PARTS,
    FirstKernels,
    compiling_first_kernels,
    write_small_run,
)
from nested_core.storage.run_directory import RunDirectory, open_run
from nested_core.storage.user_tmpdir import KERNELS_FOLDER_VARIABLE
from nested_core.training.train_step import TrainStep
from tests.example import example_config, prepare
from tests.left_out import needs_rooms

pytestmark = pytest.mark.slow("compiles kernels anew")

TIERS = {"frequencies": [1, 2, 4]}
DUE_SETS = {(0,), (0, 1), (0, 1, 2)}
ROOT = Path(__file__).resolve().parents[3]

RUN = """
import json, sys
from pathlib import Path
from nested_core import backend
backend.prepare()
from nested_core.pipeline.finetune import finetune
from nested_core.rooms.kernel_folder import first_kernels
from nested_core.rooms.kernel_folder import compiled_kernels
from nested_core.storage.run_directory import open_run
from tests.example import example_config
first_kernels.are_worth_compiling_ahead = lambda config, run: True
store, folder = compiled_kernels._process_store
taken = []
take = compiled_kernels.take_recorded_kernels
compiled_kernels.take_recorded_kernels = lambda: taken.append(take()) or taken[0]
finetune(example_config(iters=4, nested={"frequencies": [1, 2]}), open_run(Path(sys.argv[1])))
kernels = [name for name in compiled_kernels.file_names(folder) if name.endswith(".so")]
print(json.dumps({"taken": taken, "all": len(kernels)}))
"""


@pytest.mark.slow("compiles all kernels of a run with g++")
@pytest.mark.skipif(
    sys.platform != "linux" or backend.device() != "cpu" or shutil.which("g++") is None,
    reason="MLX compiles with g++ on a Linux CPU alone",
)
def test_nearly_all_that_a_run_computes_with_was_compiled_ahead(tmp_path: Path) -> None:
    kernels = {KERNELS_FOLDER_VARIABLE: str(tmp_path / "kernels")}
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(tmp_path / "run")],
        env=os.environ | kernels | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stderr
    counts = json.loads(done.stdout.splitlines()[-1])
    (taken,) = counts["taken"]
    assert counts["all"] > 30
    assert taken >= 0.9 * counts["all"]


@pytest.fixture
def small_run(tmp_path: Path) -> Callable[[str], Path]:
    """Writes the small run of a part, of a run of the example in three tiers."""
    config = example_config(iters=8, nested=TIERS)
    run = prepare(config, tmp_path / "run")

    def write(part: str) -> Path:
        write_small_run(config, run, part, tmp_path / part)
        return tmp_path / part

    return write


@pytest.mark.parametrize(
    ("part", "method"), [("gradients", "forward_backward"), ("updates", "update")]
)
def test_gradients_and_updates_are_computed_for_each_set_of_tiers_that_are_due_together(
    small_run: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, part: str, method: str
) -> None:
    traced = []
    original = getattr(TrainStep, method)
    place = {"forward_backward": 2, "update": 3}[method]  # of the due parameters

    def note(*given: Any) -> Any:
        step: TrainStep = given[0]
        tiers = {step.packed.packing.arrays[key].tier for key in given[place]}
        traced.append(tuple(sorted(tiers)))
        return original(*given)

    monkeypatch.setattr(TrainStep, method, note)
    folder = small_run(part)
    kernel_worker.compute_part(part, folder)
    assert set(traced) == DUE_SETS
    assert not RunDirectory(folder).checkpoints.exists()


@pytest.mark.parametrize("part", ["evaluation", "answers"])
def test_evaluation_and_answers_take_no_step(small_run, monkeypatch, part) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a step was taken")

    monkeypatch.setattr(TrainStep, "run", refuse)
    folder = small_run(part)
    kernel_worker.compute_part(part, folder)
    metrics = RunDirectory(folder).metrics
    assert metrics.exists() == (part == "evaluation")
    assert part == "answers" or "val_loss" in metrics.read_text()


def test_layers_share_the_weights_of_the_first() -> None:
    model, _ = load_base_model(example_config(iters=1), shares_layers=True)
    parameters = trainable_parameters(model)
    names = [name for name in parameters if name.startswith("model.layers.1.")]
    assert names
    for name in names:
        first = parameters[name.replace("layers.1.", "layers.0.")]
        assert parameters[name] is first or mx.array_equal(parameters[name], first).item()
    alone, _ = load_base_model(example_config(iters=1))
    own = trainable_parameters(alone)["model.layers.1.mlp.up_proj.weight"]
    assert not mx.array_equal(own, parameters["model.layers.1.mlp.up_proj.weight"]).item()


def fake_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str) -> None:
    """Have each worker answer with such a function, wherever it would compute."""
    program = tmp_path / "worker.py"
    program.write_text(f"def answer(request):\n    {body}\n")
    monkeypatch.setattr(first_kernels, "WORKER", program)
    monkeypatch.setattr(first_kernels, "are_worth_compiling_ahead", lambda config, run: True)


class Told(Steps):
    """Keeps what a person is told."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def on_message(self, message: str) -> None:
        self.messages.append(message)


@pytest.mark.slow("a process that compiles kernels")
def test_a_process_that_fails_is_told_of_and_the_run_goes_on(tmp_path, monkeypatch, caplog) -> None:
    fake_worker(tmp_path, monkeypatch, "raise RuntimeError(request['part'] + ': no room')")
    hooks = Told()
    with caplog.at_level(logging.WARNING):
        result = finetune(example_config(iters=4), open_run(tmp_path / "run"), hooks)
    assert result.verdict is not None
    failed = [record.getMessage() for record in caplog.records]
    said = [message.partition(": no room")[0] for message in failed if "them ahead" in message]
    assert said == [
        f"The kernels of {part} are compiled as they are needed: the process that was to compile "
        f"them ahead failed: RuntimeError: {part}"
        for part in PARTS
    ]
    told = [message for message in hooks.messages if message.startswith("kernels: ")]
    assert "4 processes compile those of evaluation, gradients, updates and answers" in told[0]
    assert "were compiled ahead in" in told[1]


def test_what_ends_a_run_ends_the_processes_that_compile_for_it(tmp_path, monkeypatch) -> None:
    fake_worker(tmp_path, monkeypatch, "import time; time.sleep(3600)")
    config = example_config(iters=2)
    run = prepare(config, tmp_path / "run")
    messages: list[str] = []
    session = Session()
    seen: list[FirstKernels] = []

    def fail_in_the_block() -> None:
        with compiling_first_kernels(config, run, messages.append, session):
            under_way = kernels_of(session)
            seen.append(under_way)
            codes = [each.process.poll() for each in under_way._processes.values()]
            assert codes == [None] * len(PARTS)
            raise RuntimeError("the load failed")

    with pytest.raises(RuntimeError, match="the load failed"):
        fail_in_the_block()
    assert seen[0]._processes == {}
    assert not Path(seen[0]._folder.name).exists()
    assert session.await_kernels is None  # nothing is waited for any more
    assert len(messages) == 1


def test_a_store_that_cannot_be_locked_any_more_is_told_of_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = KernelStore(tmp_path / "kernels")
    (tmp_path / "kernels").mkdir()
    folder = store.new_process_folder()
    (tmp_path / "kernels" / LOCK_NAME).unlink()
    (tmp_path / "kernels" / LOCK_NAME).symlink_to(tmp_path / "elsewhere")
    monkeypatch.setattr(compiled_kernels, "_process_store", (store, folder))
    fake_worker(tmp_path, monkeypatch, "return {}")
    config = example_config(iters=2)
    session = Session()
    with compiling_first_kernels(
        config, prepare(config, tmp_path / "run"), lambda _: None, session
    ):
        kernels_of(session).take(lambda: False)
    assert "compiled ahead cannot be used" in caplog.text
    assert "symbolic link" in caplog.text


def kernels_of(session: Session) -> FirstKernels:
    """What a training of the session waits for."""
    found = getattr(session.await_kernels, "__self__", None)
    assert isinstance(found, FirstKernels)
    return found


def test_a_stop_that_is_requested_ends_the_wait_and_the_processes(tmp_path, monkeypatch) -> None:
    fake_worker(tmp_path, monkeypatch, "import time; time.sleep(3600)")
    config = example_config(iters=4)
    run = prepare(config, tmp_path / "run")
    messages: list[str] = []
    session = Session()
    with compiling_first_kernels(config, run, messages.append, session):
        processes = list(kernels_of(session)._processes.values())
        kernels_of(session).take(lambda: True)
        assert all(each.process.returncode is not None for each in processes)
    assert len(messages) == 1


def test_what_was_compiled_is_taken_once_and_a_full_store_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    fake_worker(tmp_path, monkeypatch, "return None")
    config = example_config(iters=4)
    run = prepare(config, tmp_path / "run")
    monkeypatch.setattr(compiled_kernels, "take_recorded_kernels", lambda: 7)
    messages: list[str] = []
    session = Session()
    with compiling_first_kernels(config, run, messages.append, session):
        kernels_of(session).take(lambda: False)
        kernels_of(session).take(lambda: False)
    assert [message.partition(" in ")[0] for message in messages[1:]] == [
        "kernels: 7 were compiled ahead"
    ]

    def fail() -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiled_kernels, "take_recorded_kernels", fail)
    with (
        caplog.at_level(logging.WARNING),
        compiling_first_kernels(config, run, messages.append, session),
    ):
        kernels_of(session).take(lambda: False)
    assert "compiled ahead cannot be used: [Errno 28] No space left on device" in caplog.text


def test_a_run_goes_on_where_the_processes_cannot_be_started(tmp_path, monkeypatch, caplog) -> None:
    fake_worker(tmp_path, monkeypatch, "import time; time.sleep(3600)")
    config = example_config(iters=4)
    run = prepare(config, tmp_path / "run")

    def fail(part: str, folder: Path) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(first_kernels, "start_worker", fail)
    went_on: list[str] = []
    with (
        caplog.at_level(logging.WARNING),
        compiling_first_kernels(config, run, went_on.append, Session()),
    ):
        went_on.append("the block ran")
    assert went_on[-1] == "the block ran"
    assert "as they are needed, and not ahead: [Errno 12] Cannot allocate memory" in caplog.text


@pytest.mark.parametrize(
    ("changes", "is_worth"),
    [
        ({}, True),
        ({"fine_tune_type": "full"}, False),
        ({"fine_tune_type": "dora", "training": {"precision": "float32"}}, False),
        ({"training": {"memory_limit_gb": 8}}, False),
        ({"nested": {"strategy": "parameter_importance", "frequencies": [1, 2]}}, False),
        pytest.param({"training": {"processes": 2}}, False, marks=needs_rooms("ranks")),
        ({"kernels": True}, False),
        ({"cuda": False}, False),
        ({"cores": len(PARTS)}, False),
    ],
)
def test_only_a_first_run_on_a_gpu_with_cores_enough_compiles_ahead(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any], is_worth: bool
) -> None:
    has_kernels = changes.pop("kernels", False)
    cores = changes.pop("cores", len(PARTS) + 1)
    is_cuda = changes.pop("cuda", True)
    monkeypatch.setattr(compiled_kernels, "began_without_kernels", lambda: not has_kernels)
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: is_cuda)
    monkeypatch.setattr(first_kernels, "count_usable_cores", lambda: cores)
    config = example_config(iters=8, **changes)
    run = RunDirectory(tmp_path)
    assert first_kernels.are_worth_compiling_ahead(config, run) == is_worth
    run.result.write_text("{}")
    assert not first_kernels.are_worth_compiling_ahead(config, run)
