"""What replay costs: steps with and without, on rows of one length, in turns of ten.

    python -m benchmarks.replay_cost [--pairs 101] [--fraction 0.1]

Two trainers in one process take turns, each with a small Llama of random weights: the smaller the
model, the more a batch that is made otherwise shows. Every row fills its width, so that a step has
as many tokens in both. A turn is ten steps, from the batches to the device at rest. Printed is the
median of the pairs' ratios of tokens/s, by the clock and by processor time, which other work on the
machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from tempfile import TemporaryDirectory

from nested_core import backend

backend.prepare()
backend.hide_torch_from_transformers()

import mlx.core as mx  # noqa: E402

from benchmarks.gpu.shapes import Shape  # noqa: E402
from benchmarks.trainer_step import config_path, write_inputs, write_rows  # noqa: E402
from nested_core.config.loading import load_config  # noqa: E402
from nested_core.data.dataset_loading import load_run_data  # noqa: E402
from nested_core.models.lora_attachment import load_adapter_tensors  # noqa: E402
from nested_core.models.session import Session  # noqa: E402
from nested_core.pipeline import steps  # noqa: E402
from nested_core.storage.adapter import WEIGHTS_NAME  # noqa: E402
from nested_core.storage.run_directory import RunDirectory  # noqa: E402
from nested_core.storage.safetensors_files import load_arrays  # noqa: E402
from nested_core.training.trainer import Trainer  # noqa: E402
from nested_core.training.training_setup import prepare_training  # noqa: E402

SHAPES = {"0.2M": Shape(64, 3, 192, 4, 2, 512, 4, 32), "6M": Shape(256, 6, 704, 4, 4, 4096, 4, 128)}
OLD_ROWS = range(1000, 1256)
STEPS_A_TURN, WARM_TURNS = 10, 3


def main() -> None:
    """Measure each size and print the median of its pairs."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=101)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    arguments = parser.parse_args()
    for size in arguments.sizes:
        with TemporaryDirectory(prefix="nested-tune-") as folder:
            pairs = measure_pairs(SHAPES[size], Path(folder), arguments.pairs, arguments.fraction)
        clock, processor = ([pair[which] for pair in pairs] for which in (0, 1))
        figures = f"{describe(clock)} by the clock, {describe(processor)} by processor time"
        print(f"{size}, {len(pairs)} pairs: {figures}", flush=True)


def describe(ratios: list[float]) -> str:
    """The median and the quartiles."""
    low, _, high = statistics.quantiles(ratios)
    return f"{statistics.median(ratios):.3f} (quartiles {low:.3f} to {high:.3f})"


def measure_pairs(
    shape: Shape, folder: Path, pairs: int, fraction: float
) -> list[tuple[float, float]]:
    """Of each pair of turns, tokens/s with replay over tokens/s without, by either measure."""
    write_inputs(shape, folder)
    old = folder / "old.jsonl"
    write_rows(old, shape, OLD_ROWS)
    replay = {"continual.replay.fraction": fraction, "continual.replay.sources": [str(old)]}
    iterations = {"iters": STEPS_A_TURN * (WARM_TURNS + pairs)}
    arms = [Arm(folder, "without", iterations), Arm(folder, "with", iterations | replay)]
    for _ in range(WARM_TURNS):
        for arm in arms:
            arm.take_turn()
    ratios = []
    for pair in range(pairs):
        took = {arm: arm.take_turn() for arm in (arms if pair % 2 else arms[::-1])}
        without, replayed = (took[arm] for arm in arms)
        ratios.append((without[0] / replayed[0], without[1] / replayed[1]))
    return ratios


class Arm:
    """A trainer of a run, which takes ten steps at a time."""

    def __init__(self, folder: Path, name: str, flags: dict[str, object]) -> None:
        config = load_config(config_path(folder), flags)
        run = RunDirectory(folder / name)
        run.path.mkdir()
        steps.write_run_config(config, run, resume=False)
        steps.validate(config, run)
        steps.write_initial_adapter_and_tiers(config, run)
        base = Session().load_base(config)
        load_adapter_tensors(base.model, load_arrays(run.initial / WEIGHTS_NAME))
        _, splits = load_run_data(config, run)
        setup = prepare_training(config, run, base.model, splits, tokenizer=base.tokenizer)
        self._trainer = Trainer(setup)
        self._step = self._trainer.make_train_step()
        self._done = 0

    def take_turn(self) -> tuple[float, float]:
        """Take ten steps; the seconds by the clock, and of processor time."""
        with self._trainer.using_training_layers():
            clock, processor = time.perf_counter(), time.process_time()
            for index in range(self._done, self._done + STEPS_A_TURN):
                batch = self._trainer.step_schedule.micro_batch(index)
                self._step.run([batch], self._step.needed_tiers(index + 1))
            mx.eval(self._step.packed.arrays())
            took = time.perf_counter() - clock, time.process_time() - processor
        self._done += STEPS_A_TURN
        return took


if __name__ == "__main__":
    main()
