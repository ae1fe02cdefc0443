"""What replay costs: a step with and without, on rows of one length, in pairs.

    python -m benchmarks.replay_cost [--pairs 9] [--fraction 0.1]

Both are whole runs of the trainer in one process, one after the other, on a small Llama of random
weights: the smaller the model, the more a batch that is made otherwise shows. Every row fills its
width, so that a step has as many tokens in both. Printed are the milliseconds a step of each run,
the median of its windows of ten steps, and the median of the ratios of tokens/s; by the clock and
by processor time, which other work on the machine disturbs less.
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.gpu.shapes import Shape
from benchmarks.trainer_step import measure_trainer, write_inputs, write_rows
from nested_core.backend import hide_torch_from_transformers, prepare

SHAPES = {
    "0.2M": Shape(64, 3, 192, 4, 2, 512, 4, 32),
    "6M": Shape(256, 6, 704, 4, 4, 4096, 4, 128),
}
OLD_ROWS = range(1000, 1256)


def main() -> None:
    """Measure each size and print its pairs and their median."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--fraction", type=float, default=0.1)
    parser.add_argument("--sizes", nargs="+", default=list(SHAPES), choices=SHAPES)
    arguments = parser.parse_args()
    prepare()
    hide_torch_from_transformers()
    for size in arguments.sizes:
        with TemporaryDirectory(prefix="nested-tune-") as folder:
            pairs = measure_pairs(SHAPES[size], Path(folder), arguments.pairs, arguments.fraction)
        for what, ratios in zip(
            ("the clock", "processor time"), zip(*pairs, strict=True), strict=True
        ):
            listed = ", ".join(f"{ratio:.3f}" for ratio in ratios)
            median = statistics.median(ratios)
            print(f"{size}: {median:.3f} of the tokens/s without replay, by {what} ({listed})")


def measure_pairs(
    shape: Shape, folder: Path, pairs: int, fraction: float
) -> list[tuple[float, float]]:
    """The ratios of tokens/s with replay and without, of each pair; the first run warms up."""
    write_inputs(shape, folder)
    old = folder / "old.jsonl"
    write_rows(old, shape, OLD_ROWS)
    replay = {"continual.replay.fraction": fraction, "continual.replay.sources": [str(old)]}
    measure_step(folder, replay)
    ratios = []
    for pair in range(pairs):
        arms = [{}, replay] if pair % 2 else [replay, {}]
        took = {bool(arm): measure_step(folder, arm) for arm in arms}
        for which, one in took.items():
            with_or_without = "with" if which else "without"
            print(
                f"  {with_or_without}: {one[0]:.2f} ms, {one[1]:.2f} ms of processors", flush=True
            )
        ratios.append((took[False][0] / took[True][0], took[False][1] / took[True][1]))
    return ratios


def measure_step(folder: Path, flags: dict[str, object]) -> tuple[float, float]:
    """Milliseconds a step by the clock and of processor time, the medians of a run's windows."""
    row = measure_trainer(folder, flags)
    names = ("milliseconds", "processor_milliseconds")
    clock, processor = (float(statistics.median(row[name])) for name in names)
    return clock, processor


if __name__ == "__main__":
    main()
