"""Two processes train what one trains on the same batches, send what is due, and stay equal."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import TrainingProcessesDiffer, TrainingStopped
from nested_core.pipeline import steps
from nested_core.records.metrics import read_metrics
from nested_core.records.plan import read_plan
from nested_core.rooms.ranks.rank_group import RankGroup
from nested_core.storage.checkpoint_verification import checkpoint_path, list_checkpoints
from nested_core.storage.run_directory import RunDirectory
from nested_core.storage.safetensors_files import load_arrays
from tests.example import example_config, prepare, stop_after
from tests.left_out import slow_except
from tests.rooms.ranks.astray_ranks import go_astray

pytestmark = [
    pytest.mark.usefixtures("forked_ranks"),
    pytest.mark.slow("trains in two ranks and in one process"),
]

STEPS = 10
TIER_BYTES = 4 * 10_240  # parameters of each tier, float32
ENDS = 12  # the weight, and the requests to stop and to save


@dataclass(frozen=True)
class Pair:
    """The same run by one process and by two."""

    one: RunDirectory
    two: RunDirectory
    config: FineTuneConfig
    groups: list[Any]


def settings(slow_gradients: str, processes: int) -> dict[str, Any]:
    return {
        "iters": 2 * STEPS - 1,  # the last step has one micro-batch
        "batch_size": 4,
        "grad_accumulation_steps": 2,
        "val_batches": 2,
        "steps_per_report": 2,
        "steps_per_eval": 10,
        "optimizer_config": {"adam": {"eps": 1e-6}},  # no moment near zero multiplies rounding
        "nested": {"frequencies": [1, 2, 4], "slow_gradients": slow_gradients},
        "training": {"processes": processes},
    }


@pytest.fixture(
    scope="module", params=slow_except(["skip", "accumulate"], "skip", reason="trains two ranks")
)
def pair(request, tmp_path_factory, forked_ranks) -> Pair:
    folder, groups = tmp_path_factory.mktemp("ranks"), list[Any]()
    runs = list[RunDirectory]()
    for processes in (1, 2):
        config = example_config(**settings(request.param, processes))
        runs.append(prepare(config, folder / str(processes)))
        steps.train(config, runs[-1], on_start=groups.append)
    return Pair(runs[0], runs[1], config, groups)


def of_checkpoint(run: RunDirectory, name: str) -> dict[str, np.ndarray]:
    path = checkpoint_path(run.checkpoints, STEPS) / name
    return {n: np.array(array, np.float64) for n, array in load_arrays(path).items()}


def test_the_weights_are_those_of_one_process_within_rounding(pair: Pair) -> None:
    one, two = (of_checkpoint(run, "adapters.safetensors") for run in (pair.one, pair.two))
    start = load_arrays(pair.one.initial / "adapters.safetensors")
    moved = sum(np.square(one[n] - np.array(start[n])).sum() for n in one)
    apart = sum(np.square(one[n] - two[n]).sum() for n in one)
    assert moved > 1.0
    assert (apart / moved) ** 0.5 < 1e-5
    assert max(np.abs(one[n] - two[n]).max() for n in one) < 1e-5  # a two-hundredth of one update


def test_losses_norms_and_tokens_are_those_of_one_process(pair: Pair) -> None:
    one, two = read_metrics(pair.one.metrics), read_metrics(pair.two.metrics)
    assert len(one) == len(two) == STEPS + 1
    for ours, theirs in zip(one, two, strict=True):
        for key in ("step", "iteration", "updates", "skipped", "trained_tokens"):
            assert ours.get(key) == theirs.get(key)
        for key in ("loss", "val_loss", "grad_norm"):
            assert (ours.get(key) or 0) == pytest.approx(theirs.get(key) or 0, rel=2e-4)


def test_only_the_gradients_of_the_due_tiers_are_sent(pair: Pair) -> None:
    sent = [r["gradient_bytes"] for r in read_metrics(pair.two.metrics) if "loss" in r]
    due = [sum(step % f == 0 for f in (1, 2, 4)) for step in range(1, STEPS + 1)]
    if pair.config.nested.slow_gradients == "accumulate":
        due = [3] * STEPS  # every gradient is in use at every step
    assert sent == [tiers * TIER_BYTES + ENDS for tiers in due]
    assert all("gradient_bytes" not in record for record in read_metrics(pair.one.metrics))


def test_the_run_directory_is_that_of_one_process_and_passes_the_gate(pair: Pair) -> None:
    names = [{p.name for p in run.path.rglob("*")} for run in (pair.one, pair.two)]
    assert names[0] == names[1]
    verdict = steps.judge(pair.config, pair.two)
    assert verdict.has_passed
    group = pair.groups[1]
    assert isinstance(group, RankGroup)
    assert (group.steps, group.current_step) == (STEPS, STEPS)
    assert [tier.parameters * 4 for tier in group.tier_stats()] == [TIER_BYTES] * 3


@pytest.mark.slow("trains two ranks")
def test_a_run_begun_by_one_process_goes_on_in_two_with_its_weights_and_moments(
    pair: Pair, tmp_path: Path
) -> None:
    half, both = (
        example_config(**settings(pair.config.nested.slow_gradients, processes))
        for processes in (1, 2)
    )
    run = prepare(half, tmp_path / "run")
    with pytest.raises(TrainingStopped):
        steps.train(half, run, on_start=stop_after(STEPS // 2))
    steps.write_run_config(both, run, resume=True)
    steps.train(both, run)
    for name in ("adapters.safetensors", "optimizer.safetensors"):
        one, resumed = of_checkpoint(pair.one, name), of_checkpoint(run, name)
        assert one.keys() == resumed.keys()
        assert max(np.abs(one[n] - resumed[n]).max() for n in one) < 1e-5
    plan = read_plan(run.plan)
    assert plan is not None
    assert plan.rank_counts == ((0, 1), (STEPS // 2, 2))


@pytest.mark.slow("trains two ranks")
def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_by_all(tmp_path, monkeypatch) -> None:
    config = go_astray(monkeypatch, "nan")
    run = prepare(config, tmp_path / "run")
    assert steps.train(config, run).step == 8  # and the ranks were equal to the end
    last = read_metrics(run.metrics)[-1]
    assert (last["updates"], last["skipped"]) == ([7, 4, 2], [1, 0, 0])


@pytest.mark.slow("trains two ranks")
def test_a_rank_that_differs_is_named_and_nothing_of_it_is_kept(tmp_path, monkeypatch) -> None:
    config = go_astray(monkeypatch, "bit")
    run = prepare(config, tmp_path / "run")
    with pytest.raises(
        TrainingProcessesDiffer, match=r"At step 4 rank 1 of 2 holds other numbers"
    ) as caught:
        steps.train(config, run)
    assert "tier0 among them" in str(caught.value)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-0000002"]
    assert not run.result.exists()
    monkeypatch.undo()
    steps.write_run_config(config, run, resume=True)
    assert steps.train(config, run).step == 8


@pytest.mark.slow("trains two ranks")
def test_the_main_rank_says_when_minutes_are_over_and_all_save(tmp_path, monkeypatch) -> None:
    config = example_config(
        batch_size=4, iters=7, val_batches=0, save_every="0.00001m", training={"processes": 2}
    )
    run = prepare(config, tmp_path / "run")
    assert steps.train(config, run).step == 7
    kept = [path.name[-1] for path in list_checkpoints(run.checkpoints)]
    assert kept == ["2", "4", "6", "7"]  # asked for with a step, and done after the next one
