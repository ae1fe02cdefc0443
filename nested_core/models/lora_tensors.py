"""Names of an adapter's tensors in mlx-lm, such as `model.layers.0.mlp.up_proj.lora_a`."""

from __future__ import annotations

LORA_FACTORS = ("lora_a", "lora_b")
DORA_TENSORS = (*LORA_FACTORS, "m")  # m is the magnitude of each row
FACTOR_DTYPES = ("F32", "F16", "BF16")


def module_name(tensor: str) -> str:
    """Return the module of a tensor: "layers.0.q_proj.lora_a" gives "layers.0.q_proj".

    Empty if the name has no dot.
    """
    return tensor.rpartition(".")[0]


def leaf_name(tensor: str) -> str:
    """Return the last part of a tensor's dotted name: "layers.0.q_proj.lora_a" gives "lora_a"."""
    return tensor.rpartition(".")[2]
