"""A Llama of 2 layers with the weights that benchmarks/preferences/trl_oracle.py gives TRL's."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.llama import Model, ModelArgs


def fill(name: str, shape: tuple[int, ...], seed: int) -> np.ndarray[Any, Any]:
    """The values of a weight, from its name, as the oracle's script makes them."""
    generator = np.random.default_rng([seed, *name.encode()])
    values = generator.normal(0, 0.5, shape)
    return (1 + 0.1 * values if len(shape) == 1 else values).astype(np.float32)


def make_model(seed: int) -> Model:
    """The model with weights of a seed: 1 is the policy, 2 the reference."""
    model = Model(
        ModelArgs(
            model_type="llama",
            hidden_size=8,
            num_hidden_layers=2,
            intermediate_size=16,
            num_attention_heads=2,
            num_key_value_heads=2,
            rms_norm_eps=1e-6,
            vocab_size=40,
            rope_theta=10000.0,
            tie_word_embeddings=False,
        )
    )
    weights = {
        name: mx.array(fill(name, tuple(value.shape), seed))
        for name, value in dict(tree_flatten(model.parameters())).items()
    }
    model.update(tree_unflatten(list(weights.items())))
    return model
