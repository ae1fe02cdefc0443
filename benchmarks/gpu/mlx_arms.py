"""One measurement with MLX, in a process of its own: mlx_lm's training loop as shipped, or ours.

An arm is `mlx_lm` or `ours`, with options: `ours+deep` (tiers [1, 2, 4], deep layers fast),
`+due=1` (the fastest tiers alone), `+bits=4`, `+limit=12` (GiB), `+graphs=1` (CUDA graphs),
`+ops=10` and `+mb=200` (what is committed at once), `+batch=16`, `+length=278`. With `+mixed` rows
have lengths of their own, up to the shape's, and tokens are counted without padding. `ours+parts`
takes the gradients alone, third by third. With `+ranks=2`, under `mlx.launch`, each rank has the
whole batch on a GPU of its own; the row counts the tokens of all. `floor`, and `floor+deep`, is no
training, but the products and the attention that each must do.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.floor import NAME as FLOOR
from benchmarks.gpu.floor import floor_of
from benchmarks.gpu.parts import parts_of
from benchmarks.gpu.shapes import (
    KEYS,
    MIXED_WARM,
    RANK,
    RATE,
    SCALE,
    SHAPES,
    WARM,
    WINDOW,
    WINDOWS,
    Shape,
    energy,
    measure,
    mixed_lengths,
    per_step,
    row,
)

VARIABLES = {
    "graphs": "MLX_USE_CUDA_GRAPHS",
    "ops": "MLX_MAX_OPS_PER_BUFFER",
    "mb": "MLX_MAX_MB_PER_BUFFER",
}
MicroBatch = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]  # tokens, what is learnt
NAMES = "mlx_lm", "ours", FLOOR
OPTIONS = {*VARIABLES, "batch", "bits", "deep", "due", "length", "limit", "mixed", "parts", "ranks"}


def main(size: str, arm: str) -> None:
    """Measure one arm at one size and print its row."""
    name, *words = arm.split("+")
    pairs = [word.partition("=") for word in words]
    options = {key: value if equals else "1" for key, equals, value in pairs}
    if name not in NAMES or options.keys() - OPTIONS:
        raise SystemExit(
            f"There is no arm {arm}: {', '.join(NAMES)}, with any of {sorted(OPTIONS)}."
        )
    set_variables(options)
    shape = SHAPES[size]
    if "batch" in options:
        shape = replace(shape, batch=int(options["batch"]))
    if "length" in options:
        shape = replace(shape, length=int(options["length"]))
    if name in ("ours", FLOOR):
        from nested_core.backend import prepare, set_operations_per_commit

        prepare()
        set_operations_per_commit(shape.weights)
    import mlx.core as mx

    if "limit" in options:
        mx.set_memory_limit(int(float(options["limit"]) * 2**30))
    if name == FLOOR:
        found = floor_of(shape, deep="deep" in options)
    else:
        model = build(shape, int(options.get("bits", "16")))
        mx.reset_peak_memory()
        found = loop_of(name, options)(model, shape)
    if found.pop("is_main", True):
        shape = replace(shape, batch=shape.batch * int(options.get("ranks", "1")))
        print(row(size, arm, shape, found, mx.get_peak_memory()), flush=True)


def loop_of(name: str, options: dict[str, str]) -> Callable[[Any, Shape], dict[str, Any]]:
    """What measures a model."""
    if "parts" in options:
        return parts_of
    loop = mlx_lm_loop if name == "mlx_lm" else our_loop
    return partial(loop, options=options)


def set_variables(options: dict[str, str]) -> None:
    """Set how MLX starts kernels before it is imported; the rival has MLX's own."""
    for word, variable in VARIABLES.items():
        if word in options:
            os.environ[variable] = options[word]


def build(shape: Shape, bits: int) -> Any:
    """A Llama of random bfloat16 weights, or quantised, with LoRA on every linear layer."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm.models.llama import Model, ModelArgs
    from mlx_lm.tuner.utils import linear_to_lora_layers

    mx.random.seed(0)
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=shape.hidden,
            num_hidden_layers=shape.layers,
            intermediate_size=shape.intermediate,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            rms_norm_eps=1e-5,
            vocab_size=shape.vocabulary,
            tie_word_embeddings=True,
            rope_theta=10000.0,
        )
    )
    model.set_dtype(mx.bfloat16)
    if bits < 16:
        nn.quantize(model, group_size=64, bits=bits)
    mx.eval(model.parameters())
    model.freeze()
    settings = {"rank": RANK, "dropout": 0.0, "scale": SCALE, "keys": KEYS}
    linear_to_lora_layers(model, shape.layers, settings)
    mx.eval(model.parameters())
    return model


def mlx_lm_loop(model: Any, shape: Shape, options: dict[str, str]) -> dict[str, Any]:
    """mlx_lm.tuner.trainer.train; each of its reports is a window."""
    import mlx.optimizers as optim
    from mlx_lm.tuner.trainer import TrainingArgs, TrainingCallback, train

    rates: list[float] = []
    tokens: list[float] = []  # of each window's steps
    energies: list[float | None] = []

    class Reports(TrainingCallback):
        def on_train_loss_report(self, train_info: dict[str, Any]) -> None:
            rates.append(train_info["iterations_per_second"])
            tokens.append(WINDOW * train_info["tokens_per_second"] / rates[-1])
            energies.append(energy())

    generator = np.random.default_rng(0)
    lengths = [shape.length] * 16 * shape.batch
    is_mixed, warm = "mixed" in options, WARM
    if is_mixed:
        lengths, warm = mixed_lengths(shape.length).tolist(), MIXED_WARM
    rows = [generator.integers(0, shape.vocabulary, length) for length in lengths]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            batch_size=shape.batch,
            iters=WINDOW * (warm + WINDOWS),
            steps_per_report=WINDOW,
            steps_per_save=10**6,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        data = [(each.tolist(), 0) for each in rows]
        train(model, optim.Adam(RATE), data, None, arguments, training_callback=Reports())
    seconds = [1 / rate for rate in rates]
    found: dict[str, Any] = {
        "seconds": seconds[warm:],
        "warm_up": round(WINDOW * sum(seconds[:warm]), 2),
        "joules": per_step(energies[warm - 1], energies[-1]),
    }
    return found | ({"real_tokens": tokens[warm:]} if is_mixed else {})


def our_loop(model: Any, shape: Shape, options: dict[str, str]) -> dict[str, Any]:
    """Our train step as the trainer drives it: one step in flight, a report at the end of a window.

    Ranks are compared bit by bit at the end.
    """
    import mlx.core as mx

    from benchmarks.tiers import one_tier, optimizer_for, thirds
    from nested_core.kernels.optimized_model import using_optimized_layers
    from nested_core.models.parameters import reference_trainable_parameters
    from nested_core.training.loss.supervised_loss import SUPERVISED_LOSS
    from nested_core.training.rank_communication import SINGLE_PROCESS_WORLD, join_ranks
    from nested_core.training.train_step import TrainStep

    world = join_ranks(int(options["ranks"])) if "ranks" in options else SINGLE_PROCESS_WORLD
    model.train()
    refs = reference_trainable_parameters(model, dtype=mx.bfloat16)
    is_tiered = "deep" in options or "due" in options
    tiers = thirds(refs, shape.layers, deep=True) if is_tiered else one_tier(refs)
    optimizer = optimizer_for(tiers, refs, RATE)
    loss_fn = SUPERVISED_LOSS.for_model(model, refs)
    draw = mixed_batches if "mixed" in options else batches_of_one_length
    batches = draw(shape, np.random.default_rng(world.rank))
    with using_optimized_layers(model):
        train_step = TrainStep(
            model=model,
            parameters=refs,
            optimizer=optimizer,
            tiers=tiers,
            loss_fn=loss_fn,
            world=world,
        )
        step, in_flight, sent = 0, [mx.array(0)], dict[str, int]()
        tokens: list[int] = []  # of each window's steps
        traced = 0.0
        if "mixed" in options:
            traced = trace_widths(train_step, batches, tiers.due(1))

        def window() -> None:
            nonlocal step
            total = mx.array(0.0)
            tokens.append(0)
            for _ in range(WINDOW):
                step += 1
                due = tiers.due(step)
                if "due" in options:
                    due = tuple(range(int(options["due"])))
                batch = batches[step % len(batches)]
                tokens[-1] += int(batch[1].sum())
                result = train_step.run([batch], due)
                sent[",".join(map(str, due))] = result.gradient_bytes
                total = total + result.micro_batches[0]["loss"]
                in_flight.append(optimizer.state["nested"]["nonfinite_in_a_row"])
                in_flight.pop(0).item()
            if not np.isfinite(total.item()):
                raise SystemExit(f"the loss is {total.item()}")

        found = measure(window)
        if "mixed" in options:
            found |= {"real_tokens": tokens[WARM:], "traced": traced}
            found["padding"] = round(
                1 - sum(m.sum() for _, m in batches) / sum(m.size for _, m in batches), 4
            )
            found["widths"] = len({m.shape[1] for _, m in batches})
        if world.is_single_process:
            return found
        world.require_equal_on_ranks(train_step.packed.arrays(), step)
        found |= {"is_main": world.is_main, "equal": True, "bytes_sent_by_due_tiers": sent}
        return found | {"joules": None}  # the counter is of one GPU


def batches_of_one_length(shape: Shape, generator: np.random.Generator) -> list[MicroBatch]:
    """Random tokens, all of them learnt."""
    size = (16, shape.batch, shape.length + 1)
    tokens = generator.integers(0, shape.vocabulary, size).astype(np.int32)
    return [(each, np.ones((shape.batch, shape.length), np.bool_)) for each in tokens]


def mixed_batches(shape: Shape, generator: np.random.Generator) -> list[MicroBatch]:
    """An epoch over rows of mixed lengths, as the trainer's own batches have them."""
    from nested_core.data.batch_order import BatchOrder

    lengths = mixed_lengths(shape.length)
    order = BatchOrder(lengths, shape.batch, 0, max_seq_length=shape.length)
    batches: list[MicroBatch] = []
    for index in range(order.batches_per_epoch):
        batch = order.batch(index)
        tokens = generator.integers(0, shape.vocabulary, (shape.batch, batch.width + 1))
        learnt = np.arange(batch.width) < lengths[batch.rows][:, None] - 1
        learnt = np.pad(learnt, ((0, shape.batch - len(learnt)), (0, 0)))
        batches.append((tokens.astype(np.int32), learnt))
    return batches


def trace_widths(train_step: Any, batches: Sequence[MicroBatch], due: tuple[int, ...]) -> float:
    """Take a step of each width; the seconds that these took."""
    import mlx.core as mx

    began = time.perf_counter()
    for batch in {batch[1].shape[1]: batch for batch in batches}.values():
        mx.eval(train_step.run([batch], due).updates)
    return round(time.perf_counter() - began, 2)


if __name__ == "__main__":
    main(*sys.argv[1:])
