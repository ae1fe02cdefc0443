"""What a step is made of, by itself: the forward pass, and the backward pass of each third.

From these times follows what [1, 2, 4] could gain where nothing but due gradients cost anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from benchmarks.gpu.shapes import WINDOW, Shape, measure, median_ms

NAME = "ours+parts"


def parts_of(model: Any, shape: Shape) -> dict[str, Any]:
    """Milliseconds of the forward pass, and of what each third adds, from the deepest on.

    The model is computed as the trainer does; gradients of the LoRA factors are asked for and
    dropped, one step in flight, and nothing is updated.
    """
    import mlx.core as mx
    import numpy as np

    from benchmarks.tiers import thirds
    from nested_core.kernels.optimized_model import using_optimized_layers
    from nested_core.models.parameters import (
        assign_parameters,
        read_parameters,
        reference_trainable_parameters,
        restoring_parameters,
    )
    from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS

    model.train()
    refs = reference_trainable_parameters(model, dtype=mx.bfloat16)
    tiers = thirds(refs, shape.layers, deep=True)
    loss = SUPERVISED_LOSS.for_model(model, refs)
    factors = {name: value.astype(mx.bfloat16) for name, value in read_parameters(refs).items()}
    generator = np.random.default_rng(0)
    size = shape.batch, shape.length
    tokens = generator.integers(0, shape.vocabulary, (size[0], size[1] + 1)).astype(np.int32)
    arrays = loss.prepare_batch((tokens, np.ones(size, np.bool_)))

    def value_of(wanted: Any, tokens: mx.array, target_mask: mx.array) -> Any:
        assign_parameters(refs, factors | wanted)
        return loss.function(model, tokens, target_mask)

    def seconds_of(due: int) -> list[float]:
        wanted = {name: factors[name] for name in factors if tiers.tensors[name] < due}
        function: Any = mx.value_and_grad(value_of) if due else value_of
        step = mx.compile(function)

        def window() -> None:
            last = step(wanted, *arrays)
            for _ in range(WINDOW - 1):
                mx.async_eval(last)
                before, last = last, step(wanted, *arrays)
                mx.eval(before)
            mx.eval(last)

        found: list[float] = measure(window)["seconds"]
        return found

    with restoring_parameters(refs), using_optimized_layers(model):
        seconds = [seconds_of(due) for due in range(4)]
    ends = [median_ms(each) for each in seconds]
    thirds_ms = [round(more - less, 3) for less, more in pairwise(ends)]
    return {"seconds": seconds[-1], "forward_ms": ends[0], "backward_ms": thirds_ms}


def describe_gain(row: Mapping[str, Any], speeds: Sequence[float]) -> str:
    """The gain that a row predicts, beside that of `speeds`, uniform and tiered, where both are."""
    predicted = predicted_gain(row)
    line = f"[1, 2, 4], deep fast, could gain {predicted:.3f}"
    if len(speeds) < 2:
        return line
    gain = speeds[1] / speeds[0]
    return f"{line}  gains {gain:.3f}, {gain / predicted:.3f} of that"


def predicted_gain(row: Mapping[str, Any]) -> float:
    """Uniform updates of [1, 2, 4] with deep layers fast: a third counts as often as it is due."""
    deep, middle, shallow = row["backward_ms"]
    uniform = row["forward_ms"] + deep + middle + shallow
    return float(uniform / (row["forward_ms"] + deep + middle / 2 + shallow / 4))
