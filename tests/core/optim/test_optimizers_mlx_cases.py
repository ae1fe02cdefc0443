"""mlx's own cases for Adam and AdamW, with ours in their place.

After python/tests/test_optimizers.py of github.com/ml-explore/mlx (copyright 2023 Apple Inc., MIT
licence), rewritten for pytest. Left out: the case that needs torch, those of other optimizers, and
those of steps and schedules that test_optimizers_equal_mlx.py compares with mlx bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import mlx.core as mx
import pytest
from mlx import nn, optimizers
from mlx.utils import tree_flatten, tree_map

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


def test_types_conserved(make: Make) -> None:
    params = {"w": mx.ones((5, 5), mx.float16)}
    assert make(0.1).apply_gradients(ones_like(params), params)["w"].dtype == mx.float16


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
