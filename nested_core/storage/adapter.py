"""Adapter directories in mlx-lm's format: adapters.safetensors beside adapter_config.json."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import mlx.core as mx
from pydantic import BaseModel, ConfigDict, Field

from nested_core.errors import ConfigError, DamagedError, naming_damaged_file
from nested_core.storage.atomic import canonical_json, digest_json, write_bytes, write_json
from nested_core.storage.output_places import (
    ADAPTER_PATH_KEY,
    find_recorded_path,
    require_free_place,
)
from nested_core.storage.safetensors_files import (
    StoredTensor,
    read_tensors_and_bytes,
    refuse_unsafe_format,
    save_arrays,
)
from nested_core.storage.untrusted_files import file_type, parse_json, read_regular, regular_sha256

WEIGHTS_NAME = "adapters.safetensors"
CONFIG_NAME = "adapter_config.json"
ADAPTER_FILES = (WEIGHTS_NAME, CONFIG_NAME)
MAX_CONFIG_BYTES = 1024 * 1024
Name = Annotated[str, Field(min_length=1, max_length=512)]


class _LoraParameters(BaseModel):
    """The checked keys of `lora_parameters` in adapter_config.json; other keys are ignored."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    rank: Annotated[int, Field(ge=1, le=65_536)] | None = None
    scale: Annotated[float, Field(gt=0, le=1e6)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    modules: Annotated[list[Name], Field(max_length=4096)] | None = Field(None, alias="keys")


class _DigestedConfig(BaseModel):
    """The keys of adapter_config.json that change the model, and their allowed values."""

    model_config = ConfigDict(strict=True)
    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    num_layers: Annotated[int, Field(ge=-1, le=65_536)] | None = None
    model: Annotated[str, Field(max_length=4096)] | None = None
    base_fingerprint: Annotated[str, Field(max_length=256)] | None = None
    lora_parameters: _LoraParameters | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter directory in memory.

    path: the directory it was read from.
    config: the content of adapter_config.json.
    tensors: the tensors of adapters.safetensors by name.
    files: the bytes of the two files by name; the tensors are views of them.
    """

    path: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    files: Mapping[str, bytes | memoryview] = field(default_factory=dict, repr=False, compare=False)
    # Not functools.cached_property: in Python 3.11 it has one lock for all, and two are hashed.
    _digests: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    def meaning(self) -> dict[str, Any]:
        """Return the part of the configuration that changes what the tensors do to the model."""
        lora = self.config.get("lora_parameters") or {}
        return {
            "fine_tune_type": self.config.get("fine_tune_type", "lora"),
            "rank": lora.get("rank"),
            "scale": None if lora.get("scale") is None else float(lora["scale"]),
            "keys": sorted(lora["keys"]) if lora.get("keys") else None,
            "num_layers": self.config.get("num_layers"),
            "base_fingerprint": self.config.get("base_fingerprint"),
        }

    @property
    def base_model(self) -> str:
        """The base that the configuration names, found as `find_recorded_path` does."""
        return find_recorded_path(str(self.config.get("model")), self.path)

    def to_mlx(self) -> dict[str, mx.array]:
        """Convert the tensors to MLX arrays, by name."""
        return {name: tensor.to_mlx() for name, tensor in self.tensors.items()}

    def digest(self) -> str:
        """Return the SHA-256 over configuration and tensors, which identifies the adapter.

        It covers `meaning()`, then names, dtypes, shapes and bytes in name order, not the file's
        layout. It is computed once.
        """
        if not self._digests:
            digest = hashlib.sha256(canonical_json(self.meaning()))
            for name, tensor in sorted(self.tensors.items()):
                digest.update(canonical_json([name, tensor.dtype, list(tensor.shape)]))
                digest.update(tensor.data)
            self._digests.append(digest.hexdigest())
        return self._digests[0]


def read_adapter(path: Path, *, follow_links: bool = False) -> Adapter:
    """Read an adapter directory into memory and check its form.

    follow_links: allow its files to be symbolic links.

    Raises ConfigError if `path` is not a directory, DamagedError if it is not a complete,
    well-formed adapter.
    """
    require_adapter_directory(path)
    if file_type(path / WEIGHTS_NAME, follow_links=True) == "missing":
        for other in sorted(path.iterdir()):
            refuse_unsafe_format(other)
    written = read_regular(path / CONFIG_NAME, MAX_CONFIG_BYTES, follow_links=follow_links)
    config = _parse_adapter_config(written, path / CONFIG_NAME)
    tensors, content = read_tensors_and_bytes(path / WEIGHTS_NAME, follow_links=follow_links)
    return Adapter(path, config, tensors, {WEIGHTS_NAME: content, CONFIG_NAME: written})


def require_adapter_directory(path: Path) -> None:
    """Raise ConfigError if `path` is no directory, DamagedError for a file of an unsafe format."""
    if file_type(path, follow_links=True) != "directory":
        refuse_unsafe_format(path)
        raise ConfigError(
            f"{str(path):.300} is not a directory. Expected an adapter directory with "
            f"{WEIGHTS_NAME} and {CONFIG_NAME}, as mlx_lm.lora or nested-tune writes it."
        )


def files_sha256(folder: Path) -> str:
    """Hash an adapter's two files as they are, whatever they mean, by mlx-lm's or PEFT's names."""
    files = [folder / CONFIG_NAME, *folder.glob("adapter*.safetensors")]
    return digest_json({path.name: regular_sha256(path) for path in files})


def read_adapter_config(path: Path, *, follow_links: bool = False) -> dict[str, Any]:
    """Read and check adapter_config.json; DamagedError if it is not valid.

    It may have at most 1 MiB and no key twice, and its numbers must be within bounds.
    """
    content = read_regular(path, MAX_CONFIG_BYTES, follow_links=follow_links)
    return _parse_adapter_config(content, path)


def _parse_adapter_config(content: bytes, path: Path) -> dict[str, object]:
    """Parse and check the bytes of adapter_config.json; DamagedError if they are not valid."""
    try:
        config = parse_json(content)
    except ValueError as error:
        raise DamagedError(f"{path} is not valid JSON: {error}.") from error
    with naming_damaged_file(path):
        _DigestedConfig.model_validate(config)
    return dict(config)


def write_adapter(folder: Path, tensors: Mapping[str, mx.array], config: dict[str, object]) -> None:
    """Write tensors and configuration into an existing folder, which the caller then publishes."""
    save_arrays(folder / WEIGHTS_NAME, tensors)
    write_json(folder / CONFIG_NAME, dict(sorted(config.items())))


def make_adapter_folder(adapter_path: Path) -> None:
    """Create the folder of `adapter_path` before training, so that an unusable path is found early.

    Raises OSError if it cannot be created or written. `require_adapter_place` has checked its
    content.
    """
    adapter_path.mkdir(parents=True, exist_ok=True)
    if not os.access(adapter_path, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(adapter_path))


def export_snapshot(source: Path, adapter_path: str, run_dir: Path, iteration: int) -> None:
    """Copy an adapter as mlx_lm.lora does: as the current one and under its iteration's number.

    source: the adapter's folder. run_dir: the run that may be written to.
    """
    folder = export_adapter(source, adapter_path, run_dir)
    write_bytes(folder / f"{iteration:07d}_{WEIGHTS_NAME}", read_regular(source / WEIGHTS_NAME))


def export_adapter(source: Path, adapter_path: str, run_dir: Path) -> Path:
    """Copy a run's adapter to `adapter_path`; return the resolved folder.

    source: the adapter's folder. run_dir: the run that may be written to.

    Raises ConfigError if the path leads into a registry, another run or a model.
    """
    folder = require_free_place(adapter_path, ADAPTER_PATH_KEY, own_run=run_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (WEIGHTS_NAME, CONFIG_NAME):
        write_bytes(folder / name, read_regular(source / name))
    return folder
