"""Training callbacks in mlx-lm's protocol."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol


class TrainingCallback(Protocol):
    """What mlx_lm.tuner.callbacks.TrainingCallback offers."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Called with the training loss at every report."""

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Called with the validation loss at every evaluation."""


class CallbackGroup:
    """Calls each of several callbacks in turn."""

    def __init__(self, callbacks: Sequence[TrainingCallback]) -> None:
        self._callbacks = tuple(callbacks)

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Pass a training report on."""
        for callback in self._callbacks:
            callback.on_train_loss_report(train_info)

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Pass an evaluation on."""
        for callback in self._callbacks:
            callback.on_val_loss_report(val_info)
