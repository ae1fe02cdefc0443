"""Attach LoRA to a base model, fresh or with given tensors, so that only the adapter trains."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from nested_core.errors import ConfigError, join_first_values
from nested_core.models.adapter_fit import require_recorded_settings, require_tensors_fit
from nested_core.models.parameters import trainable_parameters
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME, Adapter, read_adapter_config
from nested_core.storage.safetensors_files import read_tensors

if TYPE_CHECKING:
    from nested_core.config.schema import FineTuneConfig

ADAPTER_NAME_PARTS = ("lora_a", "lora_b", "adapter")
DORA_MAGNITUDE_NAME = "m"
MAX_SHOWN_MODULES = 10


def is_adapter_parameter(name: str) -> bool:
    """Whether a parameter belongs to an adapter, by its dotted name.

    The name contains lora_a, lora_b or adapter in any case, or ends with DoRA's magnitude "m".
    """
    lowered = name.lower()
    has_adapter_part = any(part in lowered for part in ADAPTER_NAME_PARTS)
    return has_adapter_part or lowered.rsplit(".", 1)[-1] == DORA_MAGNITUDE_NAME


def adapter_compute_dtype(config: FineTuneConfig, model: nn.Module) -> mx.Dtype | None:
    """Return the dtype in which the LoRA factors compute; None is their stored float32.

    It is bfloat16 if the model's is, because a float32 factor would turn every activation into
    float32. It is never float16, whose range is too small for gradients, nor bfloat16 for DoRA,
    whose magnitudes are near 1.
    """
    if config.training.reference is not None or config.fine_tune_type != "lora":
        return None
    trained = trainable_parameters(model).keys()
    parameters: Any = tree_flatten(model.parameters())
    dtypes = Counter(
        value.dtype
        for name, value in parameters
        if name not in trained and mx.issubdtype(value.dtype, mx.floating)
    )
    return mx.bfloat16 if dtypes.most_common(1)[0][0] == mx.bfloat16 else None


def attach_adapter(model: nn.Module, config: FineTuneConfig) -> dict[str, mx.array]:
    """Freeze the model, inject a fresh adapter and return its parameters by dotted name.

    Under `full` nothing is injected: the last layers themselves become trainable. The random state
    is seeded first, so that a seed gives the same initial weights as in mlx_lm.lora. Raises
    ConfigError if nothing would be trained, or if quantised tensors or tensors outside of the
    adapter would be.
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
        weights = trainable_parameters(model)
        quantised = [n for n, w in weights.items() if not mx.issubdtype(w.dtype, mx.floating)]
        if quantised:
            raise ConfigError(
                f"fine_tune_type: full: {len(quantised)} weights to be trained are quantised, "
                f"{quantised[0]} among them. Use lora or dora, or a base that is not quantised."
            )
        return weights
    # Before the injection, after which the names of the linear modules are others
    linear_names = _linear_module_names(model)
    names = {name for layer in model.layers for name, _ in layer.named_modules()}
    names |= {name for name, _ in model.named_modules()}
    # Configured keys that name no module
    unmatched = [key for key in config.lora_parameters.modules or () if key not in names]
    linear_to_lora_layers(
        model,
        config.num_layers,
        config.lora_parameters.model_dump(exclude_none=True),
        use_dora=config.fine_tune_type == "dora",
    )
    adapter = trainable_parameters(model)
    foreign = [name for name in adapter if not is_adapter_parameter(name)]
    if not adapter:
        suggestion = _suggest(unmatched, linear_names)
        raise ConfigError(f"lora_parameters.keys: nothing would be trained. {suggestion}")
    if foreign:
        raise ConfigError(
            f"lora_parameters.keys: {len(foreign)} tensors outside of the adapter would be "
            f"trained, {foreign[0]} among them. Name linear modules alone, such as "
            f"{join_first_values(linear_names, MAX_SHOWN_MODULES)}."
        )
    if unmatched:
        warnings.warn(f"lora_parameters.keys: {_suggest(unmatched, linear_names)}", stacklevel=2)
    mx.eval(adapter)
    return adapter


def _linear_module_names(model: nn.Module) -> list[str]:
    """Return the names of the linear modules in the model's layers, as `keys` takes them.

    Includes the switch layers of experts. Names are relative to the layer, such as
    "self_attn.q_proj".
    """
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    types = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    return sorted(
        {
            name
            for layer in model.layers
            for name, module in layer.named_modules()
            if isinstance(module, types)
        }
    )


def _suggest(unmatched: Sequence[str], names: Sequence[str]) -> str:
    """Say which keys name no module, and suggest a linear module's name for each."""
    sentences = []
    for key in unmatched:
        same_ending = [name for name in names if name.endswith(f".{key}")]
        suggestions = same_ending or difflib.get_close_matches(key, names, n=1)
        question = f"; did you mean {suggestions[0]}?" if suggestions else "."
        sentences.append(f"No module is named {key}{question}")
    shown = join_first_values(names, MAX_SHOWN_MODULES)
    return f"{' '.join(sentences)} Linear modules: {shown}.".strip()


def load_adapter_tensors(model: nn.Module, tensors: Mapping[str, mx.array]) -> None:
    """Replace all trainable parameters of the model by `tensors`, cast to the parameters' dtypes.

    Raises ConfigError, listing names and shapes, if they do not fit.
    """
    parameters = trainable_parameters(model)
    advice = "Set num_layers, lora_parameters and fine_tune_type to what it was made with."
    require_tensors_fit(tensors, parameters, advice)
    cast = [(name, tensors[name].astype(old.dtype)) for name, old in parameters.items()]
    model.update(tree_unflatten(cast))


@contextmanager
def leaving_out_idle_layers(model: nn.Module) -> Iterator[None]:
    """Compute a model without those LoRA layers that add zeros, during the block.

    A layer whose lora_b is zero, as in a fresh adapter, gives what its base layer gives. Without it
    an answer takes a third of the time on a GPU: each LoRA layer starts four kernels more.
    """
    from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear

    types = (LoRAEmbedding, LoRALinear, LoRASwitchLinear)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, types)}
    adds_some = {name: mx.any(layer.lora_b) for name, layer in layers.items()}
    mx.eval(adds_some)
    idle = [(name, layer) for name, layer in layers.items() if not adds_some[name].item()]
    bases = [(name, layer.get("linear") or layer.embedding) for name, layer in idle]
    model.update_modules(tree_unflatten(bases))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(idle))


def attach_stored_adapter(model: nn.Module, adapter: Adapter) -> None:
    """Attach an adapter that was read from disk to a base model, as mlx_lm.load does.

    LoRA layers are injected by the adapter's configuration, then its tensors are loaded into them;
    under `full` the tensors replace those of the base. Raises ConfigError if a name or a shape does
    not fit the base.
    """
    from mlx_lm.tuner.utils import linear_to_lora_layers

    require_recorded_settings(adapter)
    before: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    config = adapter.config
    fine_tune_type = config.get("fine_tune_type", "lora")
    if fine_tune_type != "full":
        lora, layers = config["lora_parameters"], int(config["num_layers"])
        linear_to_lora_layers(model, layers, lora, use_dora=fine_tune_type == "dora")
    fresh: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    # Parameters that the adapter must give, and those of the base that it gives as well
    added = set(filter(is_adapter_parameter, fresh.keys() - before.keys()))
    replaced = {name: fresh[name] for name in added | (adapter.tensors.keys() & fresh.keys())}
    require_tensors_fit(
        adapter.tensors, replaced, "Give the base and the settings that it was trained with."
    )
    model.load_weights(list(adapter.to_mlx().items()), strict=False)


def copy_with_adapter(base: nn.Module, adapter: Adapter) -> nn.Module:
    """Return a model with the arrays of `base`, in modules of its own, and an adapter attached.

    Raises ConfigError where the adapter does not fit the base.
    """
    leaves: Any = tree_flatten(base)
    arrays = (leaf for _, leaf in leaves if isinstance(leaf, mx.array))
    model: nn.Module = copy.deepcopy(base, {id(array): array for array in arrays})
    attach_stored_adapter(model, adapter)
    model.eval()
    return model


def make_adapter_config(config: FineTuneConfig, fingerprint: str) -> dict[str, object]:
    """Return the content of adapter_config.json: what mlx-lm's loader needs, and the fingerprint.

    `fingerprint` is the base model's.
    """
    lora = config.lora_parameters.model_dump(mode="json", exclude_none=True)
    return {
        "model": config.model,
        "fine_tune_type": config.fine_tune_type,
        "num_layers": config.num_layers,
        "lora_parameters": None if config.fine_tune_type == "full" else lora,
        "seed": config.seed,
        "base_fingerprint": fingerprint,
    }


def read_adapter_file(path: Path) -> Adapter:
    """Read the adapter of `resume_adapter_file` strictly; its tensors must be finite.

    Its configuration is read from adapter_config.json in the same folder, or empty without that
    file. Raises ConfigError if the file is missing or has non-finite values.
    """
    if not path.is_file():
        problem = f"is a folder; give {path / WEIGHTS_NAME}" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"resume_adapter_file: {path} {problem}. Expected a safetensors file of an adapter."
        )
    tensors = read_tensors(path, follow_links=True)
    broken = [name for name, one in tensors.items() if not mx.isfinite(one.to_mlx()).all().item()]
    if broken:
        raise ConfigError(
            f"resume_adapter_file: {len(broken)} of the tensors of {path} hold NaN or infinity, "
            f"{broken[0]} among them. Nothing can be trained from there. Give a sound adapter."
        )
    beside = path.parent / CONFIG_NAME
    config = read_adapter_config(beside, follow_links=True) if beside.is_file() else {}
    return Adapter(path, config, tensors)
