"""Batches, loss and evaluations of mlx_lm.lora, to the bit.

Mirrors mlx_lm.tuner.trainer (0.32): iterate_batches, evaluate, train and default_loss.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from mlx_lm.tuner.trainer import default_loss

from nested_core.config.schema import FineTuneConfig
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.errors import ConfigError
from nested_core.storage.untrusted_files import UNBOUNDED, open_regular
from nested_core.training.loss.loss_interface import BatchShape, Loss, MicroBatch
from nested_core.training.schedule.step_schedule import ReferenceSchedule

PAD_MULTIPLE = 32
# Of a micro-batch (tokens, bounds): int32 (batch, length + 1), and (batch, 2) with the first target
# and the length of each row.
MLX_LM_LOSS = Loss(default_loss, is_mean=True)


class MlxLmSchedule:
    """The schedule of mlx_lm.lora.

    One padding token a row counts, all micro-batches weigh the same, a partial batch or
    accumulation at the end is dropped, and each evaluation draws other rows, before the update
    that it is due with.
    """

    loss = MLX_LM_LOSS
    offers_best = False

    def __init__(self, config: FineTuneConfig, splits: Mapping[str, TokenizedSplit]) -> None:
        self._config = config
        self._train = splits["train"]
        self._valid = splits.get("valid")
        self.iterations = config.iters
        self.steps = config.iters // config.grad_accumulation_steps
        self.intervals = config.intervals(self.iterations)
        self._train_batches = _batches_in_mlx_lm_order(config, "train", splits)
        self.epochs = self.iterations / len(self._train_batches)
        self._valid_batches = _batches_in_mlx_lm_order(config, "valid", splits)
        self.validation_examples = config.batch_size * self._count_evaluated_batches(
            len(self._valid_batches)
        )
        # mlx_lm draws the orders of both splits from one random state, one after the other.
        self._random = np.random.RandomState(config.seed)
        self._drawn = 0
        self._train_orders: list[np.ndarray] = []
        self._valid_orders: dict[int, np.ndarray] = {}

    def largest_batch(self) -> BatchShape:
        """Return a full batch of the longest example; logits are computed at every position."""
        width = self._padded_width(int(self._train.lengths.max())) - 1
        return BatchShape(self._config.batch_size, width, self._config.batch_size * width)

    def position_counts(self) -> Mapping[int, int]:
        """Leave none out: mlx_lm computes the logits of every position."""
        return {}

    def micro_batch(self, index: int) -> MicroBatch:
        """Return a batch of this epoch's order."""
        self._draw_batch_order_until(index + 1)
        epoch, position = divmod(index, len(self._train_batches))
        rows = self._train_batches[self._train_orders[epoch][position]]
        return self._make_batch_arrays(self._train, rows)

    def count_replayed_tokens(self, iterations: int) -> None:
        """Return None: mlx_lm.lora replays nothing."""

    def validation_batches(self, iteration: int) -> Iterable[MicroBatch] | None:
        """Yield `val_batches` batches, in an order that only this evaluation has."""
        valid = self._valid
        if valid is None or not self._valid_batches or self._config.val_batches == 0:
            return None
        self._draw_batch_order_until(iteration + 1)
        order = self._valid_orders[iteration + 1]
        count = self._count_evaluated_batches(len(order))
        return (self._make_batch_arrays(valid, self._valid_batches[i]) for i in order[:count])

    def validation_targets(self) -> None:
        """Return None: each evaluation reads other rows, and none chooses the selected step."""

    def _count_evaluated_batches(self, available: int) -> int:
        """Return how many of the validation batches an evaluation draws."""
        wanted = self._config.val_batches
        return available if wanted == -1 else min(wanted, available)

    def seed_step(self, step: int) -> None:
        """Do nothing: draws go on from step to step, and the checkpoint holds the random key."""

    def is_complete_step(self, first: int, last: int) -> bool:
        """Return whether a step has all its micro-batches: mlx_lm applies no partial one."""
        return last - first == self._config.grad_accumulation_steps

    def _is_evaluated_at(self, iteration: int) -> bool:
        every = self.intervals.evaluation
        return iteration in (1, self.iterations) or iteration % every == 0

    def _draw_batch_order_until(self, iteration: int) -> None:
        """Draw what np.random gives mlx_lm.lora up to an iteration, from 1, in its order."""
        while self._drawn < iteration:
            if self._drawn % len(self._train_batches) == 0:
                self._train_orders.append(self._random.permutation(len(self._train_batches)))
            self._drawn += 1
            if self._valid_batches and self._is_evaluated_at(self._drawn):
                order = self._random.permutation(len(self._valid_batches))
                self._valid_orders[self._drawn] = order

    def _make_batch_arrays(self, split: TokenizedSplit, rows: list[int]) -> MicroBatch:
        """Make tokens, one more than a multiple of 32 wide, and mlx-lm's bounds for a mask.

        The bounds of a row are the first target and the row's length: its targets are contiguous.
        """
        examples = [split.example(row) for row in rows]
        tokens = np.zeros((len(rows), self._padded_width(max(map(len, examples)))), np.int32)
        for place, example in enumerate(examples):
            tokens[place, : len(example)] = example
        offsets = [int(split.example_mask(row).argmax()) for row in rows]
        return tokens, np.array(list(zip(offsets, map(len, examples), strict=True)), np.int32)

    def _padded_width(self, longest: int) -> int:
        width = 1 + PAD_MULTIPLE * ((longest + PAD_MULTIPLE - 1) // PAD_MULTIPLE)
        return min(width, self._config.max_seq_length)


def _batches_in_mlx_lm_order(
    config: FineTuneConfig, split: str, splits: Mapping[str, TokenizedSplit]
) -> list[list[int]]:
    """Cut rows into full batches in mlx-lm's order.

    mlx-lm means to sort by length, but sorts rows before they are tokenised, by their key count.
    """
    path = Path(config.data) / f"{split}.jsonl"
    if split not in splits:
        return []
    if config.hf_dataset or not path.exists():
        raise ConfigError(
            "training.reference: mlx_lm's batch order is only followed on a local folder of "
            f".jsonl files; there is no {path}. Convert the data, or leave reference out."
        )
    with open_regular(path, UNBOUNDED, follow_links=True) as (lines, _):
        key_counts = [len(json.loads(line)) for line in lines if line.strip()]
    rows = sorted(range(len(key_counts)), key=key_counts.__getitem__)
    starts = range(0, len(rows) - config.batch_size + 1, config.batch_size)
    return [rows[start : start + config.batch_size] for start in starts]


SCHEDULE = ReferenceSchedule(MlxLmSchedule)
