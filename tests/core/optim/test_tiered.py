"""Any optimizer of mlx in tiers: its own formula and state, our clock and guarantees around it."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx import optimizers
from mlx.utils import tree_flatten

from nested_core import TierStats
from nested_core.optim.tiered import Tiered

OPTIMIZERS = {
    "sgd": lambda: optimizers.SGD(1e-2, momentum=0.9),
    "muon": lambda: optimizers.Muon(1e-2),
    "adafactor": lambda: optimizers.Adafactor(1e-2),
}
by_name = pytest.mark.parametrize("name", OPTIMIZERS)


def values(seed: int) -> dict[str, Any]:
    """Random values of two parameters; the same for the same seed."""
    random = np.random.default_rng(seed)
    shapes = {"a": (3, 2), "b": (4,)}
    return {name: mx.array(random.normal(size=shape), mx.float32) for name, shape in shapes.items()}


def bits(tree: Any) -> dict[str, bytes]:
    """The bytes of every leaf."""
    return {name: np.array(leaf).tobytes() for name, leaf in dict(tree_flatten(tree)).items()}


def ready(name: str = "sgd", **options: Any) -> Tiered:
    """An optimizer that knows the parameters."""
    optimizer = Tiered(OPTIMIZERS[name], **options)
    optimizer.init(values(0))
    return optimizer


def refused(message: str) -> Any:
    """Expect a ValueError with these words in it."""
    return pytest.raises(ValueError, match=re.escape(message))


@pytest.mark.parametrize(
    ("name", "compiled"), [("sgd", False), ("muon", False), ("adafactor", False), ("sgd", True)]
)
def test_weights_and_state_are_the_inner_optimizers_own(name: str, compiled: bool) -> None:
    plain, optimizer = OPTIMIZERS[name](), ready(name)
    plain.init(values(0))
    found = expected = values(0)
    ours, theirs = optimizer.apply_gradients, plain.apply_gradients
    if compiled:
        ours = partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)(ours)
        theirs = partial(mx.compile, inputs=plain.state, outputs=plain.state)(theirs)
    for n in range(1, 11):
        found, expected = ours(values(n), found), theirs(values(n), expected)
    assert bits(found) == bits(expected)
    state = bits({key: leaf for key, leaf in optimizer.state.items() if key != "nested"})
    marks = {name for name in state if name.endswith(".had_gradient")}
    assert {key: value for key, value in state.items() if key not in marks} == bits(plain.state)
    assert marks == {"a.had_gradient", "b.had_gradient"}
    assert optimizer.get_tier_stats() == [TierStats(0, 1, 2, 10, 10, 0)]


@by_name
@pytest.mark.parametrize("value", [mx.nan, mx.inf])
def test_a_step_that_is_not_finite_changes_nothing_but_the_clock(name: str, value: float) -> None:
    optimizer = ready(name)
    before = optimizer.apply_gradients(values(1), values(0))
    moments = bits({key: optimizer.state[key] for key in before})
    after = optimizer.apply_gradients(values(2) | {"b": mx.full((4,), value)}, before)
    assert bits(after) == bits(before)
    assert bits({key: optimizer.state[key] for key in before}) == moments
    assert int(optimizer.state["step"].item()) == 2
    assert optimizer.get_tier_stats() == [TierStats(0, 1, 2, 10, 1, 1)]


def test_gradients_are_bounded_as_by_clip_grad_norm() -> None:
    optimizer, plain = ready(max_grad_norm=0.25), OPTIMIZERS["sgd"]()
    found = optimizer.apply_gradients(values(1), values(0))
    clipped, norm = optimizers.clip_grad_norm(values(1), 0.25)
    assert bits(found) == bits(plain.apply_gradients(clipped, values(0)))
    assert optimizer.state["nested"]["grad_norm"].item() == norm.item()


def test_a_norm_that_overflows_skips_the_step_where_it_would_clip() -> None:
    optimizer = ready(max_grad_norm=1.0)
    after = optimizer.apply_gradients(values(1) | {"b": mx.full((4,), 1e20)}, values(0))
    assert bits(after) == bits(values(0))
    assert optimizer.get_tier_stats()[0].skipped == 1


@by_name
def test_a_missing_gradient(name: str) -> None:
    with refused("1 gradients are missing, ['b'] among them"):
        ready(name).apply_gradients({"a": values(1)["a"]}, values(0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"c": mx.ones(1)}, "c: there is no such parameter"),
        ({"b": mx.ones((2, 2))}, "b: gradient shape (2, 2), parameter shape (4,)"),
        ({"b": mx.ones((4,), mx.bfloat16)}, "b: gradient dtype mlx.core.bfloat16, parameter"),
    ],
)
def test_a_gradient_that_fits_no_parameter(change: dict[str, Any], message: str) -> None:
    optimizer = ready()
    with refused(message):
        optimizer.apply_gradients(values(1) | change, values(0))
    assert int(optimizer.state["step"].item()) == 0


def test_the_pair_that_clip_grad_norm_returns() -> None:
    with refused("clip_grad_norm returns the pair (gradients, norm): pass its first element."):
        ready().apply_gradients(optimizers.clip_grad_norm(values(1), 1.0), values(0))


@pytest.mark.parametrize("bound", [-1.0, float("nan")])
def test_a_bound_that_bounds_nothing(bound: float) -> None:
    with refused(f"max_grad_norm should be >=0, {bound} was provided instead"):
        Tiered(OPTIMIZERS["sgd"], max_grad_norm=bound)
