"""Which tensors move at which step, how many updates each tier gets, and what is verified."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nested_core.errors import ConfigError
from nested_core.pipeline import steps
from nested_core.storage.checkpoint import OPTIMIZER_NAME
from nested_core.storage.checkpoint_verification import STATE_NAME, checkpoint_path
from nested_core.storage.safetensors_files import read_tensors
from tests.example import Finished, example_config, prepare, train, train_example

FREQUENCIES = (1, 2, 4)


def tier_of(finished: Finished) -> dict[str, int]:
    return dict(json.loads(finished.run.tiers.read_bytes())["tensors"])


def moved_tiers(finished: Finished, step: int) -> dict[int, set[str]]:
    """The tensors, by tier, whose bytes differ from those one step before."""
    before, after = finished.at(step - 1).tensors, finished.at(step).tensors
    moved: dict[int, set[str]] = {0: set(), 1: set(), 2: set()}
    for name, tier in tier_of(finished).items():
        if before[name].data != after[name].data:
            moved[tier].add(name)
    return moved


@pytest.mark.claim("Each tier was updated as often as `nested.frequencies` says")
def test_three_steps_of_frequencies_1_and_2_give_three_updates_and_one(tmp_path: Path) -> None:
    done = train_example(tmp_path / "run", iters=3, nested={"frequencies": [1, 2]})
    state = json.loads((checkpoint_path(done.run.checkpoints, 3) / STATE_NAME).read_bytes())
    assert [tier["updates"] for tier in state["tiers"]] == [3, 1]
    assert done.metrics()[-1]["updates"] == [3, 1]
    verdict = steps.judge(done.config, done.run)
    assert [(t.expected_updates, t.applied_updates) for t in verdict.tiers] == [(3, 3), (1, 1)]


@pytest.mark.parametrize("step", range(1, 10))
def test_a_tier_that_is_not_due_keeps_its_bytes(every_step: Finished, step: int) -> None:
    for tier, names in moved_tiers(every_step, step).items():
        assert bool(names) == (step % FREQUENCIES[tier] == 0), tier


@pytest.mark.parametrize("step", range(2, 10))
def test_a_tier_that_is_not_due_keeps_its_moments(every_step: Finished, step: int) -> None:
    folders = [checkpoint_path(every_step.run.checkpoints, n) for n in (step - 1, step)]
    before, after = (read_tensors(folder / OPTIMIZER_NAME) for folder in folders)
    for name, tier in tier_of(every_step).items():
        if step % FREQUENCIES[tier]:
            assert before[f"{name}.m"].data == after[f"{name}.m"].data
            assert before[f"{name}.v"].data == after[f"{name}.v"].data


def test_every_lora_b_of_a_due_tier_moves_and_every_lora_a_from_its_second_update(
    every_step: Finished,
) -> None:
    names = [name for name, tier in tier_of(every_step).items() if tier == 1]
    assert moved_tiers(every_step, 2)[1] == {name for name in names if name.endswith("lora_b")}
    assert moved_tiers(every_step, 4)[1] == set(names)


def test_under_accumulate_a_slow_tier_moves_when_it_is_due_and_at_the_end(accumulated) -> None:
    moves = {step: moved_tiers(accumulated, step) for step in range(1, 10)}
    assert [step for step in moves if moves[step][1]] == [2, 4, 6, 8, 9]
    assert [step for step in moves if moves[step][2]] == [4, 8, 9]


def test_a_flush_counts_as_an_update_and_is_recorded(accumulated: Finished) -> None:
    folder = checkpoint_path(accumulated.run.checkpoints, 9)
    state = json.loads((folder / STATE_NAME).read_bytes())
    assert state["flushed"] is True
    assert [tier["updates"] for tier in state["tiers"]] == [9, 5, 3]
    verdict = steps.judge(accumulated.config, accumulated.run)
    assert [t.expected_updates for t in verdict.tiers] == [9, 5, 3]


@pytest.mark.slow("trains a run of its own")
def test_no_flush_is_recorded_where_no_chunk_is_open(tmp_path: Path) -> None:
    nested = {"frequencies": [1, 2, 4], "slow_gradients": "accumulate"}
    done = train_example(tmp_path / "run", iters=8, nested=nested)
    state = json.loads((checkpoint_path(done.run.checkpoints, 8) / STATE_NAME).read_bytes())
    assert state["flushed"] is False
    assert [tier["updates"] for tier in state["tiers"]] == [8, 4, 2]


def test_updates_are_verified_at_each_new_set_of_due_tiers_report_and_checkpoint(tmp_path) -> None:
    done = train_example(
        tmp_path / "run", iters=23, steps_per_report=10, save_every=7, steps_per_eval=16
    )
    first_of_each_set, reports, saves, evaluation, last = [1, 2, 4], [10, 20], [7, 14, 21], 16, 23
    expected = sorted({*first_of_each_set, *reports, *saves, evaluation, last})
    assert done.trainer.state.verified_steps == expected
    assert done.result.verified_steps == len(expected)
    assert done.result.red_flags == ()


@pytest.mark.slow("trains a run twice and judges it")
def test_a_flushed_run_that_is_given_more_iterations_still_passes_the_gate(tmp_path: Path) -> None:
    nested = {"frequencies": [1, 4], "slow_gradients": "accumulate"}
    done = train_example(tmp_path / "run", iters=6, nested=nested)
    longer = example_config(iters=10, nested=nested)
    steps.write_run_config(longer, done.run, resume=True)
    train(longer, done.run)
    verdict = steps.judge(longer, done.run)
    assert verdict.tiers[1].applied_updates == 4  # at 4, flushed at 6, at 8, flushed at 10


def test_a_tier_that_is_never_due_is_refused_before_training(tmp_path: Path) -> None:
    config = example_config(iters=3)
    run = prepare(config, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"every 4 optimizer steps, but the run has only 3"):
        train(config, run)
    assert not run.metrics.exists()


@pytest.mark.slow("trains a run of its own")
def test_a_tier_a_layer_with_a_frequency_each(tmp_path: Path) -> None:
    frequencies = [1, 2, 3, 4, 5, 6]
    done = train_example(
        tmp_path / "run", iters=6, num_layers=-1, nested={"frequencies": frequencies}
    )
    assert done.metrics()[-1]["updates"] == [6, 3, 2, 1, 1, 1]
    verdict = steps.judge(done.config, done.run)
    assert [t.applied_updates for t in verdict.tiers] == [6 // every for every in frequencies]
    stats = done.trainer.optimizer.get_tier_stats()
    assert [(s.tier, s.frequency, s.tensors, s.updates) for s in stats] == [
        (i, every, 14, 6 // every) for i, every in enumerate(frequencies)
    ]
    assert sum(s.parameters for s in stats) == sum(
        tensor.to_numpy().size for tensor in done.at(6).tensors.values()
    )


@pytest.mark.slow("trains and judges a run of its own")
@pytest.mark.parametrize(("fast", "layers"), [("shallow", (3, 5)), ("deep", (5, 3))])
def test_the_end_that_is_to_be_fast_updates_at_every_step(tmp_path, fast, layers) -> None:
    nested = {"frequencies": [1, 2, 4], "fast": fast}
    done = train_example(tmp_path / "run", iters=5, nested=nested, save_every=1)
    moved = [
        {int(name.split(".")[2]) for names in moved_tiers(done, step).values() for name in names}
        for step in range(1, 6)
    ]
    assert [layers[0] in each for each in moved] == [True] * 5
    assert [layers[1] in each for each in moved] == [False, False, False, True, False]
    assert steps.judge(done.config, done.run).has_passed
