"""Losses that are computed from the files on disk, on fixed examples, with a model loaded anew."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from nested_core.adapters import WEIGHTS_NAME, load_arrays
from nested_core.config import FineTuneConfig
from nested_core.data.dataset import load_dataset
from nested_core.data.report import DatasetReport
from nested_core.data.settings import DataSettings
from nested_core.errors import DatasetError
from nested_core.gate.verdict import Validation
from nested_core.model import (
    adapter_dtype,
    attach_adapter,
    load_base,
    load_leaves,
    tokenizer_source,
)
from nested_core.run_directory import RunDirectory
from nested_core.slots import adapter_slots, read_slots
from nested_core.training.compute import prepared
from nested_core.training.evaluation import Evaluator, fixed_batches
from nested_core.training.losses import SUPERVISED
from nested_core.training.positions import rule_for


def measure_losses(config: FineTuneConfig, run: RunDirectory) -> Validation | None:
    """Mean loss with the initial and with the trained adapter, or None without held-out data.

    The examples are test.jsonl where there is one, else the validation set, which the best
    checkpoint was chosen on: `selected_on_same_data` says so.
    """
    measured = _losses(config, run, (run.initial, run.adapter), ("test", "valid"), max_batches=-1)
    if measured is None:
        return None
    split, losses = measured
    before, after = (loss if math.isfinite(loss) else None for loss in losses)
    return Validation(before, after, selected_on_same_data=split == "valid")


def measure_test(config: FineTuneConfig, run: RunDirectory) -> float:
    """Mean loss of the run's adapter on `test_batches` batches of test.jsonl, as `test` asks for.

    Raises DatasetError where there is no test set.
    """
    measured = _losses(config, run, (run.adapter,), ("test",), max_batches=config.test_batches)
    if measured is None:
        raise DatasetError(f"test: {config.data} has no test.jsonl, or it is empty.")
    return measured[1][0]


def refuse_other_data(run: RunDirectory, report: DatasetReport) -> None:
    """Raise DatasetError where the data is not what dataset.json says was validated."""
    validated = json.loads(run.dataset.read_bytes())["digest"]
    if report.digest != validated:
        raise DatasetError(
            f"The data in {report.folder} has changed since it was validated for {run.path}: its "
            f"digest is {report.digest[:12]}, dataset.json says {validated[:12]}. Start a new run."
        )


def _losses(
    config: FineTuneConfig,
    run: RunDirectory,
    adapters: Sequence[Path],
    splits: Sequence[str],
    *,
    max_batches: int,
) -> tuple[str, list[float]] | None:
    """The first of the splits that has examples, and the loss of each adapter on it."""
    model, _ = load_base(config)
    report, found = load_dataset(DataSettings.from_config(config), tokenizer_source(config))
    refuse_other_data(run, report)
    name = next((name for name in splits if name in found and len(found[name])), None)
    if name is None:
        return None
    attach_adapter(model, config)
    slots = adapter_slots(model, dtype=adapter_dtype(config, model))
    evaluator = Evaluator(model, slots, rule_for(model, slots, SUPERVISED))
    losses = []
    with prepared(model, as_mlx_lm=config.training.reference is not None):
        for folder in adapters:
            load_leaves(model, load_arrays(folder / WEIGHTS_NAME))
            sizes = config.batch_size, max_batches, config.max_seq_length
            batches = fixed_batches(found[name], *sizes)
            losses.append(evaluator.loss(read_slots(slots), batches))
    return name, losses
