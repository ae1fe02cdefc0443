"""`--log mlx_lm`: line by line what mlx_lm's own trainer prints for the same numbers."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
from mlx_lm.cli_ui import TrainUI, make_console

from flows.rooms.reference.mlx_lm_log import MlxLmLog
from nested_core.storage.run_directory import RunDirectory
from tests.example import example_config

TRAIN = {"train_loss": 2.34567, "tokens_per_second": 1234.5, "trained_tokens": 4567}


def printed_by_mlx_lm() -> str:
    """What mlx_lm.tuner.trainer.train calls for 20 iterations, in its order."""
    stream = io.StringIO()
    make_console().file = stream
    with TrainUI(20) as ui:
        ui.report_val(1, 9.5, 0.25)
        for iteration in (10, 20):
            for _ in range(10):
                ui.advance()
            ui.report_train(iteration, *TRAIN.values())
        ui.report_save(Path("0000020_adapters.safetensors"))
        ui.report_val(20, 1.5, 0.25)
    return stream.getvalue()


def printed_by_ours(tmp_path: Path, **settings: Any) -> str:
    stream = io.StringIO()
    config = example_config(iters=20, save_every=20, adapter_path="out", **settings)
    log = MlxLmLog(config, RunDirectory(tmp_path), stream)
    with log.printing():
        log.start(object())
        log.on_val_loss_report({"iteration": 0, "val_loss": 9.5, "val_time": 0.25})
        for iteration in (10, 20):
            log.on_train_loss_report({"iteration": iteration} | TRAIN)
        last = 19 if settings else 20  # mlx_lm evaluates before the last update
        log.on_val_loss_report({"iteration": last, "val_loss": 1.5, "val_time": 0.25})
    return stream.getvalue()


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"training": {"reference": "mlx_lm", "max_grad_norm": 0.0}, "nested": {"frequencies": [1]}},
    ],
    ids=["ours", "reference"],
)
def test_the_lines_are_those_of_mlx_lm(tmp_path: Path, settings: dict[str, Any]) -> None:
    expected = printed_by_mlx_lm()
    printed = printed_by_ours(tmp_path, **settings)
    own = printed[-len(expected) :]
    header = printed.removesuffix(own)
    assert own == expected
    assert "iter   train_loss     tok/s     tokens" in own
    assert "mlx_lm.lora" in header
    assert "lora · 3 layers · rank 8" in header
    assert "0000020_adapters.safetensors" in own
