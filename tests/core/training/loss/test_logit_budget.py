"""The logits of a large vocabulary: few positions have theirs in memory at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from nested_core import backend
from nested_core.measure.answers.suite_answers import EncodedSuite
from nested_core.measure.losses.prediction_comparison import PredictionComparison
from nested_core.models.parameters import read_parameters, reference_trainable_parameters
from nested_core.training.evaluation import Evaluator
from nested_core.training.loss import logit_budget
from nested_core.training.loss.cross_entropy import SUPERVISED_LOSS, find_output_head
from nested_core.training.loss.loss_interface import MicroBatch
from tests.architectures import build
from tests.left_out import slow_except

WORDS = 50_000
ROWS, WIDTH = 24, 100  # 458 MiB of logits, of which a loss makes several arrays
Measure = Callable[[nn.Module, MicroBatch], Any]


@cache
def large_vocabulary() -> nn.Module:
    return build("llama", vocab_size=WORDS)


def make_batch(rows: int, width: int, words: int = WORDS) -> MicroBatch:
    random = np.random.default_rng(0)
    tokens = random.integers(0, words, (rows, width + 1)).astype(np.int32)
    return tokens, random.random((rows, width)) < 0.95


def compare(model: nn.Module, batch: MicroBatch, *, keeps_head: bool) -> Any:
    """Losses and divergences of two adapters, as the gate has them."""
    refs = reference_trainable_parameters(model)
    comparison = PredictionComparison.of_model(model, refs)
    assert comparison.head is not None
    if not keeps_head:
        comparison = PredictionComparison(model, refs, None)
    values = read_parameters(refs)
    moved = {name: 1.1 * value for name, value in values.items()}
    found = comparison.compare([values, moved], batch)
    return found.losses, found.divergences, found.tokens


def evaluate(model: nn.Module, batch: MicroBatch, *, keeps_head: bool) -> Any:
    """The mean loss and that of each row, as training evaluates."""
    refs = reference_trainable_parameters(model)
    loss = SUPERVISED_LOSS.for_model(model, refs) if keeps_head else SUPERVISED_LOSS
    assert loss.is_chunked is keeps_head
    found = Evaluator(model, refs, loss).evaluate(read_parameters(refs), [batch])
    return found.mean_loss, found.row_sums


def weigh_choices(model: nn.Module, batch: MicroBatch) -> Any:
    """The log-likelihood of one choice a row."""
    rows = [tuple(row) for row in batch[0].tolist()]
    encoded = EncodedSuite(
        SimpleNamespace(),  # type: ignore[arg-type]
        prompts=tuple(row[:-2] for row in rows),
        choices=tuple((row[-2:],) for row in rows),
        context=None,
    )
    return encoded.log_likelihoods(model)


WITH_HEAD: dict[str, Measure] = {
    "the gate's losses": partial(compare, keeps_head=True),
    "an evaluation": partial(evaluate, keeps_head=True),
}
OF_WHOLE_OUTPUT: dict[str, Measure] = {
    "the gate's losses": partial(compare, keeps_head=False),
    "an evaluation": partial(evaluate, keeps_head=False),
    "choices": weigh_choices,
}


def peak_bytes(measure: Measure, batch: MicroBatch) -> int:
    """The most memory beside the model while something is measured."""
    model = large_vocabulary()
    mx.clear_cache()
    mx.synchronize()
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    measure(model, batch)
    return int(mx.get_peak_memory() - before)


@pytest.mark.skipif(backend.device() != "cpu", reason="is bounded by a CPU's caches")
@pytest.mark.slow("computes 458 MiB of logits")
@pytest.mark.parametrize("name", WITH_HEAD)
def test_an_output_layer_apart_takes_less_than_the_budget_on_a_cpu(name: str) -> None:
    peak = peak_bytes(WITH_HEAD[name], make_batch(ROWS, WIDTH))
    assert peak < logit_budget.LOGIT_BYTES


@pytest.mark.parametrize(
    "name", slow_except(OF_WHOLE_OUTPUT, "choices", reason="computes 458 MiB of logits twice")
)
def test_a_model_that_computes_all_logits_gets_as_many_rows_as_the_budget_allows(name: str) -> None:
    peak = peak_bytes(OF_WHOLE_OUTPUT[name], make_batch(ROWS, WIDTH))
    assert peak < 2 * logit_budget.LOGIT_BYTES


CUT_POSITIONS = 1_000, 64, 48


def rounds_rows_alike(model: nn.Module) -> bool:
    """Whether the output layer's product of a row has the same bits in a chunk of any size.

    It has under OpenBLAS's kernels for SkylakeX and in MLX's own BLAS, not under those for Haswell
    and Zen.
    """
    head = find_output_head(model, reference_trainable_parameters(model))
    assert head is not None
    states = mx.random.normal((9 * 50, 64), key=mx.random.key(0))
    whole, *cut = (
        np.concatenate([np.array(head.logits(states[i : i + n])) for i in range(0, len(states), n)])
        for n in CUT_POSITIONS
    )
    return all(np.array_equal(whole, parts) for parts in cut)


@pytest.mark.parametrize("name", WITH_HEAD)
def test_positions_that_are_cut_after_the_body_give_the_bits_that_their_products_have(
    name, monkeypatch
) -> None:
    model, batch = build("llama", vocab_size=3_000), make_batch(9, 50, 3_000)
    found = []
    for positions in CUT_POSITIONS:
        monkeypatch.setattr(logit_budget, "MIN_POSITIONS_IN_CACHES", positions)
        monkeypatch.setattr(logit_budget, "LOGIT_BYTES_IN_CACHES", 0)
        found.append(WITH_HEAD[name](model, batch))
    # Losses of one token, and sums of 50 in float32, which differ by a part in 2**24 at least
    is_alike = backend.device() == "cpu" and rounds_rows_alike(model)  # a GPU's sums are not
    absolute, relative = (0.0, 0.0) if is_alike else (1e-5, 2.0**-22)
    for figures in zip(*found, strict=True):
        for other in figures[1:]:
            np.testing.assert_allclose(figures[0], other, rtol=relative, atol=absolute)


@pytest.mark.parametrize("name", OF_WHOLE_OUTPUT)
def test_fewer_rows_at_once_give_the_same_figures_within_rounding(name, monkeypatch) -> None:
    model, batch = build("llama", vocab_size=3_000), make_batch(9, 50, 3_000)
    whole = OF_WHOLE_OUTPUT[name](model, batch)
    monkeypatch.setattr(logit_budget, "LOGIT_BYTES", 4 * 3_000 * 128)
    parts = OF_WHOLE_OUTPUT[name](model, batch)
    for one, other in zip(whole, parts, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4)


def test_the_budget_is_one_of_bytes_of_all_models_together() -> None:
    assert logit_budget.positions_at_once(49_152) == 1_024
    assert logit_budget.positions_at_once(49_152, 2) == 512
    assert logit_budget.positions_at_once(2**30) == 1
