"""`--log mlx_lm`: the lines that mlx_lm.lora prints, printed by mlx_lm itself."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

from nested_core.config.schema import FineTuneConfig
from nested_core.records.plan import read_plan
from nested_core.storage.run_directory import RunDirectory


class MlxLmLog:
    """A training callback that hands each report to mlx_lm.cli_ui.TrainUI.

    An evaluation is numbered as mlx_lm numbers it: the one before training is at iteration 1, and
    under `training.reference` the others are at the iteration that they come before.
    """

    def __init__(self, config: FineTuneConfig, run: RunDirectory, stream: IO[str]) -> None:
        self._config = config
        self._run = run
        self._stream = stream
        self._ui: Any = None
        self._done = 0

    @contextlib.contextmanager
    def printing(self) -> Iterator[None]:
        """Print for as long as the block trains; mlx_lm's progress bar ends with it."""
        from mlx_lm.cli_ui import make_console

        console = make_console()
        console.file = self._stream
        try:
            yield
        finally:
            if self._ui is not None:
                self._ui.__exit__(None, None, None)

    def start(self, trainer: Any) -> None:
        """Print what mlx_lm.lora prints before its first line."""
        from mlx_lm.cli_ui import TrainUI, make_console, print_lora_run_header
        from mlx_lm.tuner.utils import print_trainable_parameters

        settings = self._config.model_dump() | {"iters": self._iterations()}
        print_lora_run_header(make_console(), SimpleNamespace(**settings))
        if hasattr(trainer, "model"):  # with several processes it is in each of them
            with contextlib.redirect_stdout(self._stream):
                print_trainable_parameters(trainer.model)
        self._ui = TrainUI(self._iterations())
        self._ui.__enter__()

    def _iterations(self) -> int:
        plan = read_plan(self._run.plan)
        return self._config.iters if plan is None else plan.iterations

    def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
        """Print a report, and the snapshots that were written since the one before."""
        iteration = train_info["iteration"]
        for _ in range(iteration - self._done):
            self._ui.advance()
        self._ui.report_train(
            iteration,
            train_info["train_loss"],
            train_info["tokens_per_second"],
            train_info["trained_tokens"],
        )
        every = self._config.intervals(self._iterations()).save
        if self._config.adapter_path is not None and every is not None:
            for count in range(self._done // every + 1, iteration // every + 1):
                name = f"{count * every:07d}_adapters.safetensors"
                self._ui.report_save(Path(name))
        self._done = iteration

    def on_val_loss_report(self, val_info: dict[str, Any]) -> None:
        """Print an evaluation."""
        done = val_info["iteration"]
        number = done + 1 if self._config.training.reference is not None else max(done, 1)
        self._ui.report_val(number, val_info["val_loss"], val_info["val_time"])
