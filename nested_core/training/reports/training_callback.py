"""What is called with each report of a training, in mlx-lm's protocol."""

from __future__ import annotations

from typing import Any, Protocol


class TrainingCallback(Protocol):
    """What mlx_lm.tuner.callbacks.TrainingCallback offers."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Called with the training loss at every report."""

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Called with the validation loss at every evaluation."""
