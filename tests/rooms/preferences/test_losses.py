"""The losses against formulas written out in float64, and against TRL's losses and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_unflatten

from nested_core.models.parameters import reference_trainable_parameters
from nested_core.rooms.preferences.loss_settings import SETTINGS_BY_LOSS
from nested_core.rooms.preferences.training_loss import (
    AnswerLikelihoods,
    PreferenceLoss,
    dpo_losses,
    orpo_losses,
    simpo_losses,
)
from nested_core.training.loss.cross_entropy import find_supervised_positions
from tests.rooms.preferences.tiny_llama import make_model

BY_TRL = np.load(Path(__file__).with_name("data") / "trl_losses.npz")
ARGUMENTS = {
    "dpo": {"beta": 0.3},
    "orpo": {"beta": 0.3},
    "simpo": {"beta": 0.3, "gamma": 0.6, "label_smoothing": 0.1},
}


def sigma(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_odds(mean: float) -> float:
    return mean - math.log(-math.expm1(mean))


def oracle(name: str, c: float, r: float, rc: float, rr: float, n: int, m: int) -> float:
    """One pair's loss: likelihoods c and r, the reference's rc and rr, n and m tokens."""
    if name == "dpo":
        h = 0.25 * ((c - rc) - (r - rr))
        return -0.875 * math.log(sigma(h)) - 0.125 * math.log(sigma(-h))
    if name == "simpo":
        h = 2.5 * (c / n - r / m) - 0.5
        return -0.875 * math.log(sigma(h)) - 0.125 * math.log(sigma(-h))
    return -c / n - 0.25 * math.log(sigma(log_odds(c / n) - log_odds(r / m)))


def oracle_slopes(name: str, c: float, r: float, rc: float, rr: float, n: int, m: int) -> Any:
    """The derivatives of `oracle` by c and r, by hand."""
    if name == "dpo":
        h = 0.25 * ((c - rc) - (r - rr))
        slope = 0.25 * (-0.875 * sigma(-h) + 0.125 * sigma(h))
        return slope, -slope
    if name == "simpo":
        h = 2.5 * (c / n - r / m) - 0.5
        slope = 2.5 * (-0.875 * sigma(-h) + 0.125 * sigma(h))
        return slope / n, -slope / m
    p, q = math.exp(c / n), math.exp(r / m)
    outer = -0.25 * sigma(-(log_odds(c / n) - log_odds(r / m)))
    return -1 / n + outer / (1 - p) / n, -outer / (1 - q) / m


def ours(name: str) -> Callable[..., Any]:
    """The formula with the oracle's arguments, of the same values as arrays."""

    def losses(c: Any, r: Any, rc: Any, rr: Any, n: Any, m: Any) -> Any:
        if name == "dpo":
            return dpo_losses(c, r, rc, rr, beta=0.25, label_smoothing=0.125)
        if name == "simpo":
            return simpo_losses(c, r, n, m, beta=2.5, gamma=0.5, label_smoothing=0.125)
        return orpo_losses(c, r, n, m, beta=0.25)

    return losses


def random_rows() -> list[np.ndarray[Any, Any]]:
    """Likelihoods of two answers and the reference's, and their tokens, of 200 pairs."""
    generator = np.random.default_rng(3)
    tokens = generator.integers(1, 30, (2, 200))
    values = -generator.gamma(2, 1, (4, 200)) * tokens[[0, 1, 0, 1]]
    return [*values, *tokens.astype(np.float64)]


def by_oracle(function: Callable[..., Any], name: str) -> np.ndarray[Any, Any]:
    pairs = np.array(random_rows()).T
    return np.array([function(name, *map(float, p[:4]), *map(int, p[4:])) for p in pairs])


@pytest.mark.parametrize("name", sorted(SETTINGS_BY_LOSS))
def test_a_loss_is_its_formula_in_float64(name: str) -> None:
    found = ours(name)(*random_rows())
    np.testing.assert_allclose(found, by_oracle(oracle, name), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", sorted(SETTINGS_BY_LOSS))
def test_a_gradient_is_that_of_the_formula(name: str) -> None:
    arrays = [mx.array(row.astype(np.float32)) for row in random_rows()]
    slopes = mx.grad(lambda *a: ours(name)(*a).sum(), argnums=(0, 1))(*arrays)
    expected = by_oracle(oracle_slopes, name)
    np.testing.assert_allclose(np.array(slopes).T, expected, rtol=2e-4, atol=2e-6)


def arrays_by_trl() -> tuple[mx.array, mx.array]:
    """Tokens and mask of both halves of the rows."""
    tokens, mask = BY_TRL["dpo/tokens"], BY_TRL["dpo/mask"]
    return mx.array(tokens.astype(np.int32)), mx.array(mask[:, 1:] > 0)


@pytest.mark.parametrize("has_head", [True, False], ids=["few logits", "all logits"])
@pytest.mark.parametrize("name", sorted(SETTINGS_BY_LOSS))
def test_loss_and_gradient_of_a_llama_are_trl_own(name: str, has_head: bool) -> None:
    tokens, mask = arrays_by_trl()
    _, rows = find_supervised_positions((np.array(tokens), np.array(mask)))
    policy, reference = make_model(1), make_model(2)
    if has_head:
        policy.lm_head.freeze()
    refs = reference_trainable_parameters(policy)
    likelihoods = AnswerLikelihoods.of_model(policy, refs)
    assert (likelihoods.chunked is not None) == has_head
    loss = PreferenceLoss(name, SETTINGS_BY_LOSS[name](**ARGUMENTS[name]))
    known = AnswerLikelihoods(None).compute(reference, tokens, mask, rows)

    def mean_loss(weights: dict[str, mx.array]) -> Any:
        policy.update(tree_unflatten(list(weights.items())))
        values = likelihoods.compute(policy, tokens, mask, rows)
        return loss.of_pairs(values, known, mask.sum(axis=1)).mean()

    weights = dict(tree_flatten(policy.trainable_parameters()))
    value, slopes = mx.value_and_grad(mean_loss)(weights)
    assert value.item() == pytest.approx(float(BY_TRL[f"{name}/loss"]), abs=1e-5)
    differences = [np.array(slope) - BY_TRL[f"{name}/gradient/{k}"] for k, slope in slopes.items()]
    norm = math.sqrt(sum(np.square(BY_TRL[f"{name}/gradient/{key}"]).sum() for key in slopes))
    assert math.sqrt(sum(np.square(one).sum() for one in differences)) <= 1e-4 * norm
