"""Running totals between two reports, and what a report says of the optimizer."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from nested_core.backend import to_float, to_int
from nested_core.optim.gradient_clipping import clip_factor
from nested_core.optim.tier_counters import COUNTERS_KEY
from nested_core.optim.tiered import Tiered
from nested_core.training.rank_communication import Sums, World


class MetricsWindow:
    """Loss, token and time totals since the last report; pauses are left out of the time.

    Totals stay on the device until the report. Each rank adds up its own; once they are read, they
    are summed, and the main rank goes on with the sum.
    """

    def __init__(self, world: World, *, is_mean: bool = False) -> None:
        """`is_mean` is for a loss that is a mean, which is divided as mlx-lm divides it."""
        self._world = world
        self._is_mean = is_mean
        self._restart_window()

    def _restart_window(self) -> None:
        self.sums = _zero_sums()
        self.is_open = False
        self._earlier_tokens = 0
        self._iterations = 0
        self._gradient_bytes = 0
        self.restart_clock()

    def reopen(self, sums: Mapping[str, Any]) -> None:
        """Continue the window that a checkpoint was written in; a loss of None was not finite."""
        self.sums = {
            "loss": mx.array(math.nan if sums["loss"] is None else sums["loss"], mx.float32),
            "weight": mx.array(int(sums["weight"])),
            "tokens": mx.array(int(sums["tokens"])),
        }
        self._earlier_tokens = int(sums["tokens"])  # of another process, whose time is not known
        self.is_open = self._earlier_tokens > 0
        self._zero_sums_unless_main()

    def restart_clock(self) -> None:
        """Count time from now."""
        self._started = time.perf_counter()
        self._paused_seconds = 0.0

    @contextmanager
    def pausing_clock(self) -> Iterator[None]:
        """Leave the block's time out: evaluations and checkpoints are not training.

        If the clock restarts in the block, only the time since then counts as a pause.
        """
        paused_at = time.perf_counter()
        yield
        self._paused_seconds += time.perf_counter() - max(paused_at, self._started)

    def add_micro_batch(self, micro_batch: Mapping[str, mx.array]) -> None:
        """Add one micro-batch's loss, weight and tokens, not yet evaluated."""
        self.sums = {name: total + micro_batch[name] for name, total in self.sums.items()}
        self.is_open = True
        self._iterations += 1

    def add_gradient_bytes(self, sent: int) -> None:
        """Add the bytes of gradients that a step sent to the other ranks."""
        self._gradient_bytes += sent

    def sums_for_checkpoint(self) -> dict[str, float]:
        """The totals so far, exactly, as a checkpoint keeps them."""
        self._sum_ranks()
        sums = {name: to_float(total) for name, total in self.sums.items()}
        self._zero_sums_unless_main()
        return sums

    def close_and_report(self) -> dict[str, Any]:
        """The report of this window; the next one begins."""
        self._sum_ranks()
        mx.eval(self.sums)
        seconds = time.perf_counter() - self._started - self._paused_seconds
        tokens = to_int(self.sums["tokens"])
        report = {
            "loss": self._mean_loss(),
            "tokens": tokens,
            "tokens_per_second": (tokens - self._earlier_tokens) / seconds,
            "iterations_per_second": self._iterations / seconds,
        }
        if not self._world.is_single_process:
            report["gradient_bytes"] = self._gradient_bytes
        self._restart_window()
        return report

    def _sum_ranks(self) -> None:
        self.sums = self._world.sum_scalars_over_ranks(self.sums)

    def _zero_sums_unless_main(self) -> None:
        """The sum over the ranks is the main rank's; the others begin again at zero."""
        if not self._world.is_main:
            self.sums = _zero_sums()

    def _mean_loss(self) -> float:
        """In float32; for a loss that is a mean as a Python float, as in mlx-lm."""
        if self._is_mean:
            return to_float(self.sums["loss"]) / to_int(self.sums["weight"])
        return to_float(self.sums["loss"] / self.sums["weight"])


def _zero_sums() -> Sums:
    return {"loss": mx.array(0.0), "weight": mx.array(0), "tokens": mx.array(0)}


def read_optimizer_metrics(optimizer: Tiered) -> dict[str, Any]:
    """What the last step really used: learning rate, gradient norm before and after clipping."""
    counters = optimizer.state[COUNTERS_KEY]
    norm = counters["grad_norm"]
    clipped = norm
    if optimizer.max_grad_norm > 0:
        clipped = norm * clip_factor(norm, optimizer.max_grad_norm)
    stats = optimizer.get_tier_stats()
    return {
        "learning_rate": to_float(optimizer.learning_rate),
        "grad_norm": to_float(norm),
        "clipped_grad_norm": to_float(clipped),
        "updates": [tier.updates for tier in stats],
        "skipped": [tier.skipped for tier in stats],
    }


def make_train_info(step: int, iteration: int, record: dict[str, Any]) -> dict[str, Any]:
    """A report as mlx-lm's on_train_loss_report receives it, with the optimizer step added."""
    info = {
        "iteration": iteration,
        "step": step,
        "train_loss": record["loss"],
        "learning_rate": record["learning_rate"],
        "iterations_per_second": record["iterations_per_second"],
        "tokens_per_second": record["tokens_per_second"],
        "trained_tokens": record["trained_tokens"],
        "peak_memory": record["peak_memory_gb"],
    }
    if "gradient_bytes" in record:  # there are several ranks
        info["gradient_bytes"] = record["gradient_bytes"]
    return info
