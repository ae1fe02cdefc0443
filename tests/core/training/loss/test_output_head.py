"""The output layer computed apart: the same loss from the supervised positions alone, in chunks."""

from __future__ import annotations

import logging
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.tuner.trainer import default_loss

from nested_core import backend
from nested_core.data.batches import BatchOrder
from nested_core.models.parameters import reference_trainable_parameters
from nested_core.training.loss.cross_entropy import (
    SUPERVISED_LOSS,
    OutputHead,
    find_output_head,
    find_supervised_positions,
    make_chunked_cross_entropy,
)
from nested_core.training.loss.loss_interface import Loss, MicroBatch
from tests.architectures import (
    ARCHITECTURES,
    batch,
    build,
    compiled_as_written,
    largest_difference,
    outcome,
)
from tests.left_out import slow_except


def loss_of(model: nn.Module, chunk: int | None = None) -> Loss:
    head = find_output_head(model, reference_trainable_parameters(model))
    assert head is not None
    return make_chunked_cross_entropy(head, chunk)


@pytest.mark.parametrize(
    "name",
    slow_except(ARCHITECTURES, "llama", "qwen2", "gemma2", "phi3", reason="compiles kernels"),
)
def test_the_loss_at_supervised_positions_is_that_of_full_logits(name: str) -> None:
    model = build(name)
    expected, found = (outcome(model, r, batch()) for r in (SUPERVISED_LOSS, loss_of(model, 16)))
    assert found.loss == pytest.approx(expected.loss, rel=2e-6)
    assert found.count == expected.count == 44
    assert largest_difference(found.gradients, expected.gradients) < 2e-5


def test_a_quantised_base_and_head_give_the_loss_of_full_logits() -> None:
    model = build("llama", quantized=True)
    expected, found = (outcome(model, r, batch()) for r in (SUPERVISED_LOSS, loss_of(model)))
    assert found.loss == pytest.approx(expected.loss, rel=2e-6)
    assert largest_difference(found.gradients, expected.gradients) < 2e-5


@pytest.mark.parametrize("chunk", [1, 7, 16, 63, 64, 1000])
def test_the_loss_depends_on_the_chunks_within_rounding_only(chunk: int) -> None:
    model = build("llama")
    whole, found = (outcome(model, loss_of(model, rows), batch()) for rows in (None, chunk))
    assert found.loss == pytest.approx(whole.loss, rel=2e-6)
    assert largest_difference(found.gradients, whole.gradients) < 2e-5


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
def test_any_share_of_supervised_positions_gives_the_loss_of_full_logits(share: float) -> None:
    model = build("llama")
    given = batch(share=share)
    expected, found = (outcome(model, r, given) for r in (SUPERVISED_LOSS, loss_of(model)))
    assert found.count == expected.count == int(given[1].sum())
    assert found.loss == pytest.approx(expected.loss, rel=2e-6)
    if share > 0:
        assert largest_difference(found.gradients, expected.gradients) < 2e-5
    else:
        assert not any(g.any().item() for g in found.gradients.values())


def test_an_evaluation_gives_the_training_loss_to_the_bit() -> None:
    model = build("qwen2")
    found = outcome(model, loss_of(model, 16), batch())
    assert found.value == found.loss


@compiled_as_written
def test_the_loss_is_the_same_compiled_or_not_to_the_bit() -> None:
    model = build("llama")
    loss = loss_of(model, 16)
    compiled, plain = outcome(model, loss, batch()), outcome(model, loss, batch(), compiled=run)
    assert compiled.loss == plain.loss
    for name, gradient in plain.gradients.items():
        assert np.array(gradient).tobytes() == np.array(compiled.gradients[name]).tobytes()


def run(function: Any) -> Any:
    return function


@pytest.mark.parametrize(
    ("supervised", "expected"),
    [(0, 75), (1, 75), (75, 75), (76, 150), (150, 150), (151, 300), (300, 300)],
)
def test_positions_come_in_halves_of_all_of_them(supervised: int, expected: int) -> None:
    mask = np.zeros(300, np.bool_)
    mask[np.random.default_rng(0).permutation(300)[:supervised]] = True
    _, rows = find_supervised_positions((np.zeros((3, 101), np.int32), mask.reshape(3, 100)))
    assert rows.shape == (expected,)
    assert [row for row in rows.tolist() if row >= 0] == np.flatnonzero(mask).tolist()  # type: ignore[union-attr,operator]


@pytest.mark.parametrize(
    ("supervised", "expected"), [(80, 110), (110, 110), (111, 150), (200, 300)]
)
def test_batches_of_a_known_width_have_one_number_of_positions(supervised, expected) -> None:
    mask = np.zeros((3, 100), np.bool_)
    mask.reshape(-1)[:supervised] = True
    batch = np.zeros((3, 101), np.int32), mask
    assert find_supervised_positions(batch, {100: 110, 64: 70})[1].shape == (expected,)
    for nearly_all in (271, 900):
        assert find_supervised_positions(batch, {100: nearly_all})[1].shape == (300,)
    assert find_supervised_positions(batch, {64: 70})[1].shape != (110,)


def test_batches_of_mixed_lengths_have_the_loss_and_gradient_of_mlx_lm() -> None:
    model = build("llama")
    lengths = np.random.default_rng(0).lognormal(3, 0.6, 200).clip(4, 60).astype(np.int64)
    order = BatchOrder(lengths, 4, 0, max_seq_length=60)
    ours = loss_of(model).for_position_counts(order.largest_sums(lengths - 1))

    def of_mlx_lm(model: nn.Module, tokens: mx.array, ends: mx.array) -> tuple[mx.array, mx.array]:
        mean, count = default_loss(model, tokens, ends)
        return mean * count, count

    def first_and_last_targets(given: MicroBatch) -> tuple[mx.array, mx.array]:
        learnt = given[1].sum(axis=1)
        return mx.array(given[0]), mx.array(np.stack([np.zeros_like(learnt), learnt], axis=1))

    widths = set()
    for index in range(5):
        chosen = order.batch(index)
        mask = np.arange(chosen.width) < lengths[chosen.rows][:, None] - 1
        given = batch(rows=4, width=chosen.width)[0], mask
        widths.add(chosen.width)
        theirs = Loss(of_mlx_lm, prepare_batch=first_and_last_targets)
        expected, found = (outcome(model, each, given, compiled=run) for each in (theirs, ours))
        assert found.count == expected.count
        assert found.loss == pytest.approx(expected.loss, rel=2e-6)
        assert largest_difference(found.gradients, expected.gradients) < 3e-5
    assert len(widths) > (2 if backend.device() == "cpu" else 1)  # on CUDA fewer have a trace


def test_on_cuda_a_batch_is_as_wide_as_is_computed_fast_with_the_same_loss(monkeypatch) -> None:
    model = build("llama")
    refs = reference_trainable_parameters(model)
    for width in (31, 125):
        given = batch(rows=3, width=width)
        for loss in (SUPERVISED_LOSS, SUPERVISED_LOSS.for_model(model, refs)):
            expected = outcome(model, loss, given, compiled=run)
            with monkeypatch.context() as patch:
                patch.setattr(backend, "computes_on_cuda", lambda: True)
                tokens, _ = loss.prepare_batch(given)
                assert tokens.shape == (3, {31: 33, 125: 129}[width])
                found = outcome(model, loss, given, compiled=run)
            assert found.count == expected.count
            assert found.loss == pytest.approx(expected.loss, rel=2e-6)
            assert largest_difference(found.gradients, expected.gradients) < 3e-5


@pytest.mark.slow("compiles a dozen kernels anew")
@pytest.mark.skipif(backend.device() != "cpu", reason="looks at the kernels that g++ made")
@pytest.mark.skipif(not backend.can_compile_kernels(), reason="there is no g++")
def test_a_batch_of_another_width_compiles_no_kernel_of_its_own(tmp_path, monkeypatch) -> None:
    """MLX writes a number into the kernel that it compiles: seconds for each width on a GPU."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))  # where no kernel is from before
    model = nn.Sequential(nn.Embedding(96, 4), nn.Linear(4, 96, bias=False))
    loss = make_chunked_cross_entropy(OutputHead(model, model.layers[0]))
    evaluate = loss.compile_evaluation(model, lambda values: None)
    compiled = []
    for width in (100, 106, 112):
        tokens, rows = loss.prepare_batch(batch(rows=3, width=width, share=0.25))
        assert rows.size < 3 * width
        step = mx.compile(nn.value_and_grad(model, lambda *arrays: loss.function(model, *arrays)))
        mx.eval(step(tokens, rows), evaluate({}, tokens, rows))
        compiled.append(len(list(tmp_path.rglob("*.so"))))
    assert compiled == [max(compiled[0], 1)] * 3


def test_a_padded_position_with_an_infinite_loss_does_not_count() -> None:
    """Padding copies row 0, whose target may be a token that the model rules out."""
    model = build("qwen3")
    bias = mx.where(mx.arange(96) == 7, -mx.inf, 0.0)

    class Ruling(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def __call__(self, inputs: mx.array) -> mx.array:
            logits: mx.array = self.inner(inputs) + bias
            return logits

    ruling = Ruling()
    refs = reference_trainable_parameters(ruling)
    head = OutputHead(ruling, model.model)
    tokens, mask = batch(rows=2, width=40)
    tokens[tokens == 7] = 8
    tokens[0, 1], mask[0, 0] = 7, False
    found = outcome(ruling, make_chunked_cross_entropy(head), (tokens, mask), refs=refs)
    assert np.isfinite(found.loss)
    assert np.isfinite(found.value)
    assert all(np.isfinite(np.array(g)).all() for g in found.gradients.values())


def test_a_trained_output_layer_keeps_full_logits_and_the_log_says_so(caplog) -> None:
    model = build("qwen3", keys=["self_attn.q_proj", "lm_head"])
    with caplog.at_level(logging.INFO):
        assert (
            SUPERVISED_LOSS.for_model(model, reference_trainable_parameters(model))
            is SUPERVISED_LOSS
        )
    assert "The output layer is trained" in caplog.text


class MixedAfterwards(nn.Module):
    """Logits that depend on the other positions even after the body."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = build("llama")

    def __call__(self, inputs: mx.array) -> mx.array:
        logits: mx.array = self.inner(inputs)
        return logits + mx.cumsum(logits, axis=1)


def test_an_output_layer_that_mixes_positions_is_not_taken_for_one(caplog) -> None:
    model = MixedAfterwards()
    with caplog.at_level(logging.INFO):
        assert find_output_head(model, reference_trainable_parameters(model)) is None
    assert "could not be told apart" in caplog.text


def test_finding_the_head_leaves_the_model_as_it_was() -> None:
    model = build("gemma2", dropout=0.5)
    model.train()
    kinds = {name: type(module) for name, module in model.named_modules()}
    before = mx.random.state[0].tolist()  # type: ignore[index]
    assert find_output_head(model, reference_trainable_parameters(model)) is not None
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert model.training is True
    assert mx.random.state[0].tolist() == before  # type: ignore[index]


def peak_memory(loss: Loss, model: nn.Module, given: MicroBatch) -> float:
    mx.clear_cache()
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    outcome(model, loss, given)
    return float(mx.get_peak_memory() - before)


@pytest.mark.slow("measures the memory of 2,048 tokens, twice")
def test_128_supervised_of_2048_tokens_take_a_third_of_the_memory_of_mlx_lms_loss() -> None:
    model = build("llama", vocab_size=20_000)
    tokens, supervised = np.ones((4, 513), np.int32), np.zeros((4, 512), np.bool_)
    supervised[:, -32:] = True
    bounds = np.array([[481, 512]] * 4, np.int32)
    full = peak_memory(Loss(default_loss, is_mean=True), model, (tokens, bounds))
    ours = peak_memory(loss_of(model), model, (tokens, supervised))
    assert ours < full / 3
