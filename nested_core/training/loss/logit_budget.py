"""The logit budget: how many positions may go through a model's output layer at once.

Logits are the largest array of a batch: those of 125 rows of 100 tokens, in float32 with 49,152
words, take 2.3 GiB, and a loss makes several arrays of that size. Liger-Kernel's fused linear
cross-entropy computes chunks of the positions for the same reason (fused_linear_cross_entropy.py),
Apple's cut cross-entropy blocks of positions and words (arXiv 2411.09009), and mlx_lm reads a
prompt in steps of `prefill_step_size` tokens.

Chunks in one lazy graph do not bound memory by themselves: MLX allocates the output of an operation
when it is scheduled, many operations ahead of the device. Code that needs no gradient must evaluate
each chunk before it creates the next one.
"""

from __future__ import annotations

from collections.abc import Iterator

from nested_core import backend
from nested_core.training.loss.loss_interface import MicroBatch

LOGIT_BYTES = 256 * 2**20  # of all logits that exist at once, counted in float32
# A CPU is fastest if a chunk's logits fit its caches. But a chunk needs 64 positions or more,
# because each chunk reads all weights of the output layer.
LOGIT_BYTES_IN_CACHES = 8 * 2**20  # of each model's logits
MIN_POSITIONS_IN_CACHES = 64
BYTES_OF_LOGIT = 4


def positions_at_once(vocabulary: int, models: int = 1) -> int:
    """Return how many positions may have their logits in memory at once, at least one.

    Args:
        vocabulary: the number of logits at a position.
        models: the number of models whose logits at the same position exist together.
    """
    limit = max(1, LOGIT_BYTES // (BYTES_OF_LOGIT * vocabulary))
    return max(1, (1 << limit.bit_length() - 1) // models)  # a power of two for one model


def positions_without_gradient(vocabulary: int, models: int = 1) -> int:
    """Return `positions_at_once`, on a CPU limited to what its caches hold."""
    limit = positions_at_once(vocabulary, models)
    if backend.device() != "cpu":
        return limit
    cached = LOGIT_BYTES_IN_CACHES // (BYTES_OF_LOGIT * vocabulary)
    return min(limit, max(MIN_POSITIONS_IN_CACHES, cached))


def split_batch(batch: MicroBatch, vocabulary: int, models: int = 1) -> Iterator[MicroBatch]:
    """Yield parts of a batch whose positions may all have logits at once, in row order.

    For a model that computes the logits of every position. A part has at least one row, however
    long.
    """
    tokens, target_mask = batch
    rows, width = target_mask.shape
    size = max(1, positions_at_once(vocabulary, models) // width)
    for start in range(0, rows, size):
        yield tokens[start : start + size], target_mask[start : start + size]
