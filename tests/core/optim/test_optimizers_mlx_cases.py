"""mlx's own cases for Adam and AdamW, with ours in their place.

After python/tests/test_optimizers.py of github.com/ml-explore/mlx (copyright 2023 Apple Inc., MIT
licence), rewritten for pytest. Left out: the case that needs torch, and those of other optimizers.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_map, tree_unflatten

from nested_core import NestedAdam, NestedAdamW

pytestmark = pytest.mark.parametrize("make", [NestedAdam, NestedAdamW])
Make = Callable[..., Any]
THEIRS: dict[Make, Make] = {NestedAdam: optimizers.Adam, NestedAdamW: optimizers.AdamW}


def zeros(dtype: mx.Dtype = mx.float32) -> dict[str, Any]:
    tree = {"first": [mx.zeros((10,)), mx.zeros((1,))], "second": mx.zeros((1,))}
    cast: dict[str, Any] = tree_map(lambda leaf: leaf.astype(dtype), tree)
    return cast


def ones_like(tree: Any) -> Any:
    return tree_map(mx.ones_like, tree)


def all_of(test: Callable[..., Any], *trees: Any) -> bool:
    answers: Any = tree_flatten(tree_map(test, *trees))
    return all(answer for _, answer in answers)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.l1 = nn.Linear(2, 2)
        self.drop = nn.Dropout(p=0.5)
        self.l2 = nn.Linear(2, 2)
        self.vals = [nn.Linear(2, 2), nn.ReLU(), nn.ReLU()]


def test_optimizer_state(make: Make) -> None:
    optimizer = make(0.1)
    optimizer.state["hello"] = "world"
    assert optimizer.state["hello"] == "world"
    optimizer.state = {0: 1}
    assert optimizer.state == {0: 1}


def test_optimizers(make: Make) -> None:
    params = zeros()
    update = make(0.1).apply_gradients(ones_like(params), params)
    assert all_of(lambda x, y: x.shape == y.shape, params, update)


def test_types_conserved(make: Make) -> None:
    params = {"w": mx.ones((5, 5), mx.float16)}
    assert make(0.1).apply_gradients(ones_like(params), params)["w"].dtype == mx.float16


def test_adam_explicit_init(make: Make) -> None:
    params = zeros()
    optimizer = make(learning_rate=1e-2)
    optimizer.init(params)
    for moment in ("m", "v"):
        is_zero = partial(lambda p, s, m: mx.array_equal(s[m], mx.zeros_like(p)), m=moment)
        assert all_of(is_zero, params, optimizer.state)


def test_adam_gradient_type_propagation(make: Make) -> None:
    params = zeros(mx.float16)
    updated = make(1e-2, bias_correction=True).apply_gradients(ones_like(params), params)
    assert all_of(lambda p: p.dtype == mx.float16, updated)


class TestCompiledOptimizer:
    """A plain step, and the same step compiled with the state passed in, and captured."""

    @pytest.fixture
    def case(self, make: Make) -> tuple[nn.Module, Any, mx.array, Any]:
        """A model, its first parameters, its input, and the parameters after a plain step."""
        model = nn.Linear(10, 10)
        x = mx.random.uniform(shape=(2, 10))
        start = model.parameters()
        optimizer = make(learning_rate=1e-2)
        _, grad = nn.value_and_grad(model, lambda model, x: model(x).sum())(model, x)
        optimizer.update(model, grad)
        plain = model.parameters()
        model.update(start)
        return model, start, x, plain

    def test_pure(self, make: Make, case: Any) -> None:
        model, start, x, plain = case
        optimizer = make(learning_rate=1e-2)

        def loss(params: Any, x: mx.array) -> mx.array:
            model.update(params)
            total: mx.array = model(x).sum()
            return total

        @mx.compile
        def step(params: Any, state: Any, x: mx.array) -> Any:
            grad = mx.grad(loss)(params, x)
            optimizer.state = state
            return optimizer.apply_gradients(grad, params), optimizer.state

        optimizer.init(start)
        params, _ = step(start, optimizer.state, x)
        assert mx.allclose(params["weight"], plain["weight"])
        assert mx.allclose(params["bias"], plain["bias"])

    def test_impure(self, make: Make, case: Any) -> None:
        model, _, x, plain = case
        optimizer = make(learning_rate=1e-2)
        state = [model.state, optimizer.state]

        @partial(mx.compile, inputs=state, outputs=state)
        def step(x: mx.array) -> None:
            _, grad = nn.value_and_grad(model, lambda model, x: model(x).sum())(model, x)
            optimizer.update(model, grad)

        step(x)
        params = model.parameters()
        assert mx.allclose(params["weight"], plain["weight"])
        assert mx.allclose(params["bias"], plain["bias"])


def test_update_lr_compiled(make: Make) -> None:
    """mlx's case is for SGD, which has no moments: those have to be captured as outputs too."""
    params = {"w": mx.ones((5, 5))}
    plain = THEIRS[make](-1.0)
    optimizer = make(-1.0)

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def update(grads: Any) -> Any:
        return optimizer.apply_gradients(grads, params)

    for rate in (-1.0, -2.0):
        plain.learning_rate = optimizer.learning_rate = rate
        expected = plain.apply_gradients(ones_like(params), params)["w"]
        assert mx.allclose(update(ones_like(params))["w"], expected)
    assert expected[0, 0].item() > 9.0


def test_decay_lr(make: Make) -> None:
    optimizer = make(learning_rate=optimizers.step_decay(1e-1, 0.9, 1))
    params = {"w": mx.ones((5, 5))}
    for it in range(10):
        optimizer.apply_gradients(ones_like(params), params)
        assert optimizer.learning_rate.item() == pytest.approx(0.1 * 0.9**it, abs=1e-7)


def test_linear_warmup_with_cosine_decay(make: Make) -> None:
    warmup = optimizers.linear_schedule(0.0, 1e-5, 100)
    cosine = optimizers.cosine_decay(1e-5, 100)
    optimizer = make(learning_rate=optimizers.join_schedules([warmup, cosine], [101]))
    for _ in range(101):  # a rate is read on the step before it is counted: steps 0 to 100
        optimizer.update(nn.Identity(), {})
    assert optimizer.learning_rate.item() == pytest.approx(1e-5, rel=1e-6)
    for _ in range(51):
        optimizer.update(nn.Identity(), {})
    assert optimizer.learning_rate.item() == pytest.approx(0.5e-5, rel=1e-6)


def test_compile_with_schedule(make: Make) -> None:
    schedule = optimizers.exponential_decay(1e-1, 0.9)
    optimizer = make(learning_rate=schedule)

    @partial(mx.compile, inputs=optimizer.state, outputs=optimizer.state)
    def update() -> None:
        optimizer.update(nn.Identity(), {})

    for step in range(5):
        update()
        assert optimizer.learning_rate.item() == pytest.approx(schedule(step), abs=1e-7)


def test_init_from_state(make: Make) -> None:
    model = Model()
    optimizer = make(learning_rate=3e-4)
    optimizer.init(model.trainable_parameters())
    state = tree_flatten(optimizer.state)
    optimizer = make(learning_rate=3e-4)
    optimizer.state = tree_unflatten(state)
    optimizer.update(model, model.trainable_parameters())


def test_multi_optimizer(make: Make) -> None:
    optimizer = optimizers.MultiOptimizer(
        [make(learning_rate=0.001), optimizers.SGD(learning_rate=0.1)],
        [lambda name, weight: weight.ndim > 1],
    )
    optimizer.init(Model().trainable_parameters())
    adam, sgd = (dict(tree_flatten(state)) for state in optimizer.state["states"])
    assert (len(sgd) - 2) * 2 == len(adam) - 2
    assert not any("bias" in name for name in adam)
    assert not any("weight" in name for name in sgd)


def test_multi_optimizer_with_parameterless_layers(make: Make) -> None:
    mx.random.seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    mx.eval(model.parameters())
    optimizer = optimizers.MultiOptimizer(
        [optimizers.Muon(learning_rate=0.01), make(learning_rate=0.01)], [lambda _, w: w.ndim >= 2]
    )
    _, grads = nn.value_and_grad(model, lambda m, x: m(x).sum())(model, mx.ones((1, 4)))
    optimizer.update(model, grads)
    w, b = model.layers[0].weight, model.layers[0].bias
    optimizer.update(model, grads)
    mx.eval(model.parameters())
    assert not mx.array_equal(w, model.layers[0].weight)
    assert not mx.array_equal(b, model.layers[0].bias)
