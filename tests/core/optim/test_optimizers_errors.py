"""What an optimizer refuses, each by its message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import pytest
from mlx import optimizers
from mlx.utils import tree_map

from nested_core import NestedAdam, NestedAdamW, Tier
from tests.core.optim.leaves import refused

both = pytest.mark.parametrize("make", [NestedAdam, NestedAdamW])
Make = Callable[..., Any]


def parameters() -> dict[str, Any]:
    return {"a": mx.ones((2,)), "layers": [{"w": mx.ones((3, 2))}, {"w": mx.ones((4,))}]}


def gradients() -> dict[str, Any]:
    ones: dict[str, Any] = tree_map(mx.ones_like, parameters())
    return ones


def ready(**options: Any) -> Any:
    """An optimizer that knows the parameters."""
    optimizer = NestedAdamW(1e-3, **options)
    optimizer.init(parameters())
    return optimizer


def test_the_pair_that_clip_grad_norm_returns() -> None:
    with refused(
        "Expected a tree of gradients, got a tuple. clip_grad_norm returns the pair (gradients, "
        "norm): pass its first element."
    ):
        ready().apply_gradients(optimizers.clip_grad_norm(gradients(), 1.0), parameters())


def test_a_missing_gradient() -> None:
    given = gradients()
    del given["a"]
    with refused("1 gradients are missing, ['a'] among them: gradients come for whole tiers"):
        ready().apply_gradients(given, parameters())


def test_a_part_of_a_tiers_gradients() -> None:
    clocks = [Tier(1, frozenset({"a", "layers.0.w"})), Tier(2)]
    with refused("1 gradients are missing, ['layers.0.w'] among them"):
        ready(tiers=clocks).apply_gradients({"a": mx.ones((2,))}, parameters())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"b": mx.ones(1)},
            "Gradients do not fit the parameters:\n  b: there is no such parameter",
        ),
        ({"a": mx.ones((2, 1))}, "a: gradient shape (2, 1), parameter shape (2,)"),
        (
            {"a": mx.ones((2,), mx.bfloat16)},
            "a: gradient dtype mlx.core.bfloat16, parameter dtype mlx.core.float32",
        ),
        ({"a": None}, "Gradients should be arrays: a is a NoneType."),
    ],
)
def test_a_gradient_that_does_not_fit(change: dict[str, Any], message: str) -> None:
    with refused(message):
        ready().apply_gradients(gradients() | change, parameters())


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"b": mx.ones(1)}, "b: the optimizer was not initialised with this parameter"),
        ({"a": mx.ones((5,))}, "a: shape (5,) now, (2,) when the optimizer was initialised"),
        (
            {"a": mx.ones((2,), mx.bfloat16)},
            "a: dtype mlx.core.bfloat16 now, mlx.core.float32 when the optimizer was initialised",
        ),
    ],
)
def test_a_parameter_that_is_not_as_it_was_at_init(other: dict[str, Any], message: str) -> None:
    optimizer = ready()
    optimizer.apply_gradients(gradients(), parameters())
    with refused(message):
        optimizer.apply_gradients(gradients() | other, parameters() | other)


def test_all_misfits_are_in_one_message() -> None:
    wrong = {"a": mx.ones((3,)), "b": mx.ones(1), "layers": [{"w": mx.ones((3, 2), mx.bfloat16)}]}
    with pytest.raises(ValueError, match="Gradients do not fit") as error:
        ready().apply_gradients(wrong, parameters())
    lines = str(error.value).splitlines()[1:]
    assert [line.split(":")[0].strip() for line in lines] == ["a", "b", "layers.0.w"]


def test_a_refused_step_changes_nothing() -> None:
    optimizer = ready()
    with refused("there is no such parameter"):
        optimizer.apply_gradients(gradients() | {"b": mx.ones(1)}, parameters())
    assert optimizer.step.item() == 0
    assert not optimizer.state["a"]["m"].any().item()


@both
def test_float16_parameters_at_init(make: Make) -> None:
    with refused(
        "Parameters ['b', 'a'] are float16: eps=1e-08 is 0 there, and a zero gradient gives NaN. "
        "Keep trainable parameters in float32 or bfloat16."
    ):
        make(1e-3).init({"b": mx.ones(1, mx.float16), "a": mx.ones(1, mx.float16)})


@both
@pytest.mark.parametrize("name", ["step", "learning_rate", "nested"])
def test_a_parameter_with_a_name_that_the_state_needs(make: Make, name: str) -> None:
    with refused(f"Parameters may not be named ['{name}.w']: the optimizer's state is."):
        make(1e-3).init({name: {"w": mx.ones(1)}})


def test_a_tier_that_names_an_unknown_parameter() -> None:
    with refused(
        "Tiers name 1 unknown parameters: ['layers.2.w']. The trainable ones look like "
        "['a', 'layers.0.w', 'layers.1.w']; call init with the whole trainable tree."
    ):
        ready(tiers=[Tier(1, frozenset({"layers.2.w"})), Tier(2)])


def test_a_name_in_two_tiers() -> None:
    clocks = [Tier(1, frozenset({"a"})), Tier(2), Tier(4, frozenset({"a", "layers.0.w"}))]
    with refused("a is in tier 0 and in tier 2."):
        ready(tiers=clocks)


@pytest.mark.parametrize("clocks", [[], [Tier(1), Tier(2)]])
def test_no_tier_and_two_tiers_for_all_the_rest(clocks: list[Tier]) -> None:
    with refused("Expected at least one tier, and at most one with names=None."):
        NestedAdamW(1e-3, tiers=clocks)


@pytest.mark.parametrize("slowest", [0, 1])
def test_parameters_that_no_tier_names_go_to_the_slowest_with_a_warning(slowest: int) -> None:
    clocks = [Tier(1, frozenset({"a"})), Tier(4, frozenset({"layers.0.w"}))]
    said = rf"^No tier names \['layers\.1\.w'\]: updated in tier {slowest}\.$"
    with pytest.warns(UserWarning, match=said) as caught:
        optimizer = ready(tiers=clocks if slowest == 1 else clocks[::-1])
    assert caught[0].filename == __file__
    expected = [1, 2] if slowest == 1 else [2, 1]
    assert [tier.tensors for tier in optimizer.get_tier_stats()] == expected


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        *(
            ({"frequency": each}, f"A tier's frequency is a whole number >= 1, got {each}.")
            for each in (0, -1, 1.5, NAN, INF)
        ),
        *(
            ({field: each}, f"A tier's {field} should be >=0, {each} was provided instead")
            for field in ("learning_rate_scale", "weight_decay")
            for each in (NAN, INF, -0.5)
        ),
        (
            {"frequency": 2, "names": "layers.0.w"},
            "A tier's names should be a set of names, got 'layers.0.w' alone.",
        ),
    ],
)
def test_a_tier_that_means_nothing(fields: dict[str, Any], message: str) -> None:
    with refused(message):
        Tier(**fields)


@both
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"slow_gradients": "acumulate"},
            'slow_gradients should be "skip" or "accumulate", got \'acumulate\'',
        ),
        ({"accumulate": "avg"}, 'accumulate should be "mean" or "sum", got \'avg\''),
        ({"betas": (1.0, 0.9)}, "Adam beta1 should be in [0, 1), 1.0 was provided instead"),
        ({"betas": (0.9, 1.2)}, "Adam beta2 should be in [0, 1), 1.2 was provided instead"),
        ({"betas": (-0.1, 0.9)}, "Adam beta1 should be in [0, 1), -0.1 was provided instead"),
        ({"betas": (0.9, NAN)}, "Adam beta2 should be in [0, 1), nan was provided instead"),
        ({"eps": -1e-8}, "Adam epsilon should be >=0, -1e-08 was provided instead"),
        ({"max_grad_norm": NAN}, "max_grad_norm should be >=0, nan was provided instead"),
        ({"max_grad_norm": INF}, "max_grad_norm should be >=0, inf was provided instead"),
        ({"max_grad_norm": -1}, "max_grad_norm should be >=0, -1 was provided instead"),
        ({"tiers": [1, 2, 4]}, "tiers should be Tier(frequency=...) records, got ['int']"),
    ],
)
def test_an_option_that_means_nothing(make: Make, options: dict[str, Any], message: str) -> None:
    with refused(message):
        make(1e-3, **options)


def test_weight_decay_a_tier_without_decay() -> None:
    with refused("A tier's weight_decay needs NestedAdamW; NestedAdam has no decay."):
        NestedAdam(1e-3, tiers=[Tier(1, frozenset({"a"})), Tier(2, weight_decay=0.1)])
