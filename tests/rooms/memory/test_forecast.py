"""The prediction of peak memory: its arithmetic, and what a run is advised to do."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import pytest

from nested_core import backend, seams
from nested_core.config.schema import FineTuneConfig
from nested_core.rooms.memory.forecast import (
    MemoryForecast,
    device_profile_for,
    limit_kept_buffers,
    plan_memory_for_device,
)
from nested_core.rooms.memory.peak_estimate import (
    CPU_PROFILE,
    DeviceProfile,
    LayerFootprint,
    ModelFootprint,
    bytes_in_flight,
    bytes_of_logits,
    bytes_of_padded_attention,
    cuda_profile,
    estimate_peak_bytes,
    fewest_recomputed_layers,
)
from nested_core.training.loss.loss_interface import BatchShape
from nested_core.training.memory_plan import MemoryPlan

# T = 6 tokens. A layer keeps 4 * (6 * (10 + 1 * 3) + 0.5 * 2 * 2 * 3 * 3) = 384 bytes, its input
# is 4 * 6 * 4 = 96, the loss takes (4 + 12) * 7 * 6 = 672.
PLAIN = DeviceProfile(
    score_share=0.5, mlp_arrays=1, layers_in_flight=1, logit_chunks=2, dequantized_weights=0
)
LAYER = LayerFootprint(width=4, kept=10, mlp_width=3, heads=2, is_trained=True)
SMALL = ModelFootprint(
    weights=1000,
    trained=40,
    moments=80,
    activation_bytes=4,
    layers=(LAYER, LAYER),
    vocabulary=7,
    chunk_rows=None,
)
BATCH = BatchShape(rows=2, length=3, target_tokens=6)
HELD = 1000 + 40 + 2 * 80

# A model of a usual kind, and a batch of it: 12 layers of 256.
MIDDLE = ModelFootprint(
    50_000_000,
    2_000_000,
    4_000_000,
    activation_bytes=4,
    layers=(LayerFootprint(256, 4200, 704, 4, is_trained=True),) * 12,
    vocabulary=4096,
    chunk_rows=16384,
)
WIDE = BatchShape(rows=8, length=256, target_tokens=2048)


def test_padded_attention_keeps_its_output_twice_and_what_is_padded() -> None:
    layer = replace(LAYER, attention=6, qkv=10)
    padding = replace(PLAIN, attention_multiple=4)
    half = replace(SMALL, activation_bytes=2)
    more = 2 * (2 * 3 * 6 + 2 * 1 * (6 + 10))  # 2 rows of 3 positions, padded to 4
    assert bytes_of_padded_attention(half, layer, BATCH, padding) == more
    whole = replace(BATCH, length=4)
    for footprint, batch in ((SMALL, BATCH), (half, whole)):  # float32; nothing to be padded
        assert bytes_of_padded_attention(footprint, layer, batch, padding) == 0
    both = replace(half, layers=(layer, layer))
    found, plain = (estimate_peak_bytes(both, BATCH, each) for each in (padding, PLAIN))
    assert found - plain == 2 * more  # in each layer that is kept, and not in what is in flight


def test_the_fewer_bytes_a_layer_keeps_the_fewer_are_in_flight() -> None:
    device = replace(
        PLAIN,
        layers_in_flight=20,
        min_layers_in_flight=4,
        bytes_of_busy_layer=1000,
        max_in_flight_ratio=2,
    )
    in_flight = [bytes_in_flight([kept] * 15, device) / kept for kept in (0.001, 500, 1000, 9000)]
    assert in_flight == pytest.approx([4, 12, 20, 20], rel=1e-3)
    assert bytes_in_flight([9000.0] * 3, device) == 6 * 9000  # at most so often as there are layers


def test_layers_in_flight_may_be_a_share_of_all_layers() -> None:
    device = replace(PLAIN, layers_in_flight=0.5, in_flight_are_shares=True)
    found = [bytes_in_flight([100.0] * layers, device) for layers in (8, 32)]
    assert found == [400, 1600]


def test_the_more_operations_a_commit_has_the_more_chunks_of_logits_exist_on_cuda() -> None:
    chunked = replace(SMALL, activation_bytes=2, vocabulary=1000, chunk_rows=64)
    many = BatchShape(rows=16, length=128, target_tokens=2048)  # 32 chunks
    chunks = [
        bytes_of_logits(chunked, many, cuda_profile(operations)) / (10 * 1000 * 64)
        for operations in (1, 8, 25, 200)
    ]
    assert chunks == pytest.approx([2, 3.6, 11.25, 32])


def test_the_peak_of_a_small_case_is_what_a_hand_computes() -> None:
    assert estimate_peak_bytes(SMALL, BATCH, PLAIN) == HELD + 2 * 384 + 672 + 384


def test_a_recomputed_layer_keeps_its_input_alone() -> None:
    wordy = replace(SMALL, vocabulary=70)
    assert estimate_peak_bytes(wordy, BATCH, PLAIN, 1) == HELD + 384 + 96 + 6720 + 384
    assert estimate_peak_bytes(wordy, BATCH, PLAIN, 2) == HELD + 2 * 96 + 6720 + 384


def test_where_the_loss_is_small_a_recomputed_layer_is_the_peak() -> None:
    tiny = replace(SMALL, vocabulary=1)
    assert estimate_peak_bytes(tiny, BATCH, PLAIN, 2) == int(HELD + 2 * 96 + 384 + 1.8 * 384)
    again = replace(PLAIN, recomputed_in_flight=3)
    assert estimate_peak_bytes(tiny, BATCH, again, 2) == int(HELD + 2 * 96 + (6 + 1.8) * 384)


def test_only_the_logits_that_are_asked_for_count_and_no_more_than_the_chunks_in_flight() -> None:
    many = BatchShape(rows=8, length=128, target_tokens=100)  # 128 positions are computed
    few = replace(SMALL, chunk_rows=32)
    whole = estimate_peak_bytes(SMALL, many, PLAIN) - 16 * 7 * 1024
    assert estimate_peak_bytes(replace(SMALL, chunk_rows=1024), many, PLAIN) == whole + 12 * 7 * 128
    assert estimate_peak_bytes(few, many, PLAIN) == whole + 12 * 7 * 2 * 32


def test_an_update_of_large_weights_is_the_peak_where_it_is_more() -> None:
    full = replace(SMALL, trained=10_000, moments=20_000, is_packed=False)
    assert estimate_peak_bytes(full, BATCH, PLAIN) == 1000 + 20_000 + 3 * 10_000 + 20_000


def test_layers_below_the_lowest_trained_one_keep_nothing() -> None:
    frozen = replace(LAYER, is_trained=False)
    below = replace(SMALL, layers=(frozen, frozen, LAYER, LAYER))
    between = replace(SMALL, layers=(LAYER, frozen))
    assert estimate_peak_bytes(below, BATCH, PLAIN) == estimate_peak_bytes(SMALL, BATCH, PLAIN)
    assert estimate_peak_bytes(between, BATCH, PLAIN) == estimate_peak_bytes(SMALL, BATCH, PLAIN)


@pytest.mark.parametrize("device", [CPU_PROFILE, cuda_profile(25)], ids=["cpu", "cuda"])
@pytest.mark.parametrize(
    "more",
    [
        {"batch": replace(WIDE, rows=16)},
        {"batch": replace(WIDE, length=512)},
        {"footprint": replace(MIDDLE, layers=MIDDLE.layers + MIDDLE.layers[:1])},
        {"footprint": replace(MIDDLE, vocabulary=8192)},
        {"footprint": replace(MIDDLE, weights=60_000_000)},
        {"footprint": replace(MIDDLE, activation_bytes=8)},
        {"batch": replace(WIDE, target_tokens=1024), "less": True},
    ],
    ids=["rows", "length", "layers", "vocabulary", "weights", "precision", "fewer targets"],
)
def test_more_of_anything_needs_more(device: DeviceProfile, more: dict[str, Any]) -> None:
    given: dict[str, Any] = {"footprint": MIDDLE, "batch": WIDE} | more
    is_less = given.pop("less", False)
    changed, before = (
        estimate_peak_bytes(**given, device=device),
        estimate_peak_bytes(MIDDLE, WIDE, device),
    )
    assert changed < before if is_less else changed > before


def test_each_layer_that_is_recomputed_needs_less() -> None:
    peaks = [estimate_peak_bytes(MIDDLE, WIDE, CPU_PROFILE, n) for n in range(13)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[12] < 0.5 * peaks[0]


def test_a_device_that_recomputes_products_keeps_less_of_bfloat16_and_of_nothing_else() -> None:
    layer = replace(LAYER, mlp_product=2)
    wide = replace(SMALL, layers=(layer, layer))
    half = replace(wide, activation_bytes=2)
    recomputing = replace(PLAIN, recomputes_mlp_product=True)
    one = 2 * 6 * 2  # bytes of the products of one layer
    assert (
        estimate_peak_bytes(half, BATCH, PLAIN) - estimate_peak_bytes(half, BATCH, recomputing)
        == 3 * one
    )
    assert estimate_peak_bytes(wide, BATCH, PLAIN) == estimate_peak_bytes(wide, BATCH, recomputing)


def test_the_largest_quantised_weight_counts_as_often_as_a_device_dequantizes_it() -> None:
    quantized = replace(SMALL, dequantized=500)
    assert estimate_peak_bytes(quantized, BATCH, PLAIN) == estimate_peak_bytes(SMALL, BATCH, PLAIN)
    twice = replace(PLAIN, dequantized_weights=2)
    assert (
        estimate_peak_bytes(quantized, BATCH, twice)
        == estimate_peak_bytes(SMALL, BATCH, PLAIN) + 2 * 500
    )


def test_a_device_that_runs_ahead_has_more_in_flight() -> None:
    ahead = replace(PLAIN, layers_in_flight=9)
    assert estimate_peak_bytes(SMALL, BATCH, ahead) == HELD + 2 * 384 + 672 + 2 * 384
    further = replace(ahead, max_in_flight_ratio=1.5)
    assert estimate_peak_bytes(SMALL, BATCH, further) == HELD + 2 * 384 + 672 + 3 * 384


REFERENCE: dict[str, Any] = {"training": {"reference": "mlx_lm"}}


@pytest.mark.parametrize("has_room", [True, False])
@pytest.mark.parametrize(("device", "has_cuda"), [("cpu", False), ("gpu", True), ("gpu", False)])
def test_what_our_kernels_alone_make_is_forecast_where_they_are_used(
    device: str, has_cuda: bool, has_room: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(seams, "is_there", lambda room: has_room)
    monkeypatch.setattr(backend, "device", lambda: device)
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: has_cuda)
    ours, theirs = (
        device_profile_for(FineTuneConfig.model_validate(changes)) for changes in ({}, REFERENCE)
    )
    assert ours.recomputes_mlp_product == (has_cuda and has_room)
    assert (ours.attention_multiple > 1) == (has_cuda and has_room)
    assert ours.dequantized_weights == (2 if has_cuda or device == "cpu" else 0)
    assert (theirs.recomputes_mlp_product, theirs.dequantized_weights) == (False, 0)
    assert theirs.score_share == (0 if has_cuda else 1)


@pytest.mark.parametrize(
    ("operations", "has_cuda", "limits"),
    [
        ("8", True, [500_000]),
        ("25", True, [500_000]),  # of 0.2e9 to 0.9e9 weights
        ("100", True, []),  # bounded when the model was loaded
        (None, True, []),  # a process that was not prepared
        ("8", False, []),
    ],
)
def test_freed_buffers_on_cuda_are_bounded_for_all_but_small_models(
    operations, has_cuda, limits, monkeypatch
) -> None:
    found: list[int] = []
    monkeypatch.setattr(mx, "set_cache_limit", found.append)
    monkeypatch.setattr(backend, "computes_on_cuda", lambda: has_cuda)
    monkeypatch.delenv(backend.OPERATIONS_PER_COMMIT_VARIABLE, raising=False)
    if operations:
        monkeypatch.setenv(backend.OPERATIONS_PER_COMMIT_VARIABLE, operations)
    limit_kept_buffers(MIDDLE, 61_000_000)
    assert found == limits


def planned(capacity: float, **changes: Any) -> MemoryForecast:
    config = FineTuneConfig.model_validate(changes)
    return plan_memory_for_device(config, MIDDLE, WIDE, CPU_PROFILE, int(capacity))


LIMITED: dict[str, Any] = {"grad_checkpoint": True, "training": {"memory_limit_gb": 1}}


def test_what_fits_is_said_in_one_line_without_advice() -> None:
    needed = estimate_peak_bytes(MIDDLE, WIDE, CPU_PROFILE)
    assert planned(16e9).describe() == f"memory: needs about {needed / 1e9:.2g} GB of 16.0 GB"


def test_what_does_not_fit_names_each_setting_that_would_with_its_own_figure() -> None:
    capacity = 0.5 * estimate_peak_bytes(MIDDLE, WIDE, CPU_PROFILE)
    found = planned(capacity)
    assert not found.fits
    shorter = estimate_peak_bytes(MIDDLE, BatchShape(8, 64, 512), CPU_PROFILE)
    assert dict(found.suggestions) == {
        "grad_checkpoint: true": estimate_peak_bytes(MIDDLE, WIDE, CPU_PROFILE, 12),
        "batch_size: 2": estimate_peak_bytes(MIDDLE, BatchShape(2, 256, 512), CPU_PROFILE),
        "max_seq_length: 64": shorter,
    }
    assert all(needed <= capacity for _, needed in found.suggestions)
    assert found.describe().endswith(f"or max_seq_length: 64 (about {shorter / 1e9:.2g} GB)")
    assert "; try grad_checkpoint: true (about " in found.describe()


def test_where_nothing_would_fit_the_least_there_is_is_named() -> None:
    text = planned(60e6).describe()
    least = estimate_peak_bytes(MIDDLE, BatchShape(1, 256, 256), CPU_PROFILE, 12) / 1e9
    both = "grad_checkpoint: true with batch_size: 1"
    assert text.endswith(f"; not even {both} (about {least:.2g} GB) would fit")


def test_under_a_limit_only_as_many_layers_are_recomputed_as_are_needed() -> None:
    capacity = 0.7 * estimate_peak_bytes(MIDDLE, WIDE, CPU_PROFILE)
    found = planned(capacity, **LIMITED)
    assert 0 < found.recomputed < 12
    assert found.fits
    assert estimate_peak_bytes(MIDDLE, WIDE, CPU_PROFILE, found.recomputed - 1) > capacity
    assert f", with {found.recomputed} of 12 layers recomputed" in found.describe()


def test_no_layer_is_recomputed_where_all_fits_and_all_are_where_nothing_does() -> None:
    assert planned(16e9, **LIMITED).recomputed == 0
    assert planned(1e6, **LIMITED).recomputed == 12
    assert fewest_recomputed_layers(MIDDLE, WIDE, CPU_PROFILE, 16e9) == 0


def test_without_a_limit_or_as_mlx_lm_does_every_layer_is_recomputed() -> None:
    assert planned(16e9, grad_checkpoint=True).recomputed == 12
    training = {"memory_limit_gb": 1, "reference": "mlx_lm"}
    assert planned(16e9, grad_checkpoint=True, training=training).recomputed == 12
    assert planned(16e9).recomputed == 0


def test_the_layers_recomputed_are_the_lowest_that_train() -> None:
    class Model:
        layers = tuple("abcdef")

    model: Any = Model()
    chosen = [MemoryPlan(1, 2, number, layers=4).layers_to_recompute(model) for number in (0, 2, 4)]
    assert list(map("".join, chosen)) == ["", "cd", "abcdef"]  # type: ignore[arg-type]
