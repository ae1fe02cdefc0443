"""lora_parameters with PEFT's alpha: the same training as with the scale that it means."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nested_core.config.loading import load_config, parse_config
from nested_core.config.sections import LoraParameters
from nested_core.errors import ConfigError


def scale_of(**lora: Any) -> float:
    return parse_config({"lora_parameters": lora}, source="a test").lora_parameters.scale


@pytest.mark.parametrize(
    ("lora", "scale"),
    [
        ({"rank": 8, "alpha": 16}, 2.0),
        ({"rank": 16, "alpha": 8.0}, 0.5),
        ({"alpha": 16}, 2.0),
        ({"rank": 16, "alpha": 8, "scale": None}, 0.5),
        ({"rank": 4, "alpha": None}, 20.0),
        ({"rank": 4, "alpha": None, "scale": 3.0}, 3.0),
        ({"rank": 4}, 20.0),
    ],
)
def test_alpha_becomes_the_scale(lora: dict[str, Any], scale: float) -> None:
    assert scale_of(**lora) == scale


def test_a_configuration_with_alpha_is_the_one_with_that_scale(tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text("lora_parameters: {rank: 8, alpha: 16, dropout: 0.1}\n")
    with_scale = {"rank": 8, "scale": 2.0, "dropout": 0.1}
    config = load_config(path, {})
    assert config == load_config(None, {"lora_parameters": with_scale})
    assert config.model_dump()["lora_parameters"] == with_scale | {"keys": None}


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"alpha": 16, "scale": 2.0}, "alpha and scale say the same thing (scale = alpha / rank)"),
        ({"alpha": "16"}, "alpha should be a finite number above 0; found '16'"),
        ({"alpha": True}, "alpha should be a finite number above 0; found True"),
        ({"alpha": float("nan")}, "alpha should be a finite number above 0; found nan"),
        ({"alpha": 0}, "alpha should be a finite number above 0; found 0"),
        ({"alpha": 10**400}, "alpha should be a finite number above 0; found 1000"),
        ({"alpha": 16, "rank": "8"}, "rank should be a whole number above 0; found '8'"),
        ({"alpha": 16, "rank": 0}, "rank should be a whole number above 0; found 0"),
        ({"alpha": 16, "rank": 2.5}, "lora_parameters.rank: Input should be a valid integer"),
    ],
)
def test_an_alpha_that_means_nothing_is_refused(lora: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as error:
        scale_of(**lora)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("file", "flags", "scale"),
    [
        ("alpha: 160", {"lora_parameters.scale": 2.0}, 2.0),
        ("scale: 20.0", {"lora_parameters.alpha": 16}, 2.0),
        ("alpha: 160", {"lora_parameters.rank": 32}, 5.0),
        ("scale: 20.0", {"lora_parameters.rank": 32}, 20.0),
    ],
)
def test_a_flag_for_one_wins_over_the_other_in_the_file(tmp_path, file, flags, scale) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text(f"lora_parameters: {{rank: 8, {file}}}\n")
    assert load_config(path, flags).lora_parameters.scale == scale


def test_two_flags_that_say_the_same_thing_are_refused() -> None:
    with pytest.raises(ConfigError, match="alpha and scale say the same thing"):
        load_config(None, {"lora_parameters.scale": 2.0, "lora_parameters.alpha": 16})


def test_a_form_made_from_the_schema_takes_alpha() -> None:
    schema = LoraParameters.model_json_schema()
    assert {"type": "number", "exclusiveMinimum": 0} in schema["properties"]["alpha"]["anyOf"]
    assert schema["additionalProperties"] is False
