"""The call of one module, or a name in a model's code, replaced and given back."""

from __future__ import annotations

import gc
import weakref
from types import ModuleType
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import llama
from mlx_lm.models.activations import swiglu as plain_swiglu

from nested_core.kernels.patching import replacing_call, replacing_function
from tests.architectures import build, leave_by_error


def test_one_module_answers_otherwise_and_the_others_of_its_class_as_before() -> None:
    module: Any = nn.Linear(2, 2)
    other = nn.Linear(2, 2)
    x = mx.ones((1, 2))
    before, weight = module(x), module.weight
    with replacing_call(module, lambda given, factor=1: given * factor):
        assert issubclass(type(module), nn.Linear)
        assert type(module).__name__ == "Linear"
        assert type(module).__module__ == nn.Linear.__module__
        assert module(x) is not x
        assert mx.array_equal(module(x, factor=3), 3 * x).item()
        assert type(other) is nn.Linear
        assert module.weight is weight
    assert type(module) is nn.Linear
    assert mx.array_equal(module(x), before).item()


def test_a_module_is_given_back_after_an_error_and_from_within_another_block() -> None:
    module = nn.Linear(2, 2)
    x = mx.ones((1, 2))

    def answers_otherwise() -> None:
        with replacing_call(module, lambda x: 3 * x):
            assert module(x).tolist() == [[3.0, 3.0]]
        assert module(x).tolist() == [[2.0, 2.0]]

    leave_by_error(replacing_call(module, lambda x: 2 * x), answers_otherwise)
    assert type(module) is nn.Linear


def test_what_answered_is_let_go_of_with_the_block() -> None:
    class Answer:
        """A call that holds something."""

        def __call__(self, x: mx.array) -> mx.array:
            return x

    answer = Answer()
    held = weakref.ref(answer)
    gc.disable()
    try:
        with replacing_call(nn.Linear(2, 2), answer):
            del answer
        assert held() is None
    finally:
        gc.enable()


def test_a_name_in_the_models_code_is_given_back_after_an_error() -> None:
    def ours(gate: mx.array, x: mx.array) -> mx.array:
        return gate

    def is_ours() -> None:
        assert llama.swiglu is ours

    leave_by_error(replacing_function(build("llama"), "swiglu", plain_swiglu, ours), is_ours)
    assert llama.swiglu is plain_swiglu


def test_code_that_a_model_brings_along_keeps_its_names_and_mlx_lms_is_changed() -> None:
    """mlx-lm runs a folder's own `model_file` without making it a module that can be imported."""
    own = ModuleType("own_code")
    source = "from mlx_lm.models.llama import MLP\nclass OwnMLP(MLP):\n    pass\nswiglu = None\n"
    exec(source, vars(own))  # noqa: S102 -- as mlx_lm.utils.load_model does
    model: Any = build("llama")
    model.layers[0].mlp.__class__ = own.OwnMLP
    with replacing_function(model, "swiglu", plain_swiglu, lambda gate, x: gate):
        assert llama.swiglu is not plain_swiglu
        assert own.swiglu is None
    assert llama.swiglu is plain_swiglu
