"""The peak memory that is forecast for a step, and the one that is measured, model after model.

Llamas of random weights with LoRA on every linear layer on this machine's device, each in a process
of its own; the peak of the last of three steps, weights included.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass, replace

import numpy as np

from benchmarks.gpu.shapes import RATE, Shape
from benchmarks.timing import keep

STEPS = 3


@dataclass(frozen=True)
class Case:
    """A model and its batch, the share of its tokens that are targets, and the layers recomputed.

    Weights are quantised where `bits` are fewer than 16.
    `tiered` is three tiers over thirds of the layers, shallow ones fast, all due.
    """

    name: str
    shape: Shape
    share: float = 1.0
    recomputed: int = 0
    tiered: bool = False
    bits: int = 16


BASE = Shape(256, 8, 704, 4, 4, 4096, 4, 128)
CASES = (
    Case("8 layers of 256, 4 x 128", BASE),
    Case("2 layers", replace(BASE, layers=2)),
    Case("16 layers", replace(BASE, layers=16)),
    Case("width 128", replace(BASE, hidden=128, intermediate=352)),
    Case("width 512, 2 of 8 heads for keys", replace(BASE, hidden=512, heads=8, kv_heads=2)),
    Case("1 x 128", replace(BASE, batch=1)),
    Case("16 x 128", replace(BASE, batch=16)),
    Case("4 x 32", replace(BASE, length=32)),
    Case("2 x 1,024", replace(BASE, batch=2, length=1024)),
    Case("vocabulary 512", replace(BASE, vocabulary=512)),
    Case("vocabulary 50,000", replace(BASE, vocabulary=50_000)),
    Case("vocabulary 50,000, a tenth learnt", replace(BASE, vocabulary=50_000), share=0.1),
    Case("vocabulary 50,000, 8 x 256", replace(BASE, vocabulary=50_000, batch=8, length=256)),
    Case("all 8 layers recomputed", BASE, recomputed=8),
    Case("16 x 128, all recomputed", replace(BASE, batch=16), recomputed=8),
    Case("16 x 128, 4 of 8 recomputed", replace(BASE, batch=16), recomputed=4),
    Case("vocabulary 512, all recomputed", replace(BASE, vocabulary=512), recomputed=8),
    Case("the same, tiers", replace(BASE, vocabulary=512), recomputed=8, tiered=True),
    Case("4 bits", BASE, bits=4),
    Case("4 bits, 2 layers", replace(BASE, layers=2), bits=4),
    Case("4 bits, width 512", replace(BASE, hidden=512, heads=8, kv_heads=2), bits=4),
    Case("4 bits, 1 x 128", replace(BASE, batch=1), bits=4),
    Case("4 bits, 16 x 128", replace(BASE, batch=16), bits=4),
    Case("4 bits, 2 x 1,024", replace(BASE, batch=2, length=1024), bits=4),
    Case("4 bits, vocabulary 512", replace(BASE, vocabulary=512), bits=4),
    Case("4 bits, vocabulary 50,000", replace(BASE, vocabulary=50_000), bits=4),
    Case("4 bits, a tenth learnt", replace(BASE, vocabulary=50_000), share=0.1, bits=4),
    Case("4 bits, all recomputed", BASE, recomputed=8, bits=4),
)


def main() -> None:
    """Print both figures of every case and how far they are apart, and keep them as JSON."""
    rows = []
    for number, case in enumerate(CASES):
        command = [sys.executable, "-m", "benchmarks.forecast", str(number)]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        figures = json.loads(done.stdout.splitlines()[-1])
        off = figures["forecast_bytes"] / figures["measured_bytes"] - 1
        rows.append({"case": case.name, **figures, "off": round(off, 4)})
        forecast, measured = figures["forecast_bytes"] / 2**20, figures["measured_bytes"] / 2**20
        print(
            f"forecast: {case.name:<36} {forecast:8,.0f} MiB forecast, {measured:8,.0f} measured: "
            f"{off:+.1%}",
            flush=True,
        )
    offs = [row["off"] for row in rows]
    print(f"forecast: {min(offs):+.1%} to {max(offs):+.1%} over {len(offs)} cases")
    keep("forecast", {"cases": rows})


def measure(case: Case) -> None:
    """Three steps of one case; prints what was forecast before them and the peak of the last."""
    from nested_core import backend

    backend.prepare()
    from benchmarks.gpu.mlx_arms import build, forecast
    from benchmarks.tiers import one_tier, optimizer_for, thirds

    shape = case.shape
    model = build(shape, case.bits)
    import mlx.core as mx

    from nested_core.kernels.optimized_model import using_optimized_layers
    from nested_core.models.parameters import reference_trainable_parameters
    from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
    from nested_core.training.loss.loss_interface import BatchShape
    from nested_core.training.train_step import TrainStep

    dtype = mx.bfloat16
    if backend.device() == "cpu":
        model.set_dtype(mx.float32)
        dtype = mx.float32
    refs = reference_trainable_parameters(model, dtype=dtype)
    tiers = thirds(refs, shape.layers, deep=False) if case.tiered else one_tier(refs)
    optimizer = optimizer_for(tiers, refs, RATE)
    generator = np.random.default_rng(0)
    size = (shape.batch, shape.length + 1)
    tokens = generator.integers(0, shape.vocabulary, size).astype(np.int32)
    target_mask = np.zeros((shape.batch, shape.length), np.bool_)
    target_mask[:, : round(case.share * shape.length)] = True
    with using_optimized_layers(model, model.layers[: case.recomputed]):
        loss_fn = SUPERVISED_LOSS.for_model(model, refs)
        batch = BatchShape(shape.batch, shape.length, int(target_mask.sum()))
        expected = forecast(model, refs, optimizer, loss_fn, batch, recomputed=case.recomputed)
        train_step = TrainStep(
            model=model, parameters=refs, optimizer=optimizer, tiers=tiers, loss_fn=loss_fn
        )
        for _ in range(STEPS):
            mx.reset_peak_memory()
            due = tuple(range(len(tiers.frequencies)))
            result = train_step.run([(tokens, target_mask)], due)
            mx.eval(result.updates)
    print(json.dumps({"forecast_bytes": expected, "measured_bytes": mx.get_peak_memory()}))


if __name__ == "__main__":
    measure(CASES[int(sys.argv[1])]) if len(sys.argv) > 1 else main()
