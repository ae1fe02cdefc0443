"""The loss on the test set: which examples count, and mlx_lm.lora's words for it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nested_core.data.example_digests import TrainedRows
from nested_core.measure.losses.held_out_loss import LoadedBase, read_nonempty_splits
from nested_core.measure.losses.loss_on_test_set import LossOnTestSet
from nested_core.pipeline import steps
from nested_core.storage.atomic import write_json
from tests.builders.candidates import example_data, train_candidate


def loss(**changes: Any) -> LossOnTestSet:
    """The loss on all examples of test.jsonl."""
    of_all = LossOnTestSet(
        mean=1.0, left_out=0, file="test.jsonl", examples="all examples", adapter_step=80
    )
    return replace(of_all, **changes)


def test_the_test_loss_names_its_file_examples_and_adapter() -> None:
    assert loss().describe() == (
        "Test loss 1, Test ppl 2.718 (test.jsonl, all examples, adapter of step 80)"
    )
    assert "Test loss 800, Test ppl not finite (" in loss(mean=800.0).describe()
    assert loss(mean=None, left_out=1_200).describe() == (
        "Test loss not measured (test.jsonl, all examples, without 1,200 that were trained on, "
        "adapter of step 80)"
    )


@pytest.mark.usefixtures("own_random_state")
@pytest.mark.slow("trains a run of its own")
def test_examples_that_the_run_was_trained_on_are_not_counted(tmp_path: Path) -> None:
    data = example_data(tmp_path / "data", "train", "valid")
    (data / "valid.jsonl").rename(data / "test.jsonl")
    candidate = train_candidate(tmp_path / "run", iters=4, data=str(data))
    config, run = candidate.config, candidate.run
    split = read_nonempty_splits(config, run)["test"]
    [(sums, tokens)] = LoadedBase.load(config).example_loss_sums((run.adapter,), split)
    for seen in (0, 3, len(split)):
        write_json(run.training_examples, TrainedRows(split.contents[:seen]).to_json())
        measured = steps.measure_test(config, run)
        assert measured.left_out == seen
        counted = tokens[seen:].sum()
        assert measured.mean == (pytest.approx(sums[seen:].sum() / counted) if counted else None)
