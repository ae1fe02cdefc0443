"""mlx_lm.tuner.trainer.train as shipped, watched through its callback; nothing of ours in it."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train

from benchmarks.time_to_loss.corpus import PROMPT_LENGTH, WIDTH, Corpus

Look = Callable[[float, Mapping[str, mx.array]], None]


def train_rival(
    model: Any, *, seed: int, rate: float, steps: int, batch: int, window: int, look: Look
) -> None:
    """Train; after every window `look` is given its seconds, by mlx_lm's own clock, and the LoRA.

    That clock runs while a step does, and leaves out evaluations, reports and batching.
    """

    class Reports(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            flat: Any = tree_flatten(model.trainable_parameters())
            look(window / train_info["iterations_per_second"], dict(flat))

    data = [(row.tolist(), PROMPT_LENGTH) for row in Corpus().tables("train")]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            batch_size=batch,
            iters=steps,
            steps_per_report=window,
            steps_per_save=10**6,
            max_seq_length=WIDTH,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        np.random.seed(seed)
        train(model, optim.Adam(rate), data, None, arguments, training_callback=Reports())
