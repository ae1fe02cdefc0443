"""The loss on the test set, in mlx_lm.lora's words."""

from __future__ import annotations

from pathlib import Path

from flows.flow_runs.loss_on_test_set import describe_test_loss
from nested_core.storage.run_directory import RunDirectory
from tests.core.report.verdicts import make_verdict
from tests.example import example_config
from tests.runs import write_dataset


def test_the_test_loss_names_its_file_examples_and_adapter(tmp_path: Path) -> None:
    verdict = make_verdict(adapter_step=80)
    run = RunDirectory(tmp_path)
    write_dataset(run, test=40)
    limited = describe_test_loss(example_config(test_batches=5, batch_size=4), run, verdict, 1.0)
    assert limited == (
        "Test loss 1, Test ppl 2.718 (test.jsonl, at most 5 batches of 4, adapter of step 80)"
    )
    everything = example_config(test_batches=-1)
    assert "(test.jsonl, all examples, " in describe_test_loss(everything, run, verdict, 1.0)
    assert "Test loss 800, Test ppl not finite" in describe_test_loss(
        everything, run, verdict, 800.0
    )
