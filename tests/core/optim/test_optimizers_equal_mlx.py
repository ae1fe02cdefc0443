"""One tier of frequency 1: every weight and every moment is mlx.optimizers' own, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx import optimizers
from mlx.utils import tree_map

from nested_core import NestedAdam, NestedAdamW
from tests.core.optim.leaves import bits, step_of
from tests.left_out import slow_except

pytestmark = pytest.mark.slow("takes 200 steps by each optimizer, twice")

STEPS, COMPARED_EVERY = 200, 20
COMPILES = pytest.mark.slow("compiles each step that it compares")
PAIRS = {"Adam": (NestedAdam, optimizers.Adam), "AdamW": (NestedAdamW, optimizers.AdamW)}
SCHEDULES: dict[str, Callable[[], Any]] = {
    "constant": lambda: 3e-3,
    "cosine": lambda: optimizers.cosine_decay(1e-2, 150, 1e-4),
    "linear": lambda: optimizers.linear_schedule(0.0, 1e-2, 40),
    "step": lambda: optimizers.step_decay(1e-2, 0.7, 30),
    "exponential": lambda: optimizers.exponential_decay(1e-2, 0.98),
    "joined": lambda: optimizers.join_schedules(
        [optimizers.linear_schedule(0.0, 1e-2, 25), optimizers.cosine_decay(1e-2, 100)], [26]
    ),
    "python": lambda: lambda step: 0.01 / (1.0 + 0.1 * step),
}

Shapes = list[tuple[int, ...]]
shapes = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=3)
# Compiled, a leaf of one element takes kernels of its own: seconds of g++ on a Linux CPU.
arrays = st.lists(
    st.lists(st.integers(2, 5), min_size=1, max_size=3).map(tuple), min_size=1, max_size=3
)
seeds = st.integers(0, 2**31)


def draw(shapes: Shapes, seed: int, steps: int, dtype: mx.Dtype) -> Any:
    """A tree with an empty layer in it; each leaf holds `steps` random values of one shape."""
    random = np.random.default_rng(seed)
    scales = 10.0 ** random.uniform(-3, 2, len(shapes))
    first, *layers = (
        mx.array(random.normal(0, scale, (steps, *shape)), dtype)
        for shape, scale in zip(shapes, scales, strict=True)
    )
    return {"first": first, "layers": [{}, *({"w": leaf} for leaf in layers)]}


def run(optimizer: Any, shapes: Shapes, seed: int, dtype: mx.Dtype, *, compiled: bool) -> list[Any]:
    """Weights and state after each stretch of 200 steps on random gradients."""
    parameters = tree_map(lambda leaf: leaf[0], draw(shapes, seed, 1, dtype))
    gradients = draw(shapes, seed + 1, STEPS, dtype)
    optimizer.init(parameters)
    step = step_of(optimizer, compiled)
    seen = []
    for index in range(STEPS):
        parameters = step(tree_map(lambda leaf, at=index: leaf[at], gradients), parameters)
        if (index + 1) % COMPARED_EVERY == 0:
            seen.append((bits(parameters), bits(optimizer.state)))
    return seen


def assert_equal_runs(pair: str, options: dict[str, Any], *arguments: Any, **how: Any) -> None:
    ours, theirs = PAIRS[pair]
    found, expected = (run(each(**options), *arguments, **how) for each in (ours, theirs))
    for (weights, state), (mlx_weights, mlx_state) in zip(found, expected, strict=True):
        assert weights == mlx_weights
        assert {name: state[name] for name in mlx_state} == mlx_state
        assert {name.split(".")[0] for name in state.keys() - mlx_state.keys()} == {"nested"}


@pytest.mark.slow("hundreds of steps of MLX's optimizers")
@pytest.mark.parametrize(
    "schedule", slow_except(SCHEDULES, "constant", "cosine", reason="compares 200 steps, twice")
)
@pytest.mark.parametrize("pair", PAIRS)
@settings(max_examples=2)
@given(data=st.data())
def test_200_steps_equal_mlx_for_any_arguments(pair: str, schedule: str, data: Any) -> None:
    options = {
        "learning_rate": SCHEDULES[schedule](),
        "betas": data.draw(st.lists(st.floats(0, 0.9999), min_size=2, max_size=2), "betas"),
        "eps": data.draw(st.floats(1e-10, 1e-2), "eps"),
        "bias_correction": data.draw(st.booleans(), "bias_correction"),
    }
    if pair == "AdamW":
        options["weight_decay"] = data.draw(st.floats(0, 0.5), "weight_decay")
    dtype = data.draw(st.sampled_from([mx.float32, mx.bfloat16]), "dtype")
    drawn = data.draw(shapes, "shapes"), data.draw(seeds, "seed")
    assert_equal_runs(pair, options, *drawn, dtype, compiled=False)


@pytest.mark.parametrize(
    ("pair", "schedule", "bias_correction"),
    [
        ("Adam", "constant", False),
        pytest.param("AdamW", "cosine", False, marks=COMPILES),
        pytest.param("AdamW", "joined", True, marks=COMPILES),
    ],
)
@settings(max_examples=4)
@given(shapes=arrays, seed=seeds)
def test_200_compiled_steps_equal_mlx_compiled(
    pair: str, schedule: str, bias_correction: bool, shapes: Shapes, seed: int
) -> None:
    options = {"learning_rate": SCHEDULES[schedule](), "bias_correction": bias_correction}
    assert_equal_runs(pair, options, shapes, seed, mx.float32, compiled=True)


@pytest.mark.parametrize(
    "pair", slow_except(PAIRS, "AdamW", reason="compares 200 steps, compiled and not")
)
@settings(max_examples=4)
@given(shapes=arrays, seed=seeds)
def test_200_compiled_steps_equal_200_plain_ones(pair: str, shapes: Shapes, seed: int) -> None:
    compiled, plain = (
        run(PAIRS[pair][0](1e-2), shapes, seed, mx.float32, compiled=compiled)
        for compiled in (True, False)
    )
    assert compiled == plain


@pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)
def test_a_schedule_may_return_a_plain_number(ours: Any, theirs: Any) -> None:
    """mlx's own optimizers need an array there."""
    gradients, parameters = {"w": mx.array([0.5, -2.0])}, {"w": mx.array([1.0, 2.0])}
    found = ours(lambda step: 0.25)
    expected = theirs(lambda step: mx.array(0.25))
    assert bits(found.apply_gradients(gradients, parameters)) == bits(
        expected.apply_gradients(gradients, parameters)
    )
    assert found.learning_rate.item() == 0.25
