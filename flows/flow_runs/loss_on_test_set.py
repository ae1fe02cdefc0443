"""The loss on the test set, in the words of mlx_lm.lora."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from nested_core.config.schema import FineTuneConfig
from nested_core.records.dataset import read_dataset_record
from nested_core.storage.run_directory import RunDirectory
from nested_core.text.foreign_text import escape
from nested_core.text.loss_format import format_loss

if TYPE_CHECKING:
    from nested_core.records.verdict import Verdict

MAX_EXPONENT = 709.0  # of e in a float


def describe_test_loss(
    config: FineTuneConfig, run: RunDirectory, verdict: Verdict, loss: float
) -> str:
    """mlx_lm.lora's words for the loss on the test set, then how much of it, and which adapter.

    `Test loss 3.12, Test ppl 22.65 (test.jsonl, all examples, adapter of step 80)`.
    """
    examples = "all examples"
    if config.test_batches >= 0:
        examples = f"at most {config.test_batches} batches of {config.batch_size}"
    file = read_dataset_record(run.dataset).splits["test"].file
    perplexity = math.exp(loss) if loss < MAX_EXPONENT else math.inf
    return (
        f"Test loss {format_loss(loss)}, Test ppl {format_loss(perplexity)} "
        f"({escape(file)}, {examples}, adapter of step {verdict.adapter_step})"
    )
