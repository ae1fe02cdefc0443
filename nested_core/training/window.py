"""The stretch between two reports: loss and tokens summed on the device, time without pauses."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from nested_core.gradients import clip_factor
from nested_core.optimizers import COUNTERS, NestedAdam
from nested_core.scalars import to_float, to_int
from nested_core.training.state import TrainingState


class Window:
    """Sums since the last report; nothing is read from the device before the report."""

    def __init__(self) -> None:
        self._restart()

    def _restart(self) -> None:
        self.sums = {"loss": mx.array(0.0), "tokens": mx.array(0)}
        self.is_open = False
        self._steps = 0
        self.restart_clock()

    @classmethod
    def reopened(cls, loss_sum: float, tokens: int) -> Window:
        """The window that a checkpoint was written in."""
        window = cls()
        window.sums = {"loss": mx.array(loss_sum), "tokens": mx.array(tokens)}
        window.is_open = tokens > 0
        return window

    def restart_clock(self) -> None:
        """Count time from now."""
        self._began, self._paused = time.perf_counter(), 0.0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leave the block's time out: evaluations and checkpoints are not training."""
        began = time.perf_counter()
        yield
        self._paused += time.perf_counter() - began

    def add(self, loss: mx.array, tokens: mx.array) -> None:
        """Add one step's sums, not yet evaluated."""
        self.sums["loss"] = self.sums["loss"] + loss
        self.sums["tokens"] = self.sums["tokens"] + tokens
        self.is_open = True
        self._steps += 1

    def open_sums(self) -> tuple[float, int]:
        """The sums so far, as a checkpoint keeps them: float32 values, exactly."""
        return to_float(self.sums["loss"]), to_int(self.sums["tokens"])

    def close(self) -> dict[str, Any]:
        """The report of this window; a new one begins."""
        mx.eval(self.sums)
        seconds = time.perf_counter() - self._began - self._paused
        loss = to_float(self.sums["loss"] / self.sums["tokens"])
        tokens = to_int(self.sums["tokens"])
        rates = {
            "tokens_per_second": tokens / seconds,
            "steps_per_second": self._steps / seconds,
        }
        self._restart()
        return {"loss": loss, "tokens": tokens} | rates


def optimizer_record(optimizer: NestedAdam) -> dict[str, Any]:
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


def train_info(state: TrainingState, record: dict[str, Any]) -> dict[str, Any]:
    """A report as mlx-lm's on_train_loss_report gets it, with our step beside it."""
    return {
        "iteration": state.iteration,
        "step": state.step,
        "train_loss": record["loss"],
        "learning_rate": record["learning_rate"],
        "iterations_per_second": record["steps_per_second"],
        "tokens_per_second": record["tokens_per_second"],
        "trained_tokens": record["trained_tokens"],
        "peak_memory": record["peak_memory_gb"],
    }
