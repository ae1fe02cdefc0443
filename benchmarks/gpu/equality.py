"""`python -m benchmarks.gpu.equality SIZE`: our losses beside those of mlx_lm's own training loop.

Both train the same model, in bfloat16, on the same batches of rows of mixed lengths: mlx_lm with
its `train`, its loss and Adam, and once more with that loss taken from logits in float32, as ours
is, where mlx_lm rounds the logarithm of a sum near 10 to steps of 1/16. The widths are few, for MLX
compiles kernels for each one, and none is a multiple of 128, so that on CUDA ours pads inside
attention, or the whole batch. mlx_lm is compared with itself as well: the same again, and with the
rows of each batch in reverse order, which changes how sums are rounded and nothing else. Each line
that starts with a brace is one comparison; the others are mlx_lm's.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.mlx_arms import MicroBatch, build
from benchmarks.gpu.shapes import SHAPES, Shape, mixed_rows

STEPS, REPORT = 200, 50  # compared, and after how many steps a line says how far they are
WIDTHS = 150, 270, 390, 510
RATE = 1e-4
SYMBOLS = 256  # tokens that occur, so that there is something to learn
BATCHES = 40
BITS = 16


def main() -> None:
    """Train at one size in each way and print how far the losses are from mlx_lm's."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("size", choices=list(SHAPES))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--widths", type=int, nargs="+", default=list(WIDTHS))
    options = parser.parse_args()
    shape = replace(SHAPES[options.size], batch=4)
    from nested_core.backend import prepare, prepare_for_model_size

    prepare()
    prepare_for_model_size(shape.weights)
    batches = draw(shape, options.widths)
    ours = list(our_losses(shape, batches, options.steps))

    def report(theirs: Sequence[float]) -> None:
        if len(theirs) % REPORT == 0 and len(theirs) < options.steps:
            compare(options, "ours", ours, theirs)

    theirs = mlx_lm_losses(shape, batches, options.steps, report)
    compare(options, "ours", ours, theirs)
    exact = mlx_lm_losses(shape, batches, options.steps, loss_in_float32=True)
    compare(options, "ours, of mlx_lm with its loss in float32", ours, exact)
    turned = [(tokens[::-1].copy(), mask[::-1].copy()) for tokens, mask in batches]
    for name, same in (("mlx_lm, rows in reverse order", turned), ("mlx_lm again", batches)):
        compare(options, name, mlx_lm_losses(shape, same, options.steps), theirs)


def draw(shape: Shape, widths: Sequence[int]) -> list[MicroBatch]:
    """Batches of rows of like lengths in random order, each of the least width that holds it."""
    generator = np.random.default_rng(0)
    lengths = np.sort(mixed_rows(max(widths) + 1)[0])
    starts = generator.permutation(np.arange(0, len(lengths), shape.batch))[:BATCHES]
    batches: list[MicroBatch] = []
    for start in starts:
        learnt = lengths[start : start + shape.batch, None] - 1
        width = min(each for each in widths if each >= learnt.max())
        tokens = generator.integers(0, SYMBOLS, (shape.batch, width + 1)).astype(np.int32)
        batches.append((tokens, np.arange(width) < learnt))
    return batches


def our_losses(shape: Shape, batches: Sequence[MicroBatch], steps: int) -> Iterator[float]:
    """The loss of each step before its update, in nats/token."""
    import mlx.core as mx

    from benchmarks.tiers import one_tier, optimizer_for
    from nested_core.kernels.optimized_model import using_optimized_layers
    from nested_core.models.parameters import reference_trainable_parameters
    from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
    from nested_core.training.train_step import TrainStep

    model = build(shape, BITS)
    model.train()
    refs = reference_trainable_parameters(model, dtype=mx.bfloat16)
    tiers = one_tier(refs)
    most = {mask.shape[1]: 0 for _, mask in batches}
    for _, mask in batches:
        most[mask.shape[1]] = max(most[mask.shape[1]], int(mask.sum()))
    with using_optimized_layers(model):
        train_step = TrainStep(
            model=model,
            parameters=refs,
            optimizer=optimizer_for(tiers, refs, RATE),
            tiers=tiers,
            loss_fn=SUPERVISED_LOSS.for_model(model, refs).for_position_counts(most),
        )
        for step in range(steps):
            tokens, mask = batches[step % len(batches)]
            result = train_step.run([(tokens, mask)], (0,))
            mx.eval(result.updates)
            found = result.micro_batches[0]
            if found["tokens"].item() != mask.sum():
                raise SystemExit(f"{found['tokens'].item()} tokens were learnt of {mask.sum()}")
            yield float(np.array(found["loss"] / found["tokens"]))


def mlx_lm_losses(
    shape: Shape,
    batches: Sequence[MicroBatch],
    steps: int,
    report: Callable[[Sequence[float]], None] = lambda losses: None,
    *,
    loss_in_float32: bool = False,
) -> list[float]:
    """The loss of each step that mlx_lm.tuner.trainer.train reports; `report` has those so far."""
    import mlx.core as mx
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, default_loss, train

    def float32_loss(model: Any, batch: Any, lengths: Any) -> Any:
        return default_loss(lambda inputs: model(inputs).astype(mx.float32), batch, lengths)

    losses: list[float] = []

    class Reports(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            losses.append(train_info["train_loss"])
            report(losses)

    def given_batches(**_: Any) -> Iterator[tuple[Any, Any]]:
        for step in range(steps):
            tokens, mask = batches[step % len(batches)]
            ends = mask.sum(axis=1)
            yield mx.array(tokens), mx.array(np.stack([np.zeros_like(ends), ends], axis=1))

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            batch_size=shape.batch,
            iters=steps,
            steps_per_report=1,
            steps_per_save=10**6,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        train(
            build(shape, BITS),
            optim.Adam(RATE),
            [],
            None,
            arguments,
            loss=float32_loss if loss_in_float32 else default_loss,
            iterate_batches=given_batches,
            training_callback=Reports(),
        )
    return losses


def compare(
    options: argparse.Namespace, name: str, found: Sequence[float], theirs: Sequence[float]
) -> None:
    """Print how far losses are from mlx_lm's, as shares of these, over the steps that both took."""
    steps = min(len(found), len(theirs))
    first, second = np.array(found[:steps]), np.array(theirs[:steps])
    off = first / second - 1
    row = {
        "size": options.size,
        "compared": name,
        "widths": options.widths,
        "steps": steps,
        "first_step": float(off[0]),
        "worst": float(np.abs(off).max()),
        "median": float(np.median(np.abs(off))),
        "mean": float(off.mean()),
        "first_and_last_20": [
            [float(each[0]), float(each[-20:].mean())] for each in (first, second)
        ],
    }
    print(f"\n{json.dumps(row)}", flush=True)


if __name__ == "__main__":
    main()
