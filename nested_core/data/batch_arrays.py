"""A batch: the rows of it, and the padded arrays of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from nested_core.data.array_types import Bool, Int32
from nested_core.data.tokens.tokenized_split import TokenizedSplit


@dataclass(frozen=True, eq=False)
class BatchRows:
    """The rows of one batch, int32 [at most batch_size], and the width of its inputs in tokens."""

    rows: Int32
    width: int


def make_batch_arrays(
    split: TokenizedSplit, batch: BatchRows, batch_size: int
) -> tuple[Int32, Bool]:
    """Tokens int32 [batch_size, width + 1], padded with 0; target_mask bool [batch_size, width].

    inputs = tokens[:, :-1], targets = tokens[:, 1:]; target_mask[:, j] is about the target in
    column j, which is token j + 1. It is false at padding and in rows without an example.
    """
    tokens = np.zeros((batch_size, batch.width + 1), np.int32)
    target_mask = np.zeros((batch_size, batch.width), np.bool_)
    for place, row in enumerate(batch.rows):
        example = split.example(row)
        tokens[place, : len(example)] = example
        targets = split.example_mask(row)[1:]  # of no tokens none, not even the first
        target_mask[place, : len(targets)] = targets
    split.release_pages()
    return tokens, target_mask
