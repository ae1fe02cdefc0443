"""A base whose weights lie on no quantiser's grid, and its adapter, which compute what they did.

The packages that we can have hold bases of 4 bits, whose weights four bits store again with little
loss. Here each channel between two matrices is scaled in one and scaled back in the other: after
RMSNorm, from `up_proj` to `down_proj`, from `v_proj` to `o_proj`. The embedding stays as it is.

    python -m benchmarks.real_model.off_grid BASE ADAPTER NEW_BASE NEW_ADAPTER
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nested_core.backend import prepare

prepare()

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402

SEED = 1
SPREAD = 0.3  # of the logarithm of a channel's scale
Floats = np.typing.NDArray[np.float32]


def scale_channels(
    base: dict[str, Any], adapter: dict[str, Any], config: dict[str, Any], draw: Callable[..., Any]
) -> None:
    """Scale the channels of all layers, in place; arrays are mlx's in float32, by name.

    A matrix of the base is (out, in), lora_a is (in, rank) and lora_b (rank, out).
    """
    repeats = config["num_attention_heads"] // config["num_key_value_heads"]

    def scale_inputs(module: str, scale: Floats) -> None:
        base[f"{module}.weight"] = base[f"{module}.weight"] * mx.array(scale)
        if (name := f"{module}.lora_a") in adapter:
            adapter[name] = adapter[name] * mx.array(scale)[:, None]

    def scale_outputs(module: str, scale: Floats) -> None:
        base[f"{module}.weight"] = base[f"{module}.weight"] * mx.array(scale)[:, None]
        if (name := f"{module}.bias") in base:
            base[name] = base[name] * mx.array(scale)
        if (name := f"{module}.lora_b") in adapter:
            adapter[name] = adapter[name] * mx.array(scale)

    for layer in range(config["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        for norm, modules in (
            ("input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")),
            ("post_attention_layernorm", ("mlp.gate_proj", "mlp.up_proj")),
        ):
            weight = f"{name}.{norm}.weight"
            scale = draw(base[weight].size)
            base[weight] = base[weight] / mx.array(scale)
            for module in modules:
                scale_inputs(f"{name}.{module}", scale)
        scale = draw(config["intermediate_size"])
        scale_outputs(f"{name}.mlp.up_proj", scale)
        scale_inputs(f"{name}.mlp.down_proj", 1 / scale)
        values = base[f"{name}.self_attn.v_proj.weight"].shape[0]
        scale = draw(values)
        scale_outputs(f"{name}.self_attn.v_proj", scale)
        heads = scale.reshape(config["num_key_value_heads"], -1)
        scale_inputs(f"{name}.self_attn.o_proj", 1 / np.repeat(heads, repeats, 0).ravel())


def main() -> None:
    """Write the new base, in float32, and the new adapter."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name in ("base", "adapter", "new_base", "new_adapter"):
        parser.add_argument(name, type=Path)
    given = parser.parse_args()
    shutil.copytree(given.base, given.new_base)
    given.new_adapter.mkdir(parents=True)
    loaded: Any = mx.load(str(given.base / "model.safetensors"))
    base = {name: array.astype(mx.float32) for name, array in loaded.items()}
    adapter: Any = mx.load(str(given.adapter / "adapters.safetensors"))
    config = json.loads((given.base / "config.json").read_text())
    dice = np.random.default_rng(SEED)
    scale_channels(
        base, adapter, config, lambda size: np.exp(dice.normal(0, SPREAD, size)).astype(np.float32)
    )
    new = str(given.new_base / "model.safetensors")
    mx.save_safetensors(new, base, metadata={"format": "mlx"})
    mx.save_safetensors(str(given.new_adapter / "adapters.safetensors"), adapter)
    settings = json.loads((given.adapter / "adapter_config.json").read_text())
    settings = {key: settings[key] for key in ("fine_tune_type", "num_layers", "lora_parameters")}
    settings["model"] = str(given.new_base)
    (given.new_adapter / "adapter_config.json").write_text(json.dumps(settings))


if __name__ == "__main__":
    main()
