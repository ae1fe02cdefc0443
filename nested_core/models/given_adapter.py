"""The adapter that `resume_adapter_file` gives a run to start from: read strictly, and finite."""

from __future__ import annotations

import warnings
from contextlib import suppress
from pathlib import Path

import mlx.core as mx

from nested_core.errors import ConfigError, DamagedError
from nested_core.storage.adapter import CONFIG_NAME, WEIGHTS_NAME, read_adapter_config
from nested_core.storage.safetensors_files import load_arrays


def read_given_adapter(path: Path, base: str) -> dict[str, mx.array]:
    """The tensors of the file; a warning where they were made for another base than `base`.

    `base` is a fingerprint. mlx_lm.lora leaves none, and then nothing is said.
    """
    if not path.is_file():
        found = f"is a folder; give {path / WEIGHTS_NAME}" if path.is_dir() else "does not exist"
        raise ConfigError(
            f"resume_adapter_file: {path} {found}. Expected a safetensors file of an adapter."
        )
    arrays = load_arrays(path)
    broken = [name for name, array in arrays.items() if not mx.isfinite(array).all().item()]
    if broken:
        raise ConfigError(
            f"resume_adapter_file: {len(broken)} tensors of {path} hold NaN or infinity, "
            f"{broken[0]} among them. Nothing can be trained from there; give a sound adapter."
        )
    if _made_for(path.parent) not in (None, base):
        warnings.warn(
            f"resume_adapter_file: {path} was made for another base model, says {CONFIG_NAME} "
            f"beside it. Its tensors fit this one; what they learned may not.",
            stacklevel=2,
        )
    return arrays


def _made_for(folder: Path) -> str | None:
    with suppress(DamagedError):  # training takes nothing else from there
        base: str | None = read_adapter_config(folder / CONFIG_NAME).get("base_fingerprint")
        return base
    return None
