"""Check whether an adapter fits what it is loaded into: its settings, tensors and base model.

Names and shapes of the tensors show rank, keys, layers and type. They do not show the scale and the
base: with another scale or base, the same tensors are another adapter.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from nested_core.errors import ConfigError, list_first
from nested_core.models.base_model import fingerprint_base_model, is_same_base, shorten_fingerprint
from nested_core.storage.adapter import Adapter
from nested_core.storage.safetensors_files import StoredTensor

MAX_SHOWN_PROBLEMS = 7  # with what is around them 14 lines of a terminal
# Two adapters must agree in these settings to be loaded into the same modules.
ADAPTER_STRUCTURE_KEYS = ("fine_tune_type", "rank", "scale", "keys", "num_layers")
Shaped = Mapping[str, StoredTensor] | Mapping[str, mx.array]


def describe_other_base(adapter_config: Mapping[str, object], base: Path) -> str | None:
    """Say that the model in folder `base` is not the one that adapter_config.json names.

    None if it is the same model, or if the configuration has no fingerprint, as mlx_lm.lora writes
    it.
    """
    recorded = adapter_config.get("base_fingerprint")
    if not isinstance(recorded, str) or is_same_base(recorded, base):
        return None
    present = shorten_fingerprint(fingerprint_base_model(base))
    return f"made for the base {shorten_fingerprint(recorded)}, and {base} holds {present}"


def find_differences(made_with: Adapter, used_with: Adapter) -> dict[str, str]:
    """Return the settings in which two adapters differ, by key, each as `scale: 2.0, now 4.0`."""
    old, new = made_with.meaning(), used_with.meaning()
    return {
        key: f"{key}: {old[key]}, now {new[key]}"
        for key in ADAPTER_STRUCTURE_KEYS
        if old[key] != new[key]
    }


def list_misfits(tensors: Shaped, parameters: Shaped) -> list[str]:
    """List the tensors whose names or shapes differ from the parameters that they would replace."""
    problems = [f"{name}: missing" for name in parameters.keys() - tensors.keys()]
    problems += [
        f"{name}: nothing that these settings train" for name in tensors.keys() - parameters.keys()
    ]
    problems += [
        f"{name}: shape {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in tensors and tuple(tensors[name].shape) != tuple(parameter.shape)
    ]
    return sorted(problems)


def require_fit(
    adapter: Adapter, what: str, config: dict[str, object], base: Path, parameters: Shaped
) -> None:
    """Raise ConfigError if an adapter's tensors would have another meaning than in its training.

    That is the case on another base, at another scale, or where names or shapes differ.

    Args:
        adapter: the adapter; settings that its adapter_config.json does not record are not
            compared.
        what: names the adapter, at the beginning of a sentence.
        config: the adapter_config.json of the model that its tensors are loaded into.
        base: the folder of that base model.
        parameters: the parameters that the tensors replace.
    """
    misfits = list_misfits(adapter.tensors, parameters)
    changes = find_differences(adapter, Adapter(adapter.path, config, {})) if adapter.config else {}
    # If all tensors fit, other layers and keys are only another spelling of the same modules.
    differing = [line for key, line in changes.items() if misfits or key == "scale"]
    if other_base := describe_other_base(adapter.config, base):
        differing.append(f"base_fingerprint: {other_base}")
    if not differing and not misfits:
        return
    lines = list_first([*differing, *misfits], MAX_SHOWN_PROBLEMS)
    raise ConfigError(
        f"{what} was trained with other settings, and its tensors would mean something else under "
        f"these:\n" + "\n".join(f"  {line}" for line in lines) + "\nKeep the settings and the base "
        "that it was made with, or train a new adapter."
    )


def require_recorded_settings(adapter: Adapter) -> None:
    """Raise ConfigError if adapter_config.json lacks settings that low-rank tensors depend on."""
    meaning = adapter.meaning()
    required_keys = [] if meaning["fine_tune_type"] == "full" else ["rank", "scale", "num_layers"]
    if missing := [key for key in required_keys if meaning[key] is None]:
        raise ConfigError(
            f"{adapter.path}: adapter_config.json does not say {' and '.join(missing)}, without "
            f"which its tensors have no meaning. Expected what mlx_lm.lora or nested-tune writes."
        )


def require_tensors_fit(tensors: Shaped, parameters: Shaped, advice: str) -> None:
    """Raise ConfigError, listing names and shapes, if tensors do not fit the parameters.

    `advice` ends the message.
    """
    if problems := list_misfits(tensors, parameters):
        lines = (f"  {line}" for line in list_first(problems, MAX_SHOWN_PROBLEMS))
        raise ConfigError(
            "The adapter's tensors do not fit the model and lora_parameters:\n"
            + "\n".join(lines)
            + f"\n{advice}"
        )
