"""A run that is stopped and goes on is, to the bit, the run that was never stopped."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from nested_core.config.resume import read_run_config
from nested_core.config.schema import FineTuneConfig
from nested_core.errors import (
    ConfigError,
    DamagedError,
    DatasetError,
    GateRejected,
    TrainingStopped,
)
from nested_core.pipeline import steps
from nested_core.records.metrics import cumulative_seconds
from nested_core.records.plan import read_plan
from nested_core.storage import manifest
from nested_core.storage.checkpoint import OPTIMIZER_NAME
from nested_core.storage.checkpoint_verification import checkpoint_path, list_checkpoints
from nested_core.storage.run_directory import RunDirectory, open_run
from nested_core.storage.safetensors_files import load_arrays, read_tensors
from nested_core.storage.untrusted_files import regular_sha256
from tests.example import (
    MODEL,
    SPEEDS,
    Finished,
    example_config,
    prepare,
    stop_after,
    train,
    train_example,
)
from tests.left_out import slow_except

STEPS = 7  # 13 micro-batches, two a step: the last is alone


def settings(slow_gradients: str) -> dict[str, Any]:
    return {
        "iters": 13,
        "grad_accumulation_steps": 2,
        "steps_per_report": 3,
        "steps_per_eval": 8,
        "save_every": 6,
        "val_batches": 2,
        "lora_parameters": {"dropout": 0.1},
        "nested": {"frequencies": [1, 2, 4], "slow_gradients": slow_gradients},
    }


STOPS = "trains to an end, stops, resumes and compares"


@pytest.fixture(scope="module", params=slow_except(["skip", "accumulate"], "skip", reason=STOPS))
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The run that nobody stops, in each mode."""
    return train_example(tmp_path_factory.mktemp("whole") / "run", **settings(request.param))


def stop(config: FineTuneConfig, run: RunDirectory, step: int) -> str:
    with pytest.raises(TrainingStopped) as stopped:
        train(config, run, on_start=stop_after(step))
    return str(stopped.value)


def go_on(config: FineTuneConfig, run: RunDirectory) -> Finished:
    steps.write_run_config(config, run, resume=True)
    steps.validate(config, run)
    steps.write_initial_adapter_and_tiers(config, run)
    return train(config, run)


def assert_same(done: Finished, whole: Finished) -> None:
    """Adapters, optimizer and metrics, bit for bit; only speeds may differ."""
    assert done.at(STEPS).tensors == whole.at(STEPS).tensors
    optimizers = [
        read_tensors(checkpoint_path(each.run.checkpoints, STEPS) / OPTIMIZER_NAME)
        for each in (done, whole)
    ]
    assert optimizers[0] == optimizers[1]
    assert done.metrics(without=SPEEDS) == whole.metrics(without=SPEEDS)
    assert done.result.adapter_step == whole.result.adapter_step
    assert done.result.best_val_loss == whole.result.best_val_loss
    files = [each.run.adapter / "adapters.safetensors" for each in (done, whole)]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.claim(
    "On a CPU a killed run resumes to the bit (not under OpenBLAS's SkylakeX), or is complete"
)
@pytest.mark.parametrize("step", slow_except([1, 4], 4, reason=STOPS))
def test_a_run_stopped_at_any_step_and_resumed_is_bit_identical(whole, tmp_path, step) -> None:
    run = prepare(whole.config, tmp_path / "run")
    stop(whole.config, run, step)
    assert list_checkpoints(run.checkpoints)[-1] == checkpoint_path(run.checkpoints, step)
    done = go_on(whole.config, run)
    assert_same(done, whole)
    steps.judge(done.config, run)


@pytest.mark.slow(STOPS)
def test_a_run_stopped_twice_and_once_before_its_first_step_is_bit_identical(
    whole: Finished, tmp_path: Path
) -> None:
    run = prepare(whole.config, tmp_path / "run")
    for step in (0, 2, 5):
        stop(whole.config, run, step)
    done = go_on(whole.config, run)
    assert_same(done, whole)
    plan = read_plan(run.plan)
    assert plan is not None
    assert plan.resumed_at == (2, 5)
    seconds = cumulative_seconds(done.metrics())
    assert seconds == sorted(seconds)


@pytest.mark.slow(STOPS)
def test_a_checkpoint_older_than_the_last_report_cuts_the_metrics_back(whole, tmp_path) -> None:
    run = prepare(whole.config, tmp_path / "run")
    stop(whole.config, run, 5)
    newest = checkpoint_path(run.checkpoints, 5)
    (newest / "state.json").write_bytes(b"{}")
    with pytest.warns(UserWarning, match="step-0000005 is damaged, trying the one before"):
        done = go_on(whole.config, run)
    assert_same(done, whole)


@pytest.mark.parametrize(
    "optimizer", slow_except(["sgd", "adafactor", "muon", "lion"], reason=STOPS)
)
def test_an_optimizer_of_mlx_goes_on_where_it_was(tmp_path: Path, optimizer: str) -> None:
    changes: dict[str, Any] = {"iters": 4, "val_batches": 0, "nested": {"frequencies": [1, 2]}}
    whole = train_example(tmp_path / "whole", optimizer=optimizer, **changes)
    run = prepare(whole.config, tmp_path / "run")
    stop(whole.config, run, 2)
    done = go_on(whole.config, run)
    assert done.at(4).tensors == whole.at(4).tensors != whole.at(0).tensors
    assert steps.judge(done.config, run).has_passed


@pytest.fixture(scope="module")
def stopped_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[FineTuneConfig, Path, str]:
    """A run of 8 steps, stopped after 3, and what the stop said; no test changes it."""
    config = example_config(val_batches=2)
    run = prepare(config, tmp_path_factory.mktemp("stopped") / "run")
    return config, run.path, stop(config, run, 3)


@pytest.fixture
def stopped(stopped_once, tmp_path: Path) -> tuple[FineTuneConfig, RunDirectory]:
    """A copy of it."""
    config, path, _ = stopped_once
    return config, RunDirectory(Path(shutil.copytree(path, tmp_path / "run")))


def test_a_stop_names_where_it_stopped_and_how_to_go_on(stopped_once) -> None:
    _, path, message = stopped_once
    assert "stopped at step 3 of 8" in message
    assert f"--run-dir {path} --resume" in message
    assert not RunDirectory(path).result.exists()


def test_the_checkpoint_of_a_stop_holds_verified_updates(stopped) -> None:
    path = checkpoint_path(stopped[1].checkpoints, 3)
    assert 3 in json.loads((path / "state.json").read_bytes())["verified_steps"]


def test_a_stop_request_from_another_process_stops_and_is_taken_away(tmp_path: Path) -> None:
    config = example_config(val_batches=0)
    run = prepare(config, tmp_path / "run")
    run.stop_request.touch()
    with pytest.raises(TrainingStopped, match=r"step 0 of 8\. There is no checkpoint yet"):
        train(config, run)
    assert not run.stop_request.exists()
    assert go_on(config, run).result.step == 8


@pytest.mark.slow(STOPS)
def test_a_stop_request_that_came_too_late_does_not_stop_the_next_run(tmp_path: Path) -> None:
    done = train_example(tmp_path / "run", val_batches=0)
    done.run.stop_request.touch()
    with done.run.locked():
        assert go_on(example_config(val_batches=0, iters=12), done.run).result.step == 12


def test_a_stop_request_that_comes_before_the_run_has_begun_is_kept(tmp_path: Path) -> None:
    """`nested-tune stop` asks whoever holds the lock, which is taken before anything else."""
    config, run = example_config(val_batches=0), RunDirectory(tmp_path / "run")
    with run.locked():
        run.stop_request.touch()
        prepare(config, run.path)
        with pytest.raises(TrainingStopped, match="step 0 of 8"):
            train(config, run)


def test_a_run_that_another_process_began_meanwhile_is_not_written_over(tmp_path: Path) -> None:
    """Both found the directory empty; the other has ended by the time that this one is let in."""
    run = open_run(tmp_path / "run", resume=False)
    prepare(example_config(), run.path)
    written = run.config.read_bytes()
    with run.locked(), pytest.raises(ConfigError, match="begun a run here meanwhile") as caught:
        steps.write_run_config(example_config(learning_rate=1e-4), run, resume=False)
    assert str(run.path) in str(caught.value)
    assert run.config.read_bytes() == written


@pytest.mark.slow(STOPS)
def test_a_longer_run_that_was_stopped_is_not_taken_for_finished(tmp_path: Path) -> None:
    done = train_example(tmp_path / "run", val_batches=0)
    longer = example_config(val_batches=0, iters=16)
    steps.write_run_config(longer, done.run, resume=True)
    stop(longer, done.run, 12)
    assert steps.train(longer, done.run).step == 16


@pytest.mark.slow(STOPS)
def test_a_resume_hashes_its_newest_checkpoint_once(tmp_path, monkeypatch) -> None:
    done = train_example(tmp_path / "run", val_batches=0)
    newest = list_checkpoints(done.run.checkpoints)[-1]
    hashed: list[Path] = []

    def count(path: Path, **options: bool) -> str:
        hashed.append(path)
        return regular_sha256(path, **options)

    monkeypatch.setattr(manifest, "regular_sha256", count)
    longer = example_config(val_batches=0, iters=12)
    steps.write_run_config(longer, done.run, resume=True)
    assert steps.train(longer, done.run).step == 12
    assert hashed.count(newest / OPTIMIZER_NAME) == 1


def test_a_configuration_that_differs_is_refused_with_both_values(stopped) -> None:
    config, run = stopped
    changed = example_config(val_batches=2, learning_rate=1e-4, batch_size=4)
    with pytest.raises(ConfigError) as caught:
        steps.write_run_config(changed, run, resume=True)
    assert "learning_rate: 0.002 in the run, 0.0001 now" in str(caught.value)
    assert "batch_size: 2 in the run, 4 now" in str(caught.value)
    assert str(caught.value).endswith("or another --run-dir for a new run.")


def test_a_run_that_made_no_adapter_yet_takes_the_corrected_configuration(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="num_layers"):
        prepare(example_config(num_layers=7), tmp_path / "run")
    corrected = example_config(num_layers=3, val_batches=0)
    run = open_run(tmp_path / "run", resume=True)
    steps.write_run_config(corrected, run, resume=True)
    steps.write_initial_adapter_and_tiers(corrected, run)
    assert read_run_config(run) == corrected
    assert train(corrected, run).result.step == 8


def test_a_run_without_a_sound_checkpoint_is_refused(stopped) -> None:
    config, run = stopped
    (checkpoint_path(run.checkpoints, 3) / "adapters.safetensors").write_bytes(b"no")
    with (
        pytest.warns(UserWarning, match="step-0000003 is damaged"),
        pytest.raises(DamagedError, match="No checkpoint in .* is sound"),
    ):
        go_on(config, run)


def overwrite_initial_adapter(run: RunDirectory) -> None:
    weights = checkpoint_path(run.checkpoints, 3) / "adapters.safetensors"
    shutil.copyfile(weights, run.initial / "adapters.safetensors")


def swap_tiers(run: RunDirectory) -> None:
    tiers = json.loads(run.tiers.read_bytes())
    tiers["tensors"] = {name: 2 - tier for name, tier in tiers["tensors"].items()}
    run.tiers.write_text(json.dumps(tiers))


@pytest.mark.parametrize(
    ("change", "named"), [(overwrite_initial_adapter, "initial"), (swap_tiers, r"tiers\.json")]
)
def test_what_was_changed_while_stopped_is_not_accepted(stopped, change, named) -> None:
    config, run = stopped
    change(run)
    with pytest.raises(DamagedError, match=named):
        steps.judge(config, go_on(config, run).run)


@pytest.mark.slow("trains a run of its own")
def test_a_base_that_was_replaced_while_stopped_is_not_accepted(tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(MODEL, base)
    config = example_config(model=str(base), val_batches=0)
    run = prepare(config, tmp_path / "run")
    stop(config, run, 3)
    weights = load_arrays(base / "model.safetensors")
    scaled = {name: weight * 0.5 for name, weight in weights.items()}
    mx.save_safetensors(str(base / "model.safetensors"), scaled)
    with pytest.raises((ConfigError, DamagedError, GateRejected), match="base"):
        steps.judge(config, go_on(config, run).run)


@pytest.mark.slow("trains a run of its own")
def test_data_that_changed_while_stopped_are_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    lines = Path(example_config().data, "train.jsonl").read_text().splitlines()
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    config = example_config(data=str(data))
    run = prepare(config, tmp_path / "run")
    stop(config, run, 3)
    (data / "train.jsonl").write_text("\n".join(lines[::-1]) + "\n")
    with pytest.raises(DatasetError, match="changed"):
        go_on(config, run)
