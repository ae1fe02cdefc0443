"""The base model, loaded and frozen, with LoRA attached: only adapter leaves are trainable."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from nested_core import backend
from nested_core.errors import ConfigError
from nested_core.models.base import find_model, weights_in

if TYPE_CHECKING:
    from nested_core.config.schema import FineTuneConfig

ADAPTER_MARKS = ("lora_a", "lora_b", "adapter")
DORA_MAGNITUDE = "m"


def is_adapter_parameter(name: str) -> bool:
    """Whether a dotted name is an adapter's: lora_a, lora_b, adapter in any case, or DoRA's m."""
    lowered = name.lower()
    marked = any(mark in lowered for mark in ADAPTER_MARKS)
    return marked or lowered.rsplit(".", 1)[-1] == DORA_MAGNITUDE


def find_base(config: FineTuneConfig) -> Path:
    """The folder of the base model that this process computes with; the backend is set for it."""
    folder = find_model(config.model)
    backend.choose_operations_per_commit(weights_in(folder))
    return folder


def load_base(config: FineTuneConfig, *, as_stored: bool = False) -> tuple[nn.Module, Any]:
    """Load model and tokenizer as mlx_lm.load does, at the configured precision or as stored."""
    from mlx_lm import load

    folder = find_base(config)
    try:
        model, tokenizer = load(
            str(folder),
            tokenizer_config={"trust_remote_code": config.trust_remote_code},
            trust_remote_code=config.trust_remote_code,
            lazy=True,
        )[:2]
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ConfigError(f"model: {folder} could not be loaded: {error}") from error
    dtype = compute_dtype(config)
    if dtype is not None and not as_stored:
        model.set_dtype(dtype)
    mx.eval(model.parameters())
    return model, tokenizer


def compute_dtype(config: FineTuneConfig) -> mx.Dtype | None:
    """The dtype of forward and backward pass; None keeps the model's own.

    `auto` is float32 on a CPU, where bfloat16 has no fast matmul, and the model's own elsewhere.
    """
    if config.training.reference is not None:
        return None
    if config.training.precision == "auto":
        return mx.float32 if backend.device() == "cpu" else None
    return mx.float32 if config.training.precision == "float32" else mx.bfloat16


def adapter_dtype(config: FineTuneConfig, model: nn.Module) -> mx.Dtype | None:
    """The dtype that the LoRA factors compute in; None is their own, float32.

    It is bfloat16 where the model's is: a float32 factor lifts every activation beside it. Not
    float16, whose range is too small for gradients, and not for DoRA, whose magnitudes are near 1.
    """
    if config.training.reference is not None or config.fine_tune_type != "lora":
        return None
    trained = trainable(model).keys()
    every: Any = tree_flatten(model.parameters())
    dtypes = Counter(
        value.dtype
        for name, value in every
        if name not in trained and mx.issubdtype(value.dtype, mx.floating)
    )
    is_bfloat16 = dtypes.most_common(1)[0][0] == mx.bfloat16
    return mx.bfloat16 if is_bfloat16 else None


def attach_adapter(model: nn.Module, config: FineTuneConfig) -> dict[str, mx.array]:
    """Freeze the model, inject a fresh adapter and return its leaves by dotted name.

    Under `full` there is nothing to inject: the last layers themselves are trained.
    The random state is seeded right before, so that a seed gives mlx_lm.lora's own initial weights.
    Raises ConfigError where nothing, what is quantised, or anything beside the adapter would train.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    layers = len(model.layers)
    if config.num_layers > layers:
        raise ConfigError(
            f"num_layers: {config.num_layers} layers are to be trained but the model has {layers}. "
            f"Give at most {layers}, or -1 for all."
        )
    mx.random.seed(config.seed)
    model.freeze()
    if config.fine_tune_type == "full":
        for layer in model.layers[-max(config.num_layers, 0) :]:
            layer.unfreeze()
        leaves = trainable(model)
        packed = [n for n, leaf in leaves.items() if not mx.issubdtype(leaf.dtype, mx.floating)]
        if packed:
            raise ConfigError(
                f"fine_tune_type: full: {len(packed)} weights to be trained are quantised, "
                f"{packed[0]} among them. Use lora or dora, or a base that is not quantised."
            )
        return leaves
    _warn_of_unmatched_keys(model, config)
    linear_to_lora_layers(
        model,
        config.num_layers,
        config.lora_parameters.model_dump(exclude_none=True),
        use_dora=config.fine_tune_type == "dora",
    )
    leaves = trainable(model)
    foreign = [name for name in leaves if not is_adapter_parameter(name)]
    if foreign or not leaves:
        raise ConfigError(
            f"lora_parameters: {len(leaves)} tensors would train, {foreign[:3]} of them outside "
            f"the adapter. Layers hold modules like {_module_names(model)[:3]}; name those in keys."
        )
    mx.eval(leaves)
    return leaves


def _module_names(model: nn.Module) -> list[str]:
    names = {name for layer in model.layers for name, _ in layer.named_modules() if name}
    return sorted(name for name in names if "." in name) or sorted(names)


def _warn_of_unmatched_keys(model: nn.Module, config: FineTuneConfig) -> None:
    known = {name for layer in model.layers for name, _ in layer.named_modules()}
    known |= {name for name, _ in model.named_modules()}
    unmatched = [key for key in config.lora_parameters.modules or () if key not in known]
    if unmatched:
        warnings.warn(
            f"lora_parameters.keys {unmatched} match no module of the model", stacklevel=3
        )


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """The trainable leaves of a model by dotted name, read from the model as it is now."""
    return dict(tree_flatten(model.trainable_parameters()))


def load_leaves(model: nn.Module, tensors: Mapping[str, mx.array]) -> None:
    """Put a whole set of adapter tensors into the model; every problem of names or shapes at once.

    The tensors keep the dtype of the leaves they replace. Raises ConfigError.
    """
    leaves = trainable(model)
    problems = [f"  {name}: missing" for name in leaves.keys() - tensors.keys()]
    problems += [f"  {name}: nothing that these settings train" for name in tensors.keys() - leaves]
    problems += [
        f"  {name}: shape {tensors[name].shape}, expected {leaf.shape}"
        for name, leaf in leaves.items()
        if name in tensors and tensors[name].shape != leaf.shape
    ]
    if problems:
        more = [f"  and {len(problems) - 10} more"] if len(problems) > 10 else []
        raise ConfigError(
            "The adapter's tensors do not fit the model and lora_parameters:\n"
            + "\n".join(sorted(problems)[:10] + more)
            + "\nSet num_layers, lora_parameters and fine_tune_type to what it was made with."
        )
    cast = [(name, tensors[name].astype(leaf.dtype)) for name, leaf in leaves.items()]
    model.update(tree_unflatten(cast))


def adapter_config(config: FineTuneConfig, fingerprint: str) -> dict[str, Any]:
    """What adapter_config.json holds: what mlx-lm's loader needs, and the base's fingerprint."""
    lora = config.lora_parameters.model_dump(mode="json", exclude_none=True)
    return {
        "model": config.model,
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": None if config.fine_tune_type == "full" else lora,
        "seed": config.seed,
        "base_fingerprint": fingerprint,
    }
