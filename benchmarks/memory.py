"""Peak memory of a step with few supervised positions and a large vocabulary, ours and mlx-lm's.

128 of 2,048 tokens are supervised, the vocabulary has 152,000 entries; two layers of 64 on a CPU,
so that the output layer takes most. Each side in a process of its own, mlx-lm's with the compiled
step of mlx_lm.tuner.trainer.
"""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from benchmarks.timing import keep

VOCABULARY, TOKENS, LEARNT, LAYERS, HIDDEN = 152_000, 2048, 128, 2, 64


def main() -> None:
    """Print both peaks and their ratio, and keep them as JSON."""
    peaks = {arm: peak(arm) for arm in ("mlx_lm.lora", "nested-tune")}
    share = peaks["nested-tune"] / peaks["mlx_lm.lora"]
    for arm, found in peaks.items():
        print(f"memory: {arm}: {found / 2**20:,.0f} MiB at the peak of a step")
    print(f"memory: nested-tune takes {share:.2f} of mlx_lm.lora")
    keep("memory", {"peak_bytes": peaks, "share": share})


def peak(arm: str) -> int:
    """What one arm reports."""
    command = [sys.executable, "-m", "benchmarks.memory", arm]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1])


def measure(arm: str) -> None:
    """Two steps of one side; prints the peak in bytes, weights included."""
    from nested_core import backend

    backend.prepare()  # OpenBLAS for both sides
    from benchmarks.gpu.mlx_arms import build
    from benchmarks.gpu.shapes import RATE, Shape

    shape = Shape(HIDDEN, LAYERS, 3 * HIDDEN, 4, 4, VOCABULARY, 1, TOKENS)
    tokens = np.random.default_rng(0).integers(0, VOCABULARY, (1, TOKENS + 1)).astype(np.int32)
    model = build(shape, bits=16)
    import mlx.core as mx

    model.set_dtype(mx.float32)
    mx.reset_peak_memory()
    if arm == "mlx_lm.lora":
        from mlx.nn import value_and_grad
        from mlx.optimizers import Adam
        from mlx_lm.tuner.trainer import default_loss

        optimizer, gradients = Adam(1e-5), value_and_grad(model, default_loss)
        optimizer.init(model.trainable_parameters())
        lengths = mx.array([[TOKENS - LEARNT + 1, TOKENS]])
        state = [model.state, optimizer.state]

        def step(batch: mx.array, lengths: mx.array) -> mx.array:
            (loss, _), found = gradients(model, batch, lengths)
            optimizer.update(model, found)
            return loss

        compiled = mx.compile(step, inputs=state, outputs=state)
        for _ in range(2):
            mx.eval(compiled(mx.array(tokens), lengths), state)
    else:
        from benchmarks.tiers import one_tier, optimizer_for
        from nested_core.kernels.optimized_model import using_optimized_layers
        from nested_core.models.parameters import reference_trainable_parameters
        from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
        from nested_core.training.train_step import TrainStep

        refs = reference_trainable_parameters(model)
        tiers = one_tier(refs)
        optimizer = optimizer_for(tiers, refs, RATE)
        learnt = np.zeros((1, TOKENS), np.bool_)
        learnt[0, -LEARNT:] = True
        with using_optimized_layers(model):
            loss_fn = SUPERVISED_LOSS.for_model(model, refs)
            train_step = TrainStep(
                model=model, parameters=refs, optimizer=optimizer, tiers=tiers, loss_fn=loss_fn
            )
            for _ in range(2):
                result = train_step.run([(tokens, learnt)], (0,))
                mx.eval(result.updates)
    print(mx.get_peak_memory())


if __name__ == "__main__":
    measure(sys.argv[1]) if len(sys.argv) > 1 else main()
