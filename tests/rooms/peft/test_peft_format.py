"""Which modules PEFT adapts and how strongly, as its configuration says it."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from nested_core.rooms.peft.peft_format import PeftConfig
from tests.rooms.peft.make_golden import NAMES as GOLDEN_NAMES
from tests.rooms.peft.make_golden import TARGET_CASES, TARGETS

LINEARS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj")
NAMES = {f"model.layers.{layer}.{key}" for layer in range(12) for key in LINEARS} | {"lm_head"}


def config(**values: Any) -> PeftConfig:
    return PeftConfig.model_validate({"peft_type": "LORA", "r": 4, "lora_alpha": 8} | values)


def names(*endings: str, layers: Any = range(12)) -> set[str]:
    return {f"model.layers.{layer}.{ending}" for layer in layers for ending in endings}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"target_modules": ["q_proj"]}, names("self_attn.q_proj")),
        ({"target_modules": ["proj"]}, set()),
        ({"target_modules": ["self_attn.q_proj", "lm_head"]}, names(LINEARS[0]) | {"lm_head"}),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [1, 11]},
            names("self_attn.q_proj", layers=[1, 11]),
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": 1},
            names("self_attn.q_proj", layers=[1]),
        ),
        ({"target_modules": ["q_proj"], "layers_to_transform": []}, names("self_attn.q_proj")),
        (
            {
                "target_modules": ["q_proj"],
                "layers_to_transform": [2],
                "layers_pattern": ["h", "layers"],
            },
            names("self_attn.q_proj", layers=[2]),
        ),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "blocks"},
            set(),
        ),
        (
            {"target_modules": ["model.layers.3.mlp.up_proj"], "layers_to_transform": [2]},
            names("mlp.up_proj", layers=[3]),
        ),
        (
            {"target_modules": ["q_proj"], "exclude_modules": ["5.self_attn.q_proj"]},
            names("self_attn.q_proj") - names("self_attn.q_proj", layers=[5]),
        ),
    ],
)
def test_the_modules_that_are_named(values: dict[str, Any], expected: set[str]) -> None:
    assert config(**values).target_modules_of(NAMES) == expected


@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": ".*q_proj"},
        {"target_modules": "all-linear"},
        {},
        {"target_modules": ["q_proj"], "exclude_modules": "(a+)+"},
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": "(a+)+"},
    ],
)
def test_a_regular_expression_is_not_run(values: dict[str, Any]) -> None:
    assert config(**values).target_modules_of(NAMES) is None


def test_rank_stabilised_lora_divides_by_the_root_of_the_rank() -> None:
    assert config().scale == 8 / 4
    assert config(use_rslora=True).scale == 8 / math.sqrt(4)


def test_modules_are_those_of_peft_in_random_configurations() -> None:
    cases = json.loads(TARGETS.read_bytes())
    assert len(cases) == TARGET_CASES
    for case in cases:
        assert config(**case["config"]).target_modules_of(GOLDEN_NAMES) == set(case["targets"])
    assert sum(bool(case["targets"]) for case in cases) > 40
