"""Strict reading of safetensors files from untrusted sources, and deterministic writing.

Reading refuses what the format forbids (by the reference reader, and again here) and what no
adapter needs: duplicate names, unsupported dtypes, oversized headers, shapes or numbers of tensors.
Tensors are read at once as raw bytes, without MLX, so what is compared and hashed is what is on
disk. Formats that can run code, or that nothing checks, are refused by name. The format: 8 bytes of
length, little-endian, then JSON, then the data (safetensors' README).
"""

from __future__ import annotations

import errno
import math
import os
import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from safetensors import SafetensorError, TensorSpec, safe_open, serialize_file

from nested_core.errors import DamagedError
from nested_core.storage.untrusted_files import file_type, open_regular, parse_json, read_start

MAX_HEADER_BYTES = 2 * 1024 * 1024
MAX_TENSORS = 16_384
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 8
METADATA_KEY = "__metadata__"
FLOATING_POINT_DTYPES = ("F64", "F32", "F16", "BF16")
NUMPY_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
NUMPY_DTYPES |= {"U64": "<u8", "U32": "<u4", "U8": "|u1"}  # counters, and what few bits are kept in
BYTES_PER_ELEMENT = {name: np.dtype(stored).itemsize for name, stored in NUMPY_DTYPES.items()}
REASONS_BY_UNSAFE_SUFFIX = {
    **dict.fromkeys((".pt", ".pth", ".bin", ".pkl", ".pickle", ".ckpt"), "a pickle runs code"),
    **dict.fromkeys(
        (".npz", ".npy"), "NumPy's formats may hold pickles, and have no checked header"
    ),
}


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a safetensors file: dtype ("F32", "BF16" ...), shape and raw bytes."""

    dtype: str
    shape: tuple[int, ...]
    data: bytes | memoryview

    def to_numpy(self) -> np.typing.NDArray[Any]:
        """Convert to a NumPy array; bfloat16 is widened to float32, which is exact."""
        stored = self._to_numpy_unwidened()
        if self.dtype != "BF16":
            return stored
        return (stored.astype(np.uint32) << 16).view(np.float32)

    def to_mlx(self) -> mx.array:
        """Convert to an MLX array of the same dtype and bytes; DamagedError for float64."""
        if self.dtype == "F64":
            raise DamagedError("A tensor has dtype F64, which MLX would narrow to float32.")
        stored = mx.array(self._to_numpy_unwidened())
        return stored.view(mx.bfloat16) if self.dtype == "BF16" else stored

    def _to_numpy_unwidened(self) -> np.typing.NDArray[Any]:
        """Convert to a NumPy array of the stored bytes; bfloat16 as uint16."""
        if self.dtype not in NUMPY_DTYPES:
            raise DamagedError(f"A tensor has dtype {self.dtype}, which is not read here.")
        values = np.frombuffer(self.data, NUMPY_DTYPES[self.dtype]).reshape(self.shape)
        return values if values.flags.aligned else values.copy()


def refuse_unsafe_format(path: Path) -> None:
    """Raise DamagedError for a file whose suffix is that of a format that may run code."""
    reason = REASONS_BY_UNSAFE_SUFFIX.get(path.suffix.lower())
    if reason is not None and file_type(path, follow_links=True) != "directory":
        raise DamagedError(
            f"{path} is not read: {reason}. Expected safetensors (adapters.safetensors). Convert "
            f"it with the program that wrote it."
        )


def read_tensors(path: Path, *, follow_links: bool = False) -> dict[str, StoredTensor]:
    """Check a safetensors file and read all of its tensors into memory.

    Raises DamagedError if the file is not sound.
    """
    return read_tensors_and_bytes(path, follow_links=follow_links)[0]


def read_tensors_and_bytes(
    path: Path, *, follow_links: bool = False
) -> tuple[dict[str, StoredTensor], memoryview]:
    """Read all tensors of a safetensors file, and the file's bytes, of which they are views.

    Raises DamagedError if the file is not sound.
    """
    refuse_unsafe_format(path)
    with open_regular(path, follow_links=follow_links) as (file, size):
        locations = read_header(file, size, path)
        content = memoryview(read_start(file, size, path))  # its parts are views, not copies
    tensors = {
        name: StoredTensor(at.dtype, at.shape, content[at.begin : at.end])
        for name, at in locations.items()
    }
    return tensors, content


def load_arrays(path: Path) -> dict[str, mx.array]:
    """Check a safetensors file and read all of its tensors as MLX arrays.

    Unlike mx.load, it reads at once, so later changes of the file have no effect, and it refuses
    files that the safetensors library refuses.
    """
    return {name: tensor.to_mlx() for name, tensor in read_tensors(path).items()}


def save_arrays(
    path: Path, arrays: Mapping[str, mx.array], *, metadata_format: str = "mlx"
) -> None:
    """Write MLX arrays to a safetensors file; equal arrays give equal bytes.

    metadata_format: the `format` in the file's metadata, which transformers reads.

    mx.save_safetensors orders tensors by a hash table, so its bytes differ between processes. The
    safetensors library sorts, but makes the file readable for its owner alone and reports a full
    disk as text; both are corrected here.
    """
    stored = {  # NumPy has no bfloat16: its bytes go as uint16
        name: np.ascontiguousarray(array.view(mx.uint16) if array.dtype == mx.bfloat16 else array)
        for name, array in arrays.items()
    }
    specs = {
        name: TensorSpec(
            dtype=str(arrays[name].dtype).removeprefix("mlx.core."),
            shape=list(arrays[name].shape),
            data_ptr=values.ctypes.data,
            data_len=values.nbytes,
        )
        for name, values in stored.items()
    }
    path.touch()  # a new file, to see which permissions it gets
    mode = path.stat().st_mode  # as of any other new file
    try:
        serialize_file(specs, str(path), metadata={"format": metadata_format})
    except SafetensorError as error:
        # An error of the system, such as a full disk, is in the message alone
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    path.chmod(mode)


@contextmanager
def naming_full_disk(folder: Path) -> Iterator[None]:
    """Raise an error of MLX's writer, which names no cause, as the OSError of a full disk."""
    try:
        yield
    except RuntimeError as error:
        if "Unable to write" not in str(error):
            raise
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder)) from error


class TensorLocation(NamedTuple):
    """A tensor's dtype, shape, and the file positions of its first byte and after its last."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Any, size: int, path: Path) -> dict[str, TensorLocation]:
    """Read and check the header of an open safetensors file, without reading tensors.

    size: the file's size in bytes. path: the file's, to check it also with the safetensors library
        and for messages.

    The file begins with the header's length (8 bytes), then the header as JSON, then the tensors.

    Returns the location of each tensor. Raises DamagedError for an unsound file.
    """
    try:
        length = _header_length(read_start(file, min(8, size), path), size)
        with safe_open(str(path), framework="numpy") as read:  # by the safetensors library
            count = len(read.keys())
        if count > MAX_TENSORS:
            raise ValueError(f"it names {count} tensors, more than {MAX_TENSORS}")
        header = parse_json(read_start(file, 8 + length, path)[8:])
        locations = {
            name: _parse_location(name, entry, 8 + length)
            for name, entry in header.items()
            if name != METADATA_KEY
        }
        _require_no_gap(locations, 8 + length, size)
    except (ValueError, SafetensorError) as error:
        raise DamagedError(
            f"{path} is not a sound safetensors file: {error!s:.300}. It was cut short or changed "
            f"after it was written: take it again from where it came."
        ) from error
    return locations


def _header_length(start: bytes, size: int) -> int:
    """Return the header's length in bytes; ValueError if it is too large for the file or for us."""
    if size < 8:
        raise ValueError(f"it has {size} bytes, too few for a header")
    length: int = struct.unpack("<Q", start)[0]
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER_BYTES}")
    if length > size - 8:
        raise ValueError(f"its header has {length} bytes, more than the file")
    return length


def _parse_location(name: str, entry: dict[str, Any], start: int) -> TensorLocation:
    """Check one entry of the header; ValueError if its name, dtype, shape or size is not allowed.

    start: the position of the first data byte in the file.
    """
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise ValueError(f"{name!r:.80} is not the name of a tensor")
    if len(entry) != 3:  # beside dtype, shape and data_offsets, which are read below
        raise ValueError(f"{name:.80} has keys that the format does not know")
    dtype = str(entry["dtype"])
    shape = tuple(entry["shape"])
    if dtype not in BYTES_PER_ELEMENT:
        raise ValueError(f"{name:.80} has dtype {dtype}, which is not read here")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name:.80} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * BYTES_PER_ELEMENT[dtype]:
        raise ValueError(f"{name:.80} has {end - begin} bytes for {dtype} {list(shape)}")
    return TensorLocation(dtype, shape, start + begin, start + end)


def _require_no_gap(locations: dict[str, TensorLocation], begin: int, size: int) -> None:
    """Raise ValueError unless the tensors fill the file after its header without gap or overlap.

    begin: the position of the first data byte; size: the file's size.
    """
    for tensor in sorted(locations.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != begin:
            raise ValueError(f"its tensors overlap or leave a hole at byte {min(tensor[2], begin)}")
        begin = tensor.end
    if begin != size:
        raise ValueError(f"its tensors end at byte {begin} of {size}")
