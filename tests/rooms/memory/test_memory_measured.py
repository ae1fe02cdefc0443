"""How far the predicted peak memory is off: from measurements on H200s, and on this CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.forecast import CASES
from benchmarks.gpu.shapes import RANK, SHAPES
from nested_core import backend
from nested_core.rooms.memory.peak_estimate import (
    LayerFootprint,
    ModelFootprint,
    cuda_profile,
    estimate_peak_bytes,
)
from nested_core.training.loss.logit_budget import positions_at_once
from nested_core.training.loss.loss_interface import BatchShape
from tests.example import example_settings
from tests.left_out import slow_except

ROOT = Path(__file__).resolve().parents[4]

H200 = {  # GiB at the peak, by rows of a batch and operations a commit
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
H200_4_BITS = {("135M", 100): 3.04, ("0.5B", 100): 4.15, ("1.7B", 8): 11.8, ("7B", 8): 24.0}


# GiB at the peak of 3B with 8 operations a commit, by rows and width.
H200_WIDTHS = {
    (2, 2048): 20.434,
    (3, 700): 14.435,
    (3, 768): 14.776,
    (4, 278): 11.0,
    (8, 128): 10.389,
    (8, 136): 11.172,
    (8, 256): 13.972,
    (1, 8064): 32.001,
    (1, 8192): 32.401,
}


# GiB at the peak, by size, rows, width and operations a commit, on up to three hosts. Where the
# host sets the pace a faster one runs further ahead, and holds more.
H200_HOSTS = {
    ("135M", 4, 512, 100): (3.10,),
    ("0.5B", 4, 504, 25): (3.33, 3.70),
    ("0.5B", 4, 512, 25): (3.46, 3.58, 4.02),
    ("0.5B", 3, 511, 25): (2.57, 2.95),
    ("0.5B", 3, 512, 25): (2.55, 2.84),
    ("0.5B", 3, 700, 25): (3.48, 3.63, 3.79),
    ("0.5B", 3, 768, 25): (3.68, 3.69, 3.82),
    ("0.5B", 8, 128, 25): (1.89, 1.98, 1.99),
    ("0.5B", 8, 136, 25): (2.27, 2.30, 2.37),
    ("0.5B", 8, 256, 25): (3.36, 3.46, 3.56),
    ("0.5B", 4, 278, 25): (2.39,),
    ("0.5B", 4, 308, 25): (2.28, 2.40),
    ("0.5B", 2, 2040, 25): (7.45,),
    ("0.5B", 2, 2048, 25): (7.45,),
    ("0.5B", 1, 4000, 25): (7.46,),
    ("0.5B", 1, 8000, 25): (13.47,),
    ("0.5B", 1, 8064, 25): (13.47,),
}


def predicted_for_cuda(
    size: str, rows: int, operations: int, bits: float = 16, length: int | None = None
) -> float:
    """GiB; `bits` a weight, with what its group's scale and bias take."""
    shape = replace(SHAPES[size], batch=rows)
    shape = replace(shape, length=length or shape.length)
    d, m, r = shape.hidden, shape.intermediate, RANK
    k = d * shape.kv_heads // shape.heads
    trained = 4 * shape.layers * r * (2 * (d + d) + 2 * (d + k) + 3 * (d + m))
    kept = 4 * d + 2 * d + 2 * k + 3 * m + 7 * r
    layer = LayerFootprint(
        d, kept, m, shape.heads, is_trained=True, mlp_product=m, attention=d, qkv=d + 2 * k
    )
    footprint = ModelFootprint(
        int(shape.weights * bits / 8) + trained,
        trained,
        2 * trained,
        activation_bytes=2,
        layers=(layer,) * shape.layers,
        vocabulary=shape.vocabulary,
        chunk_rows=positions_at_once(shape.vocabulary),
        dequantized=2 * shape.vocabulary * d if bits < 16 else 0,
    )
    batch = BatchShape(shape.batch, shape.length, shape.tokens)
    return estimate_peak_bytes(footprint, batch, cuda_profile(operations)) / 2**30


@pytest.mark.parametrize(("size", "rows", "operations"), H200)
def test_the_prediction_for_cuda_is_within_a_twentieth_of_what_an_h200_took(
    size: str, rows: int, operations: int
) -> None:
    found = predicted_for_cuda(size, rows, operations)
    assert found == pytest.approx(H200[size, rows, operations], rel=0.05)


@pytest.mark.parametrize(("rows", "width"), H200_WIDTHS)
def test_it_is_within_a_tenth_for_widths_at_which_attention_is_padded(rows, width) -> None:
    found = predicted_for_cuda("3B", rows, 8, length=width)
    assert found == pytest.approx(H200_WIDTHS[rows, width], rel=0.1)


@pytest.mark.parametrize(("size", "rows", "width", "operations"), H200_HOSTS)
def test_it_is_within_11_percent_of_what_fast_and_slow_hosts_took(
    size: str, rows: int, width: int, operations: int
) -> None:
    found = predicted_for_cuda(size, rows, operations, length=width)
    for taken in H200_HOSTS[size, rows, width, operations]:
        assert found == pytest.approx(taken, rel=0.11)


@pytest.mark.parametrize(("size", "operations"), H200_4_BITS)
def test_it_is_for_bases_of_4_bits_too(size: str, operations: int) -> None:
    found = predicted_for_cuda(size, 4, operations, bits=4.5)
    assert found == pytest.approx(H200_4_BITS[size, operations], rel=0.04)


TRAIN = """
import json, sys
from pathlib import Path
from nested_core import backend

backend.prepare()
import mlx.core as mx
from tests.example import FineTuneConfig, prepare, train

config = FineTuneConfig.model_validate(json.loads(sys.argv[2]))
run = prepare(config, Path(sys.argv[1]))
mx.reset_peak_memory()
done = train(config, run)
print(json.dumps([done.trainer.memory.needed, mx.get_peak_memory()]))
"""


@pytest.mark.slow("measures the memory of a larger model in a process of its own")
@pytest.mark.skipif(backend.device() != "cpu", reason="measured on CPUs")
def test_the_peak_of_a_quantised_model_of_many_words_is_what_was_forecast() -> None:
    number = [case.name for case in CASES].index("4 bits, a tenth learnt")
    command = [sys.executable, "-m", "benchmarks.forecast", str(number)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["forecast_bytes"] == pytest.approx(found["measured_bytes"], rel=0.1)


@pytest.mark.parametrize(
    "changes",
    slow_except([{}, {"grad_checkpoint": True}], reason="trains in a process of its own, 4 s"),
    ids=["plain", "recomputed"],
)
def test_the_examples_peak_is_what_was_forecast(tmp_path: Path, changes: dict[str, Any]) -> None:
    settings = example_settings(batch_size=40, iters=5, val_batches=1, **changes)
    command = [sys.executable, "-c", TRAIN, str(tmp_path / "run"), json.dumps(settings)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    needed, measured = json.loads(done.stdout.splitlines()[-1])
    assert 0.9 * measured < needed < 1.25 * measured
