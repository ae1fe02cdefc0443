"""Adapter directories in mlx-lm's format: adapters.safetensors beside adapter_config.json.

Tensors are read as raw bytes, eagerly, through the strict reader of safetensors: what is compared
and hashed is what is on disk, and MLX has no part in the reading. Only safetensors are opened.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, TensorSpec, deserialize, serialize_file

from nested_core.durable import canonical_json, write_json
from nested_core.errors import ConfigError, DamagedError

WEIGHTS_NAME = "adapters.safetensors"
CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1024 * 1024
NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U64": "<u8", "U32": "<u4", "BF16": "<u2"}
FLOATING = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Tensor:
    """One tensor as it stands in a safetensors file: dtype ("F32", "BF16" ...), shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def to_numpy(self) -> np.ndarray[Any, np.dtype[Any]]:
        """The values as a NumPy array; bfloat16 is widened to float32, which is exact."""
        stored = self._stored()
        if self.dtype != "BF16":
            return stored
        return (stored.astype(np.uint32) << 16).view(np.float32)

    def to_mlx(self) -> mx.array:
        """The same bytes as an MLX array of the same dtype."""
        if self.dtype == "F64":
            raise DamagedError("A tensor has dtype F64, which MLX would narrow to float32.")
        stored = mx.array(self._stored())
        return stored.view(mx.bfloat16) if self.dtype == "BF16" else stored

    def _stored(self) -> np.ndarray[Any, np.dtype[Any]]:
        if self.dtype not in NUMPY_DTYPES:
            raise DamagedError(f"A tensor has dtype {self.dtype}, which is not read here.")
        return np.frombuffer(self.data, NUMPY_DTYPES[self.dtype]).reshape(self.shape)


class _Lora(BaseModel):
    """The types that `lora_parameters` must have; other keys are another program's business."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    rank: int | None = None
    scale: float | None = None
    modules: list[str] | None = Field(default=None, alias="keys")


class _Meaning(BaseModel):
    """The types of what changes the model, in adapter_config.json."""

    model_config = ConfigDict(strict=True)
    fine_tune_type: str = "lora"
    num_layers: int | None = None
    model: str | None = None
    base_fingerprint: str | None = None
    lora_parameters: _Lora | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter directory read whole: where it is, its configuration and its tensors by name."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]

    def meaning(self) -> dict[str, Any]:
        """What the tensors stand for: the part of the configuration that changes the model."""
        lora = self.config.get("lora_parameters") or {}
        return {
            "fine_tune_type": self.config.get("fine_tune_type", "lora"),
            "rank": lora.get("rank"),
            "scale": None if lora.get("scale") is None else float(lora["scale"]),
            "keys": sorted(lora["keys"]) if lora.get("keys") else None,
            "num_layers": self.config.get("num_layers"),
            "base_fingerprint": self.config.get("base_fingerprint"),
        }

    def digest(self) -> str:
        """SHA-256 over the meaning, then names, dtypes, shapes and bytes in name order."""
        digest = hashlib.sha256(canonical_json(self.meaning()))
        for name, tensor in sorted(self.tensors.items()):
            digest.update(canonical_json([name, tensor.dtype, list(tensor.shape)]))
            digest.update(tensor.data)
        return digest.hexdigest()


def read_adapter(path: Path) -> Adapter:
    """Read an adapter directory.

    Raises ConfigError where there is no such directory, DamagedError where it is not a whole,
    well-formed adapter.
    """
    if not path.is_dir():
        raise ConfigError(
            f"{path} is not a directory. Expected an adapter directory with {WEIGHTS_NAME} and "
            f"{CONFIG_NAME}, as mlx_lm.lora or nested-tune writes it."
        )
    return Adapter(path, read_adapter_config(path / CONFIG_NAME), read_tensors(path / WEIGHTS_NAME))


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json: a JSON object of at most 1 MiB."""
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise DamagedError(f"{path} is larger than {MAX_CONFIG_BYTES} bytes.")
        config = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
        _Meaning.model_validate(config)
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing: without it the tensors mean nothing.") from None
    except IsADirectoryError:
        raise DamagedError(f"{path} is a directory, not an adapter configuration.") from None
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DamagedError(f"{path}: {where or 'the file'}: {error.errors()[0]['msg']}.") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is not valid JSON: {error}.") from error
    return dict(config)


def _refuse_constant(word: str) -> None:
    raise ValueError(f"{word} is not a JSON number")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file into memory, header checked by safetensors."""
    try:
        entries = deserialize(path.read_bytes())
    except FileNotFoundError:
        raise DamagedError(f"{path} is missing.") from None
    except IsADirectoryError:
        raise DamagedError(f"{path} is a directory, not a safetensors file.") from None
    except SafetensorError as error:
        raise DamagedError(f"{path} is not a sound safetensors file: {error}.") from error
    return {
        name: Tensor(str(entry["dtype"]), tuple(entry["shape"]), bytes(entry["data"]))
        for name, entry in entries
    }


def load_arrays(path: Path) -> dict[str, mx.array]:
    """Every tensor of a safetensors file as an MLX array, read now and through the strict reader.

    mx.load would be lazy (a file that changes later changes what was "read") and takes files that
    safetensors refuses.
    """
    return {name: tensor.to_mlx() for name, tensor in read_tensors(path).items()}


def save_arrays(path: Path, arrays: Mapping[str, mx.array], *, made_for: str = "mlx") -> None:
    """Write MLX arrays as a safetensors file; equal arrays give equal bytes.

    `made_for` is the format in the file's metadata, which transformers and its kin look at.

    mx.save_safetensors lays tensors out in the order of a hash table; safetensors itself sorts.
    """
    stored = {name: np.ascontiguousarray(_viewed(array)) for name, array in arrays.items()}
    specs = {
        name: TensorSpec(
            dtype=str(arrays[name].dtype).removeprefix("mlx.core."),
            shape=list(arrays[name].shape),
            data_ptr=values.ctypes.data,
            data_len=values.nbytes,
        )
        for name, values in stored.items()
    }
    serialize_file(specs, str(path), metadata={"format": made_for})


def _viewed(array: mx.array) -> mx.array:
    """NumPy has no bfloat16: its bytes go as uint16."""
    return array.view(mx.uint16) if array.dtype == mx.bfloat16 else array


def write_adapter(folder: Path, tensors: Mapping[str, mx.array], config: Mapping[str, Any]) -> None:
    """Write tensors and a configuration into `folder`, which a caller then publishes whole."""
    save_arrays(folder / WEIGHTS_NAME, tensors)
    write_json(folder / CONFIG_NAME, dict(sorted(config.items())))
