"""The callback that receives each report of a training, in mlx-lm's protocol."""

from __future__ import annotations

from typing import Any, Protocol


class TrainingCallback(Protocol):
    """The methods of mlx_lm.tuner.callbacks.TrainingCallback."""

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Called with the training loss at every report."""

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Called with the validation loss at every evaluation."""
