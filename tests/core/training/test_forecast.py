"""The forecast of peak memory: its arithmetic, what it reads of a model, and how far it is off."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.nn as nn
import pytest

from benchmarks.gpu.shapes import RANK, SHAPES
from nested_core.config import FineTuneConfig
from nested_core.training.footprint import read_layers
from nested_core.training.forecast import (
    CPU,
    BatchShape,
    Device,
    Layer,
    Load,
    cuda,
    fewest_recomputed,
    peak_bytes,
)
from nested_core.training.memory import MemoryPlan, plan
from nested_core.training.positions import rows_at_once
from tests.architectures import ARCHITECTURES, build
from tests.example import example_settings

ROOT = Path(__file__).resolve().parents[3]

# T = 6 tokens. A layer keeps 4 * (6 * (10 + 1 * 3) + 0.5 * 2 * 2 * 3 * 3) = 384 bytes, its input
# is 4 * 6 * 4 = 96, the loss takes (4 + 12) * 7 * 6 = 672.
PLAIN = Device(scores=0.5, gates=1, in_flight=1, chunks=2)
LAYER = Layer(width=4, kept=10, gated=3, heads=2, is_trained=True)
LOAD = Load(1000, 40, 80, item=4, layers=(LAYER, LAYER), vocabulary=7, chunk=None)
BATCH = BatchShape(rows=2, length=3, learnt=6)
HELD = 1000 + 40 + 2 * 80

# A model of a usual kind, and a batch of it: 12 layers of 256.
MIDDLE = Load(
    50_000_000,
    2_000_000,
    4_000_000,
    item=4,
    layers=(Layer(256, 4200, 704, 4, is_trained=True),) * 12,
    vocabulary=4096,
    chunk=16384,
)
WIDE = BatchShape(rows=8, length=256, learnt=2048)


def test_the_peak_of_a_small_case_is_what_a_hand_computes() -> None:
    assert peak_bytes(LOAD, BATCH, PLAIN) == HELD + 2 * 384 + 672 + 384


def test_a_recomputed_layer_keeps_its_input_alone() -> None:
    wordy = replace(LOAD, vocabulary=70)
    assert peak_bytes(wordy, BATCH, PLAIN, 1) == HELD + 384 + 96 + 6720 + 384
    assert peak_bytes(wordy, BATCH, PLAIN, 2) == HELD + 2 * 96 + 6720 + 384


def test_where_the_loss_is_small_a_recomputed_layer_is_the_peak() -> None:
    small = replace(LOAD, vocabulary=1)
    assert peak_bytes(small, BATCH, PLAIN, 2) == int(HELD + 2 * 96 + 384 + 1.8 * 384)


def test_only_the_logits_that_are_asked_for_count_and_no_more_than_the_chunks_in_flight() -> None:
    many = BatchShape(rows=8, length=128, learnt=100)  # 128 positions are computed
    few = replace(LOAD, chunk=32)
    whole = peak_bytes(LOAD, many, PLAIN) - 16 * 7 * 1024
    assert peak_bytes(replace(LOAD, chunk=1024), many, PLAIN) == whole + 12 * 7 * 128
    assert peak_bytes(few, many, PLAIN) == whole + 12 * 7 * 2 * 32


def test_an_update_of_large_weights_is_the_peak_where_it_is_more() -> None:
    full = replace(LOAD, trained=10_000, moments=20_000, joins=False)
    assert peak_bytes(full, BATCH, PLAIN) == 1000 + 20_000 + 3 * 10_000 + 20_000


def test_layers_below_the_lowest_trained_one_keep_nothing() -> None:
    frozen = replace(LAYER, is_trained=False)
    below = replace(LOAD, layers=(frozen, frozen, LAYER, LAYER))
    between = replace(LOAD, layers=(LAYER, frozen))
    assert peak_bytes(below, BATCH, PLAIN) == peak_bytes(LOAD, BATCH, PLAIN)
    assert peak_bytes(between, BATCH, PLAIN) == peak_bytes(LOAD, BATCH, PLAIN)


@pytest.mark.parametrize("device", [CPU, cuda(25)], ids=["cpu", "cuda"])
@pytest.mark.parametrize(
    "more",
    [
        {"batch": replace(WIDE, rows=16)},
        {"batch": replace(WIDE, length=512)},
        {"load": replace(MIDDLE, layers=MIDDLE.layers + MIDDLE.layers[:1])},
        {"load": replace(MIDDLE, vocabulary=8192)},
        {"load": replace(MIDDLE, weights=60_000_000)},
        {"load": replace(MIDDLE, item=8)},
        {"batch": replace(WIDE, learnt=1024), "less": True},
    ],
    ids=["rows", "length", "layers", "vocabulary", "weights", "precision", "less learnt"],
)
def test_more_of_anything_needs_more(device: Device, more: dict[str, Any]) -> None:
    given: dict[str, Any] = {"load": MIDDLE, "batch": WIDE} | more
    is_less = given.pop("less", False)
    changed, before = peak_bytes(**given, device=device), peak_bytes(MIDDLE, WIDE, device)
    assert changed < before if is_less else changed > before


def test_each_layer_that_is_recomputed_needs_less() -> None:
    peaks = [peak_bytes(MIDDLE, WIDE, CPU, n) for n in range(13)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[12] < 0.5 * peaks[0]


H200 = {  # GiB at the peak, by rows of a batch and operations a commit
    ("135M", 4, 100): 3.10,
    ("0.5B", 4, 25): 4.02,
    ("0.5B", 4, 100): 4.34,
    ("0.5B", 8, 16): 6.41,
    ("0.5B", 16, 16): 11.59,
    ("0.5B", 16, 25): 13.54,
    ("1.7B", 4, 8): 13.11,
    ("1.7B", 4, 12): 14.14,
    ("1.7B", 4, 16): 15.00,
    ("1.7B", 16, 8): 41.80,
    ("7B", 4, 8): 32.57,
    ("7B", 4, 12): 34.15,
    ("7B", 4, 20): 37.35,
    ("7B", 4, 40): 45.46,
}


@pytest.mark.parametrize(("size", "rows", "operations"), H200)
def test_the_forecast_for_cuda_is_within_a_twentieth_of_what_an_h200_took(
    size: str, rows: int, operations: int
) -> None:
    shape = replace(SHAPES[size], batch=rows)
    d, m, r = shape.hidden, shape.intermediate, RANK
    k = d * shape.kv_heads // shape.heads
    trained = 4 * shape.layers * r * (2 * (d + d) + 2 * (d + k) + 3 * (d + m))
    kept = 4 * d + 2 * d + 2 * k + 3 * m + 7 * r
    layer = Layer(d, kept, m, shape.heads, is_trained=True, remade=m)
    load = Load(
        2 * shape.weights + trained,
        trained,
        2 * trained,
        item=2,
        layers=(layer,) * shape.layers,
        vocabulary=shape.vocabulary,
        chunk=rows_at_once(shape.vocabulary),
    )
    batch = BatchShape(shape.batch, shape.length, shape.tokens)
    found = peak_bytes(load, batch, cuda(operations)) / 2**30
    assert found == pytest.approx(H200[size, rows, operations], rel=0.05)


def layers_of(model: nn.Module, **settings: Any) -> tuple[Layer, ...]:
    return read_layers(model, dict(model.named_modules()), **settings)


def test_a_llamas_layer_is_read_as_the_docstring_says() -> None:
    d, a, k, m, r = 64, 64, 32, 128, 8
    expected = Layer(d, 4 * d + 2 * a + 2 * k + 3 * m + 7 * r, m, 4, is_trained=True, remade=m)
    assert layers_of(build("llama", rank=8)) == (expected, expected)
    assert layers_of(build("llama", rank=8, quantized=True)) == (expected, expected)


def test_the_product_of_an_mlp_is_made_again_where_all_of_it_is_lora_without_dropout() -> None:
    model = build("llama", rank=8)
    assert [layer.remade for layer in layers_of(model)] == [128, 128]
    assert [layer.remade for layer in layers_of(model, draws=True)] == [0, 0]
    assert [layer.remade for layer in layers_of(model, copies=2)] == [0, 0]
    some = build("llama", rank=8, keys=["mlp.up_proj", "mlp.down_proj"])
    others = some, build("llama", rank=4), build("phi3", rank=8), build("gemma2", rank=8)
    for other in others:
        assert [layer.remade for layer in layers_of(other)] == [0, 0]


def test_a_device_that_remakes_products_keeps_less_and_one_that_runs_ahead_more() -> None:
    layer = replace(LAYER, remade=2)
    load = replace(LOAD, layers=(layer, layer))
    remaking = replace(PLAIN, remakes=True)
    one = 4 * 6 * 2  # bytes of what is made again, a layer
    assert peak_bytes(load, BATCH, PLAIN) - peak_bytes(load, BATCH, remaking) == 3 * one
    ahead = replace(PLAIN, in_flight=9)
    assert peak_bytes(LOAD, BATCH, ahead) == HELD + 2 * 384 + 672 + 2 * 384
    assert peak_bytes(LOAD, BATCH, replace(ahead, most=1.5)) == HELD + 2 * 384 + 672 + 3 * 384


def test_inputs_of_layers_that_are_not_trained_are_not_kept() -> None:
    (all_of_it, _), (some, _) = (
        layers_of(build("llama", keys=keys))
        for keys in (None, ["self_attn.q_proj", "self_attn.v_proj"])
    )
    inputs_and_factors = 64 + 64 + 128 + 5 * 4  # of o, gate and up, down, and five more factors
    assert all_of_it.kept - some.kept == inputs_and_factors


def test_dropout_gives_each_trained_layer_an_input_of_its_own() -> None:
    model = build("llama")
    once = 64 + 64 + 64 + 128  # of q, k and v; o; gate and up; down
    each = 3 * 64 + 64 + 2 * 64 + 128
    assert layers_of(model, draws=True)[0].kept == layers_of(model)[0].kept - once + 2 * each


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_read(name: str) -> None:
    for layer in layers_of(build(name)):
        assert (layer.width, layer.heads, layer.is_trained) == (64, 4, True)
        assert 600 < layer.kept < 2000
        assert layer.gated in (128, 2 * 128)  # of two chosen experts: olmoe


def planned(room: float, **changes: Any) -> MemoryPlan:
    config = FineTuneConfig.model_validate(changes)
    return plan(config, MIDDLE, WIDE, CPU, int(room))


LIMITED: dict[str, Any] = {"grad_checkpoint": True, "training": {"memory_limit_gb": 1}}


def test_what_fits_is_said_in_one_line_without_advice() -> None:
    needed = peak_bytes(MIDDLE, WIDE, CPU)
    assert planned(16e9).describe() == f"memory: needs about {needed / 1e9:.2g} GB of 16.0 GB"


def test_what_does_not_fit_names_each_setting_that_would_with_its_own_figure() -> None:
    room = 0.5 * peak_bytes(MIDDLE, WIDE, CPU)
    found = planned(room)
    assert not found.fits
    shorter = peak_bytes(MIDDLE, BatchShape(8, 64, 512), CPU)
    assert dict(found.ways) == {
        "grad_checkpoint: true": peak_bytes(MIDDLE, WIDE, CPU, 12),
        "batch_size: 2": peak_bytes(MIDDLE, BatchShape(2, 256, 512), CPU),
        "max_seq_length: 64": shorter,
    }
    assert all(needed <= room for _, needed in found.ways)
    assert found.describe().endswith(f"or max_seq_length: 64 (about {shorter / 1e9:.2g} GB)")
    assert "; try grad_checkpoint: true (about " in found.describe()


def test_where_nothing_would_fit_the_least_there_is_is_named() -> None:
    text = planned(60e6).describe()
    least = peak_bytes(MIDDLE, BatchShape(1, 256, 256), CPU, 12) / 1e9
    both = "grad_checkpoint: true with batch_size: 1"
    assert text.endswith(f"; not even {both} (about {least:.2g} GB) would fit")


def test_under_a_limit_only_as_many_layers_are_recomputed_as_are_needed() -> None:
    room = 0.7 * peak_bytes(MIDDLE, WIDE, CPU)
    found = planned(room, **LIMITED)
    assert 0 < found.recomputed < 12
    assert found.fits
    assert peak_bytes(MIDDLE, WIDE, CPU, found.recomputed - 1) > room
    assert f", with {found.recomputed} of 12 layers recomputed" in found.describe()


def test_no_layer_is_recomputed_where_all_fits_and_all_are_where_nothing_does() -> None:
    assert planned(16e9, **LIMITED).recomputed == 0
    assert planned(1e6, **LIMITED).recomputed == 12
    assert fewest_recomputed(MIDDLE, WIDE, CPU, 16e9) == 0


def test_without_a_limit_or_as_mlx_lm_does_every_layer_is_recomputed() -> None:
    assert planned(16e9, grad_checkpoint=True).recomputed == 12
    training = {"memory_limit_gb": 1, "reference": "mlx_lm"}
    assert planned(16e9, grad_checkpoint=True, training=training).recomputed == 12
    assert planned(16e9).recomputed == 0


def test_the_layers_recomputed_are_the_lowest_that_train() -> None:
    class Model:
        layers = tuple("abcdef")

    model: Any = Model()
    chosen = [MemoryPlan(1, 2, number, layers=4).chosen(model) for number in (0, 2, 4)]
    assert list(map("".join, chosen)) == ["", "cd", "abcdef"]  # type: ignore[arg-type]


TRAIN = """
import json, sys
from pathlib import Path
import nested_core
import mlx.core as mx
from tests.example import FineTuneConfig, prepare, train

config = FineTuneConfig.model_validate(json.loads(sys.argv[2]))
run = prepare(config, Path(sys.argv[1]))
mx.reset_peak_memory()
done = train(config, run)
print(json.dumps([done.trainer.memory.needed, mx.get_peak_memory()]))
"""


@pytest.mark.parametrize("changes", [{}, {"grad_checkpoint": True}], ids=["plain", "recomputed"])
def test_the_examples_peak_is_what_was_forecast(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = example_settings(batch_size=40, iters=5, val_batches=1, **changes)
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "run"), json.dumps(settings)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    needed, measured = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 * measured < needed < 1.25 * measured
