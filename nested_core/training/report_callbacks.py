"""Training callbacks in mlx-lm's protocol, with the services of `report_to` among them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from nested_core.config.schema import FineTuneConfig
from nested_core.errors import ConfigError


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


def add_reporting_services(
    config: FineTuneConfig, folder: Path, callback: TrainingCallback | None
) -> CallbackGroup:
    """The caller's callback together with the services of `report_to` (wandb, swanlab)."""
    from mlx_lm.tuner.callbacks import get_reporting_callbacks

    try:
        reporting = get_reporting_callbacks(
            config.report_to,
            project_name=config.project_name,
            log_dir=str(folder),
            config=config.model_dump(mode="json"),  # type: ignore[arg-type]  # a dict, as it uses it
        )
    except (ImportError, ValueError) as error:
        raise ConfigError(f"report_to: {error}") from error
    return CallbackGroup([one for one in (callback, reporting) if one is not None])
