"""The stretch between two reports: loss and tokens summed on the device, time without pauses."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from nested_core.backend import to_float, to_int
from nested_core.optim.clock import COUNTERS
from nested_core.optim.gradients import clip_factor
from nested_core.optim.tiered import Tiered
from nested_core.training.distributed import SINGLE_PROCESS, Sums, World


class Window:
    """Sums since the last report; nothing is read from the device before the report.

    Ranks add up what is their own; where it is read it becomes one sum, which the leading rank has.
    """

    def __init__(self, *, of_means: bool = False, world: World = SINGLE_PROCESS) -> None:
        self._of_means, self._world = of_means, world
        self._restart()

    def _restart(self) -> None:
        self.sums = no_sums()
        self._tokens_before = 0
        self.is_open = False
        self._iterations = self._bytes_sent = 0
        self.restart_clock()

    def reopen(self, sums: Mapping[str, Any]) -> None:
        """Go on with the window that a checkpoint was written in; a loss of None was not finite."""
        self.sums = {
            "loss": mx.array(math.nan if sums["loss"] is None else sums["loss"], mx.float32),
            "weight": mx.array(int(sums["weight"])),
            "tokens": mx.array(int(sums["tokens"])),
        }
        self._tokens_before = int(sums["tokens"])  # of another process, whose time is not known
        self.is_open = self._tokens_before > 0
        self._leave_to_leader()

    def restart_clock(self) -> None:
        """Count time from now."""
        self._began, self._paused = time.perf_counter(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out: evaluations and checkpoints are not training."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def count_bytes(self, sent: int) -> None:
        """Add the bytes of gradients that a step sent to the other ranks."""
        self._bytes_sent += sent

    def add(self, micro: Mapping[str, mx.array]) -> None:
        """Add one micro-batch's loss, weight and tokens, not yet evaluated."""
        self.sums = {name: total + micro[name] for name, total in self.sums.items()}
        self.is_open = True
        self._iterations += 1

    def open_sums(self) -> dict[str, float]:
        """The sums so far, as a checkpoint keeps them: exactly."""
        self._gather()
        sums = {name: to_float(total) for name, total in self.sums.items()}
        self._leave_to_leader()
        return sums

    def close(self) -> dict[str, Any]:
        """The report of this window; a new one begins."""
        self._gather()
        mx.eval(self.sums)
        seconds = time.perf_counter() - self._began - self._paused
        loss, tokens = self._mean_loss(), to_int(self.sums["tokens"])
        rates = {
            "tokens_per_second": (tokens - self._tokens_before) / seconds,
            "iterations_per_second": self._iterations / seconds,
        }
        sent = {} if self._world.is_single_process else {"gradient_bytes": self._bytes_sent}
        self._restart()
        return {"loss": loss, "tokens": tokens} | rates | sent

    def _gather(self) -> None:
        self.sums = self._world.total(self.sums)

    def _leave_to_leader(self) -> None:
        """What has been summed over the ranks is one rank's to go on with."""
        if not self._world.is_main:
            self.sums = no_sums()

    def _mean_loss(self) -> float:
        """Float32, but for means, which mlx-lm divides as a Python float."""
        if self._of_means:
            return to_float(self.sums["loss"]) / to_int(self.sums["weight"])
        return to_float(self.sums["loss"] / self.sums["weight"])


def no_sums() -> Sums:
    """Nothing summed yet."""
    return {"loss": mx.array(0.0), "weight": mx.array(0), "tokens": mx.array(0)}


def optimizer_record(optimizer: Tiered) -> dict[str, Any]:
    """What the last step really used: learning rate, gradient norm before and after clipping."""
    counters = optimizer.state[COUNTERS]
    norm, bound = counters["grad_norm"], optimizer.max_grad_norm
    clipped = norm * clip_factor(norm, bound) if bound > 0 else norm
    stats = optimizer.get_tier_stats()
    return {
        "learning_rate": to_float(optimizer.learning_rate),
        "grad_norm": to_float(norm),
        "clipped_grad_norm": to_float(clipped),
        "updates": [tier.updates for tier in stats],
        "skipped": [tier.skipped for tier in stats],
    }


def train_info(step: int, iteration: int, record: dict[str, Any]) -> dict[str, Any]:
    """A report as mlx-lm's on_train_loss_report gets it, with our step beside it."""
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
    if "gradient_bytes" in record:  # there are ranks
        info["gradient_bytes"] = record["gradient_bytes"]
    return info
