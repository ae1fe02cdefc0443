"""Adapter directories in mlx-lm's format: adapters.safetensors beside adapter_config.json.

Tensors are read as raw bytes, eagerly and after strict checks: what is compared and hashed is what
is on disk, and MLX has no part in the reading. Only safetensors are opened; formats that can run
code or that nothing checks (.pt, .bin, .npz, .pkl) are refused by name.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import mlx.core as mx
import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, TensorSpec, serialize_file

from nested_core.errors import ConfigError, DamagedError
from nested_core.storage.atomic import canonical_json, write_json
from nested_core.storage.file_types import kind_of
from nested_core.storage.safetensors_header import read_header
from nested_core.storage.strict_files import open_regular, read_json, read_start, regular_sha256

WEIGHTS_NAME = "adapters.safetensors"
CONFIG_NAME = "adapter_config.json"
MAX_CONFIG_BYTES = 1024 * 1024
NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "U64": "<u8", "U32": "<u4", "BF16": "<u2"}
FLOATING = ("F64", "F32", "F16", "BF16")
Name = Annotated[str, Field(min_length=1, max_length=512)]
UNSAFE = {
    **dict.fromkeys((".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"), "a pickle runs code"),
    **dict.fromkeys(
        (".npz", ".npy"), "NumPy's formats may hold pickles, and have no checked header"
    ),
}


@dataclass(frozen=True)
class Tensor:
    """One tensor as it stands in a safetensors file: dtype ("F32", "BF16" ...), shape and bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

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
        values = np.frombuffer(self.data, NUMPY_DTYPES[self.dtype]).reshape(self.shape)
        return values if values.flags.aligned else values.copy()


class _Lora(BaseModel):
    """What `lora_parameters` must look like; other keys are another program's business."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    rank: Annotated[int, Field(ge=1, le=65_536)] | None = None
    scale: Annotated[float, Field(gt=0, le=1e6)] | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = None
    modules: Annotated[list[Name], Field(max_length=4096)] | None = Field(None, alias="keys")


class _Meaning(BaseModel):
    """What changes the model, in adapter_config.json, and the bounds that it must keep to."""

    model_config = ConfigDict(strict=True)
    fine_tune_type: Literal["lora", "dora", "full"] = "lora"
    num_layers: Annotated[int, Field(ge=-1, le=65_536)] | None = None
    model: Annotated[str, Field(max_length=4096)] | None = None
    base_fingerprint: Annotated[str, Field(max_length=256)] | None = None
    lora_parameters: _Lora | None = None


@dataclass(frozen=True)
class Adapter:
    """An adapter directory read whole: where it is, its configuration and its tensors by name."""

    path: Path
    config: dict[str, Any]
    tensors: dict[str, Tensor]
    # Not functools.cached_property: in Python 3.11 it has one lock for all, and two are hashed.
    _digests: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

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
        """SHA-256 over the meaning, then names, dtypes, shapes and bytes in name order; kept."""
        if not self._digests:
            self._digests.append(self._hashed())
        return self._digests[0]

    def _hashed(self) -> str:
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
    if kind_of(path, follow_links=True) != "directory":
        refuse_unsafe_format(path)
        raise ConfigError(
            f"{str(path):.300} is not a directory. Expected an adapter directory with "
            f"{WEIGHTS_NAME} and {CONFIG_NAME}, as mlx_lm.lora or nested-tune writes it."
        )
    if kind_of(path / WEIGHTS_NAME, follow_links=True) == "missing":
        for other in sorted(path.iterdir()):
            refuse_unsafe_format(other)
    return Adapter(path, read_adapter_config(path / CONFIG_NAME), read_tensors(path / WEIGHTS_NAME))


def files_sha256(folder: Path) -> str:
    """SHA-256 over the bytes of an adapter directory's two files, whatever they mean."""
    hashes = {name: regular_sha256(folder / name) for name in (WEIGHTS_NAME, CONFIG_NAME)}
    return hashlib.sha256(canonical_json(hashes)).hexdigest()


def refuse_unsafe_format(path: Path) -> None:
    """Raise DamagedError, with the reason, for a file whose suffix says that it is not safe."""
    reason = UNSAFE.get(path.suffix.lower())
    if reason is not None and kind_of(path, follow_links=True) != "directory":
        raise DamagedError(
            f"{path} is not read: {reason}. Expected safetensors ({WEIGHTS_NAME}); convert it with "
            f"the program that wrote it."
        )


def read_adapter_config(path: Path) -> dict[str, Any]:
    """Read adapter_config.json: at most 1 MiB of JSON, each key once, numbers in bounds."""
    config = read_json(path, MAX_CONFIG_BYTES)
    try:
        _Meaning.model_validate(config)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))
        raise DamagedError(f"{path}: {where or 'the file'}: {error.errors()[0]['msg']}.") from error
    return dict(config)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file into memory, once its header has been checked."""
    refuse_unsafe_format(path)
    with open_regular(path) as (file, size):
        places = read_header(file, size, path)
        content = memoryview(read_start(file, size, path))  # its parts are views, not copies
    return {
        name: Tensor(place.dtype, place.shape, content[place.begin : place.end])
        for name, place in places.items()
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

    mx.save_safetensors lays tensors out in the order of a hash table; safetensors itself sorts, but
    gives its file to the owner alone, and tells of a full disk in words.
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
    path.touch()
    mode = path.stat().st_mode  # that of any other file written here
    try:
        serialize_file(specs, str(path), metadata={"format": made_for})
    except SafetensorError as error:
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)


def _viewed(array: mx.array) -> mx.array:
    """NumPy has no bfloat16: its bytes go as uint16."""
    return array.view(mx.uint16) if array.dtype == mx.bfloat16 else array


def write_adapter(folder: Path, tensors: Mapping[str, mx.array], config: Mapping[str, Any]) -> None:
    """Write tensors and a configuration into `folder`, which a caller then publishes whole."""
    save_arrays(folder / WEIGHTS_NAME, tensors)
    write_json(folder / CONFIG_NAME, dict(sorted(config.items())))
