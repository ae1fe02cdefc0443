"""Names of an adapter's tensors in mlx-lm, such as `model.layers.0.mlp.up_proj.lora_a`."""

from __future__ import annotations

LORA_FACTORS = ("lora_a", "lora_b")
DORA_TENSORS = (*LORA_FACTORS, "m")  # with the magnitude of each row
FACTOR_DTYPES = ("F32", "F16", "BF16")


def module_name(tensor: str) -> str:
    """The module that a tensor of this dotted name belongs to; "" where the name has no dot."""
    return tensor.rpartition(".")[0]


def leaf_name(tensor: str) -> str:
    """The last part of a tensor's dotted name, which says what it is of its module."""
    return tensor.rpartition(".")[2]
