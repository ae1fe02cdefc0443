"""One measurement with MLX, in a process of its own: mlx_lm's training loop as shipped, or ours.

An arm is `mlx_lm` or `ours`, with options: `ours+deep` (tiers [1, 2, 4], deep layers fast),
`+due=1` (the fastest tiers alone), `+bits=4`, `+rank=12`, `+dropout=0.05`, `+dora`, `+checkpoint`
(all layers recomputed), `+limit=12` (GiB), `+graphs=1` (CUDA graphs), `+ops=10` and `+mb=200` (what
is committed at once), `+batch=16`, `+length=278`, `+layers=4`, `+windows=3` (windows that count,
after half as many), `+keep=3.5` (GiB of freed buffers that MLX may keep). `mlx_lm+cache` leaves
MLX's cache of freed buffers alone. A row of ours has the peak that is forecast for it. With
`+mixed`, and with `+chats`, rows have lengths of their own, up to the shape's, and tokens are
counted without padding; with `+even` as well, rows of one length hold as many tokens on average,
and with `+even=259` so many each. `ours+parts` takes the gradients alone, third by third. With
`+ranks=2`, under `mlx.launch`, each rank has the whole batch on a GPU of its own; the row counts
the tokens of all. `floor`, and `floor+deep`, is no training, but the products and the attention
that each must do.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.gpu.floor import NAME as FLOOR
from benchmarks.gpu.floor import floor_of
from benchmarks.gpu.parts import parts_of
from benchmarks.gpu.shapes import (
    MIXED_WARM,
    MIXED_WINDOWS,
    RANK,
    RATE,
    ROWS,
    SCALE,
    WINDOW,
    FamilyShape,
    Shape,
    energy,
    measure,
    per_step,
    row,
    rows_of,
    shape_of,
    windows_of,
)

VARIABLES = {
    "graphs": "MLX_USE_CUDA_GRAPHS",
    "ops": "MLX_MAX_OPS_PER_BUFFER",
    "mb": "MLX_MAX_MB_PER_BUFFER",
}
MicroBatch = tuple[npt.NDArray[np.int32], npt.NDArray[np.bool_]]  # tokens, what is learnt
NAMES = "mlx_lm", "ours", FLOOR
OPTIONS = {*VARIABLES, "batch", "bits", "deep", "due", "keep", "length", "limit", "parts", "ranks"}
OPTIONS |= {*ROWS, "even", "cache", "checkpoint", "dora", "dropout", "layers", "rank", "windows"}


def main(size: str, arm: str) -> None:
    """Measure one arm at one size and print its row."""
    name, plus, words = arm.partition("+")
    options, shape = read_options(plus + words, shape_of(size))
    if name not in NAMES or options.keys() - OPTIONS:
        raise SystemExit(
            f"There is no arm {arm}: {', '.join(NAMES)}, with any of {sorted(OPTIONS)}."
        )
    set_variables(options)
    if name in ("ours", FLOOR):
        from nested_core.backend import prepare, prepare_for_model_size

        prepare()
        prepare_for_model_size(shape.weights)
    import mlx.core as mx

    if "limit" in options:
        mx.set_memory_limit(int(float(options["limit"]) * 2**30))
    if "keep" in options:
        mx.set_cache_limit(int(float(options["keep"]) * 2**30))
    if name == FLOOR:
        found = floor_of(shape, deep="deep" in options)
    else:
        model = build(shape, int(options.get("bits", "16")), options)
        mx.reset_peak_memory()
        found = loop_of(name, options)(model, shape)
    if found.pop("is_main", True):
        shape = replace(shape, batch=shape.batch * int(options.get("ranks", "1")))
        print(row(size, arm, shape, found, mx.get_peak_memory()), flush=True)


def read_options(words: str, shape: Shape) -> tuple[dict[str, str], Shape]:
    """The options of `+batch=1+dora`, each with its value, else 1; and the shape that they make."""
    pairs = [word.partition("=") for word in words.split("+")[1:]]
    options = {key: value if equals else "1" for key, equals, value in pairs}
    sizes = {word: int(options[word]) for word in ("batch", "length", "layers") if word in options}
    return options, replace(shape, **sizes)


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


def build(shape: Shape, bits: int, options: Mapping[str, str] | None = None) -> Any:
    """A model of random weights, or quantised, with LoRA as the options say."""
    import mlx.core as mx

    model = make_model(shape, bits)
    mx.eval(model.parameters())
    add_lora(model, shape, options or {})
    mx.eval(model.parameters())
    return model


def make_model(shape: Shape, bits: int = 16) -> Any:
    """A model of random weights, or quantised; none of them is computed yet.

    The decay of gated delta nets is float32, as published models have it.
    """
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_map_with_path

    module = import_module(f"mlx_lm.models.{shape.config['model_type']}")
    mx.random.seed(0)
    model = module.Model(module.ModelArgs.from_dict(shape.config))
    dtype = compute_dtype(shape)
    kept = {True: mx.float32, False: dtype}
    model.update(
        tree_map_with_path(
            lambda path, x: x.astype(kept[path.endswith("A_log")]), model.parameters()
        )
    )
    if bits < 16:
        nn.quantize(model, group_size=64, bits=bits)
    return model


def add_lora(model: Any, shape: Shape, options: Mapping[str, str]) -> None:
    """Freeze a model, and give its layers factors that are not computed yet."""
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model.freeze()
    settings = {
        "rank": int(options.get("rank", RANK)),
        "dropout": float(options.get("dropout", 0)),
        "scale": SCALE,
    }
    if shape.keys is not None:
        settings["keys"] = shape.keys
    linear_to_lora_layers(model, shape.layers, settings, use_dora="dora" in options)


def compute_dtype(shape: Shape) -> Any:
    """bfloat16, but float32 on a CPU for other families: MLX has no product with experts there."""
    import mlx.core as mx

    is_on_cpu = mx.default_device() == mx.Device(mx.cpu)
    return mx.float32 if is_on_cpu and isinstance(shape, FamilyShape) else mx.bfloat16


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
    rows, (warm, windows) = rows_of(options, shape.length), (MIXED_WARM, MIXED_WINDOWS)
    is_mixed = rows is not None
    if rows is None:
        count = 16 * shape.batch
        rows = np.full(count, shape.length + 1), np.full(count, shape.length)
        warm, windows = windows_of(options)
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArgs(
            batch_size=shape.batch,
            iters=WINDOW * (warm + windows),
            steps_per_report=WINDOW,
            steps_per_save=10**6,
            max_seq_length=shape.length + 1,
            grad_checkpoint="checkpoint" in options,
            clear_cache_threshold=sys.maxsize if "cache" in options else 0,
            adapter_file=str(Path(folder) / "adapters.safetensors"),
        )
        data = [
            (generator.integers(0, shape.vocabulary, length).tolist(), int(length - learnt))
            for length, learnt in zip(*rows, strict=True)
        ]
        train(model, optim.Adam(RATE), data, None, arguments, training_callback=Reports())
    seconds = [1 / rate for rate in rates]
    found: dict[str, Any] = {
        "seconds": seconds[warm:],
        "warm_up": round(WINDOW * sum(seconds[:warm]), 2),
        "joules": per_step(energies[warm - 1], energies[-1], windows),
    }
    if is_mixed:  # it reports what is learnt
        inputs, learnt = (float(np.sum(each)) for each in (rows[0] - 1, rows[1]))
        found["real_tokens"] = [each * inputs / learnt for each in tokens[warm:]]
    return found


def join_world(options: dict[str, str]) -> Any:
    """The ranks that mlx.launch started, where the arm has several; else this process."""
    from nested_core.rooms.ranks.rank_world import join_ranks
    from nested_core.training.world import SINGLE_PROCESS_WORLD

    return join_ranks(int(options["ranks"])) if "ranks" in options else SINGLE_PROCESS_WORLD


def our_loop(model: Any, shape: Shape, options: dict[str, str]) -> dict[str, Any]:
    """Our train step as the trainer drives it: one step in flight, a report at the end of a window.

    Ranks are compared bit by bit at the end.
    """
    import mlx.core as mx

    from benchmarks.tiers import one_tier, optimizer_for, thirds
    from nested_core.kernels.optimized_model import using_optimized_layers
    from nested_core.models.parameters import reference_trainable_parameters
    from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS
    from nested_core.training.train_step import TrainStep

    world = join_world(options)
    model.train()
    refs = reference_trainable_parameters(model, dtype=compute_dtype(shape))
    is_tiered = "deep" in options or "due" in options
    tiers = thirds(refs, shape.layers, deep=True) if is_tiered else one_tier(refs)
    optimizer = optimizer_for(tiers, refs, RATE)
    loss_fn = SUPERVISED_LOSS.for_model(model, refs)
    generator = np.random.default_rng(world.rank)
    batches, real, loss_fn = draw_batches(options, shape, loss_fn, generator)
    recomputed = model.layers if "checkpoint" in options else ()
    expected = forecast_row(model, refs, optimizer, loss_fn, shape, options)
    with using_optimized_layers(model, recomputed):
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
                tokens[-1] += real[step % len(batches)]
                requests = world.requests_to_send(lambda: (False, False))
                result = train_step.run([batch], due, requests=requests)
                sent[",".join(map(str, due))] = result.gradient_bytes
                total = total + result.micro_batches[0]["loss"]
                in_flight.append(optimizer.state["nested"]["nonfinite_in_a_row"])
                in_flight.pop(0).item()
            if not np.isfinite(total.item()):
                raise SystemExit(f"the loss is {total.item()}")

        if ROWS.keys() & options:
            trace = partial(trace_widths, train_step, batches, tiers.due(1))
            found = measure(window, MIXED_WARM, MIXED_WINDOWS, settle=trace)
            found |= {"real_tokens": tokens[MIXED_WARM:]} | describe(batches, real, loss_fn)
        else:
            found = measure(window, *windows_of(options))
            found["forecast_gib"] = round(expected / 2**30, 4)
        if world.is_single_process:
            return found
        world.require_equal_on_ranks(train_step.packed.arrays(), step)
        found |= {"is_main": world.is_main, "equal": True, "bytes_sent_by_due_tiers": sent}
        return found | {"joules": None}  # the counter is of one GPU


def forecast_row(
    model: Any, refs: Any, optimizer: Any, loss_fn: Any, shape: Shape, options: Mapping[str, str]
) -> int:
    """`forecast` of a row: whole rows, all learnt."""
    from nested_core.training.loss.loss_interface import BatchShape

    batch = BatchShape(shape.batch, shape.length, shape.tokens)
    recomputed = len(model.layers) if "checkpoint" in options else 0
    dropout = float(options.get("dropout", 0))
    return forecast(model, refs, optimizer, loss_fn, batch, recomputed=recomputed, dropout=dropout)


def forecast(
    model: Any,
    refs: Any,
    optimizer: Any,
    loss_fn: Any,
    batch: Any,
    *,
    recomputed: int = 0,
    dropout: float = 0.0,
) -> int:
    """Bytes at the peak of a step on a `BatchShape`, as a run says before it begins."""
    from nested_core.config.schema import FineTuneConfig
    from nested_core.rooms.memory.forecast import device_profile_for
    from nested_core.rooms.memory.model_footprint import compute_footprint
    from nested_core.rooms.memory.peak_estimate import estimate_peak_bytes

    config = FineTuneConfig()
    adapter = config.lora_parameters.model_copy(update={"dropout": dropout})
    config = config.model_copy(update={"lora_parameters": adapter})
    footprint = compute_footprint(config, model, refs, optimizer, loss_fn)
    return estimate_peak_bytes(footprint, batch, device_profile_for(config), recomputed)


def draw_batches(
    options: Mapping[str, str], shape: Shape, loss_fn: Any, generator: np.random.Generator
) -> tuple[list[MicroBatch], list[int], Any]:
    """Batches of random tokens, the tokens of each without padding, and the loss for them.

    Rows of unlike lengths come in the batches and with the loss that the trainer has for them.
    """
    from nested_core.data.batches import BatchOrder

    rows = rows_of(options, shape.length)
    if rows is None:
        size = (16, shape.batch, shape.length + 1)
        drawn = generator.integers(0, shape.vocabulary, size).astype(np.int32)
        learnt = np.ones((shape.batch, shape.length), np.bool_)
        return [(each, learnt) for each in drawn], [shape.tokens] * len(drawn), loss_fn
    lengths, learnt = rows
    order = BatchOrder(lengths, shape.batch, 0, max_seq_length=shape.length)
    batches: list[MicroBatch] = []
    real: list[int] = []
    count = WINDOW * (MIXED_WARM + MIXED_WINDOWS)
    for index in range(min(count, order.batches_per_epoch)):
        batch = order.batch(index)
        tokens = generator.integers(0, shape.vocabulary, (shape.batch, batch.width + 1))
        end = (lengths[batch.rows] - 1)[:, None]
        columns = np.arange(batch.width)
        mask = (columns < end) & (columns >= end - learnt[batch.rows][:, None])
        mask = np.pad(mask, ((0, shape.batch - len(mask)), (0, 0)))
        batches.append((tokens.astype(np.int32), mask))
        real.append(int(end.sum()))
    return batches, real, loss_fn.for_position_counts(order.largest_sums(learnt))


def trace_widths(train_step: Any, batches: Sequence[MicroBatch], due: tuple[int, ...]) -> None:
    """Take a step of each width, so that no counted one is the first."""
    import mlx.core as mx

    for batch in {batch[1].shape[1]: batch for batch in batches}.values():
        mx.eval(train_step.run([batch], due).updates)


def describe(batches: Sequence[MicroBatch], real: Sequence[int], loss_fn: Any) -> dict[str, Any]:
    """The widths, the shapes that a step is traced for, and the share of padding."""
    shapes = {tuple(each.shape for each in loss_fn.prepare_batch(batch)) for batch in batches}
    padded = sum(mask.size for _, mask in batches)
    return {
        "widths": len({mask.shape[1] for _, mask in batches}),
        "traces": len(shapes),
        "padding": round(1 - sum(real) / padded, 4),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
