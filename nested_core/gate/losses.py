"""The loss before and after, computed by the gate from the files on disk, on fixed examples."""

from __future__ import annotations

import math

from nested_core.adapters import WEIGHTS_NAME, load_arrays
from nested_core.config import FineTuneConfig
from nested_core.data.dataset import load_dataset
from nested_core.data.settings import DataSettings
from nested_core.gate.verdict import Validation
from nested_core.model import adapter_slots, attach_adapter, load_base, load_leaves, read_slots
from nested_core.run_directory import RunDirectory
from nested_core.training.evaluation import Evaluator


def measure_losses(config: FineTuneConfig, run: RunDirectory) -> Validation | None:
    """Mean loss with the initial and with the trained adapter, or None without held-out data.

    The examples are test.jsonl where there is one, else the validation set, which the best
    checkpoint was chosen on: `selected_on_same_data` says so.
    """
    model, tokenizer = load_base(config)
    _, splits = load_dataset(DataSettings.from_config(config), tokenizer)
    name = next((n for n in ("test", "valid") if n in splits and len(splits[n])), None)
    if name is None:
        return None
    attach_adapter(model, config)
    slots = adapter_slots(model)
    evaluator = Evaluator(model, slots, splits[name], config.batch_size)
    losses = []
    for folder in (run.initial, run.adapter):
        load_leaves(model, load_arrays(folder / WEIGHTS_NAME))
        losses.append(evaluator.loss(read_slots(slots)))
    before, after = (loss if math.isfinite(loss) else None for loss in losses)
    return Validation(before, after, selected_on_same_data=name == "valid")
