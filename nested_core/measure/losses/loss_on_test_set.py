"""The loss on the test set, in the words of mlx_lm.lora."""

from __future__ import annotations

import math
from dataclasses import dataclass

from nested_core.text.foreign_text import escape
from nested_core.text.loss_format import format_loss

MAX_EXPONENT = 709.0  # of e in a float


@dataclass(frozen=True)
class LossOnTestSet:
    """The loss of a run's adapter on the test set.

    mean: in nats per supervised token; None if no example was counted.
    left_out: how many examples were not counted, because the adapter or one before it was trained
        on them.
    examples: how much of the file was read, in words.
    """

    mean: float | None
    left_out: int
    file: str
    examples: str
    adapter_step: int

    def describe(self) -> str:
        """Describe the loss as mlx_lm.lora does, then how much of the file, and which adapter.

        `Test loss 3.12, Test ppl 22.65 (test.jsonl, all examples, adapter of step 80)`.
        """
        figures = "Test loss not measured"
        if self.mean is not None:
            perplexity = math.exp(self.mean) if self.mean < MAX_EXPONENT else math.inf
            figures = f"Test loss {format_loss(self.mean)}, Test ppl {format_loss(perplexity)}"
        without = f", without {self.left_out:,} that were trained on" if self.left_out else ""
        read = f"{escape(self.file)}, {self.examples}{without}"
        return f"{figures} ({read}, adapter of step {self.adapter_step})"
