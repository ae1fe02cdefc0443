"""What is said of keys that name no module; that training takes them is in test_training_lora."""

from __future__ import annotations

from typing import Any

import pytest
from mlx_lm.models import olmoe

from nested_core.errors import ConfigError
from nested_core.models.lora_attachment import attach_adapter
from tests.architectures import ARCHITECTURES, SIZES
from tests.example import example_config


def test_a_module_of_the_experts_is_suggested_for_its_last_name() -> None:
    sizes: dict[str, Any] = {"model_type": "olmoe"} | SIZES | ARCHITECTURES["olmoe"]
    model = olmoe.Model(olmoe.ModelArgs.from_dict(sizes))
    config = example_config(num_layers=2, lora_parameters={"keys": ["gate_proj"]})
    with pytest.raises(ConfigError) as refused:
        attach_adapter(model, config)
    message = str(refused.value)
    assert "No module is named gate_proj; did you mean mlp.switch_mlp.gate_proj?" in message
