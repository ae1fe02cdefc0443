"""The header of a safetensors file, read as if its author meant harm.

Refuses what the format forbids (by the reference reader, and again here) and what no adapter needs:
names twice, dtypes that are not read here, headers, shapes or numbers of tensors without measure.
The format: 8 bytes of length, little-endian, then JSON, then the data (safetensors' README).
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open

from nested_core.errors import DamagedError
from nested_core.storage.strict_files import read_start
from nested_core.storage.strict_json import parse_json

MAX_HEADER_BYTES = 2 * 1024 * 1024
MAX_TENSORS = 16_384
MAX_NAME_LENGTH = 512
MAX_DIMENSIONS = 8
ITEM_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "U64": 8, "U32": 4}
METADATA = "__metadata__"


class Place(NamedTuple):
    """One tensor's dtype and shape, and where its bytes begin and end in the file."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def read_header(file: Any, size: int, path: Path) -> dict[str, Place]:
    """Where each tensor of an open file lies in its bytes, by name; nothing else is read of it.

    Raises DamagedError for an unsound file.
    """
    try:
        length = _header_length(read_start(file, min(8, size), path), size)
        _ask_the_reference_reader(path)
        header = read_start(file, 8 + length, path)[8:]
        places = _places(parse_json(header), 8 + length)
        _require_no_gap(places, 8 + length, size)
    except (ValueError, SafetensorError) as error:
        raise DamagedError(
            f"{path} is not a sound safetensors file: {error!s:.300}. It was cut short or changed "
            f"after it was written: take it again from where it came."
        ) from error
    return places


def _header_length(start: bytes, size: int) -> int:
    if size < 8:
        raise ValueError(f"it has {size} bytes, too few for a header")
    length: int = struct.unpack("<Q", start)[0]
    if length > MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length} bytes, more than {MAX_HEADER_BYTES}")
    if length > size - 8:
        raise ValueError(f"its header has {length} bytes, more than the file")
    return length


def _ask_the_reference_reader(path: Path) -> None:
    with safe_open(str(path), framework="numpy") as file:
        found = len(file.keys())
    if found > MAX_TENSORS:
        raise ValueError(f"it names {found} tensors, more than {MAX_TENSORS}")


def _places(header: Any, base: int) -> dict[str, Place]:
    return {n: _place(n, entry, base) for n, entry in header.items() if n != METADATA}


def _place(name: str, entry: dict[str, Any], base: int) -> Place:
    """One entry; that its fields are there and of their types the reference reader has seen."""
    if len(name) > MAX_NAME_LENGTH or not name.isprintable():
        raise ValueError(f"{name!r:.80} is not the name of a tensor")
    if len(entry) != 3:
        raise ValueError(f"{name:.80} has keys that the format does not know")
    dtype, shape = str(entry["dtype"]), tuple(entry["shape"])
    if dtype not in ITEM_BYTES:
        raise ValueError(f"{name:.80} has dtype {dtype}, which is not read here")
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"{name:.80} has {len(shape)} dimensions, more than {MAX_DIMENSIONS}")
    begin, end = entry["data_offsets"]
    if end - begin != math.prod(shape) * ITEM_BYTES[dtype]:
        raise ValueError(f"{name:.80} has {end - begin} bytes for {dtype} {list(shape)}")
    return Place(dtype, shape, base + begin, base + end)


def _require_no_gap(places: dict[str, Place], begin: int, size: int) -> None:
    """Each byte after the header belongs to one tensor: no overlap, no hole, nothing left over."""
    for place in sorted(places.values(), key=lambda place: (place.begin, place.end)):
        if place.begin != begin:
            raise ValueError(f"its tensors overlap or leave a hole at byte {min(place[2], begin)}")
        begin = place.end
    if begin != size:
        raise ValueError(f"its tensors end at byte {begin} of {size}")
