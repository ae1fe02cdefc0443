"""Safetensors files that mean harm, each under the name of its trick.

As a program it reads each file of a folder in a forked process of its own, and prints what became
of it: the error, the seconds and the bytes of memory that it took.
"""

from __future__ import annotations

import json
import os
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
SECOND = ENTRY | {"data_offsets": [8, 16]}
DATA = struct.pack("<4f", 1.0, 2.0, 3.0, 4.0)
KIBI = 1024
RSS_UNIT = 1 if sys.platform == "darwin" else KIBI


def safetensors(header: Any, data: bytes = DATA[:8]) -> bytes:
    """A file, sound or not: the header's length, the header, the data."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(**changes: Any) -> bytes:
    """A file of one tensor that is sound but for these changes."""
    return safetensors({"a": ENTRY | changes})


def twice(first: dict[str, Any], second: dict[str, Any], data: bytes) -> bytes:
    """A header with one name twice, which no dict can hold."""
    places = tuple(json.dumps(place).encode() for place in (first, second))
    return safetensors(b'{"a":%b,"a":%b}' % places, data)


def many(count: int) -> bytes:
    """So many tensors without elements."""
    empty = ENTRY | {"shape": [0], "data_offsets": [0, 0]}
    return safetensors({f"t{number}": empty for number in range(count)}, b"")


EMPTY = ENTRY | {"shape": [0], "data_offsets": [0, 0]}
TRICKS: dict[str, bytes] = {
    "empty": b"",
    "shorter than its length": b"\x02\0\0",
    "zeros": bytes(4096),
    "a header of 2**63 bytes": struct.pack("<Q", 2**63) + b"{}",
    "a header of 2**64 - 1 bytes": struct.pack("<Q", 2**64 - 1) + b"{}",
    "a header longer than the file": struct.pack("<Q", 100) + b"{}",
    "a header that is no JSON": safetensors(b"\xff{"),
    "a header that is no object": safetensors([1]),
    "a header cut short": safetensors(b'{"a":{"dtype":"F32","sha'),
    "more after the header's JSON": safetensors(json.dumps({"a": ENTRY}).encode() + b"{}"),
    "brackets without end": safetensors(b'{"a":' + b"[" * 2_000_000),
    "objects without end": safetensors(b'{"a":' * 400_000),
    "a million empty lists": safetensors(b'{"a":[' + b"[]," * 690_000 + b"[]]}"),
    "a number of a million digits": safetensors(b'{"a":' + b"1" * 1_000_000 + b"}"),
    "NaN as an offset": safetensors(b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,NaN]}}'),
    "a float as an offset": entry(data_offsets=[0, 8.0]),
    "an offset of 2**64": entry(data_offsets=[0, 2**64]),
    "a negative offset": entry(data_offsets=[-8, 0]),
    "three offsets": entry(data_offsets=[0, 8, 8]),
    "offsets turned around": entry(data_offsets=[8, 0]),
    "data cut short": safetensors({"a": ENTRY}, DATA[:4]),
    "data left over": safetensors({"a": ENTRY}, DATA),
    "tensors that overlap": safetensors({"a": ENTRY, "b": ENTRY}),
    "tensors that overlap by half": safetensors(
        {"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, DATA[:12]
    ),
    "a hole at the start": safetensors({"a": SECOND}, DATA),
    "a hole in the middle": safetensors(
        {"a": ENTRY, "b": ENTRY | {"data_offsets": [12, 20]}}, DATA + bytes(4)
    ),
    "a name twice": twice(ENTRY, SECOND, DATA),
    "a name twice, both the same": twice(ENTRY, ENTRY, DATA[:8]),
    "a name twice, both empty": twice(EMPTY, EMPTY, b""),
    "metadata twice": safetensors(b'{"__metadata__":{"a":"b"},"__metadata__":{}}', b""),
    "metadata that is no text": safetensors({"__metadata__": {"format": 1}, "a": ENTRY}),
    "metadata that is a list": safetensors({"__metadata__": [], "a": ENTRY}),
    "an unknown dtype": entry(dtype="PICKLE"),
    "a dtype that no adapter has": entry(dtype="I64", shape=[1]),
    "no dtype": safetensors({"a": {"shape": [2], "data_offsets": [0, 8]}}),
    "a key that the format does not know": entry(code="import os"),
    "a shape that does not fit": entry(shape=[3]),
    "a shape that overflows": entry(shape=[2**62, 2**62]),
    "a shape that overflows to what is there": entry(shape=[2**63 + 1, 2]),
    "a negative shape": entry(shape=[-2]),
    "a shape of 2**53 zeros": entry(shape=[2**53, 0, 2**53], data_offsets=[0, 0]),
    "a true as a shape": entry(shape=[True, 2]),
    "a shape of a hundred thousand ones": entry(shape=[1] * 100_000 + [2]),
    "a hundred thousand tensors": many(100_000),
    "twenty thousand tensors": many(20_000),
    "a name of a hundred thousand letters": safetensors({"a" * 100_000: ENTRY}),
    "a name with NUL": safetensors({"a\0b": ENTRY}),
    "a name with an escape sequence": safetensors({"\x1b[2Jlora_a": ENTRY}),
    "half a character as a name": safetensors(b'{"\\ud800":%b}' % json.dumps(ENTRY).encode()),
    "a byte order mark": safetensors(b"\xef\xbb\xbf" + json.dumps({"a": ENTRY}).encode()),
    "a pickle": b"\x80\x04\x95\x1a\0\0\0\0\0\0\0\x8c\x05posix\x8c\x06system\x93\x8c\x02id\x85R.",
    "a zip, as .npz and .pt are": b"PK\x03\x04" + bytes(200),
    "a GGUF file": b"GGUF\x03\0\0\0" + bytes(200),
    "a page of a web server": b"<!DOCTYPE html><html><head><title>404</title></head></html>",
}


def sparse(path: Path, start: bytes, size: int) -> None:
    """A file that begins like this and is nearly all hole."""
    with path.open("wb") as file:
        file.write(start)
        file.truncate(size)


LARGE: dict[str, Callable[[Path], None]] = {
    "a header of 100 MB": lambda path: sparse(path, struct.pack("<Q", 10**8), 10**8 + 8),
    "a bad header before 8 GB": lambda path: sparse(path, safetensors(b"{"), 2**33),
    "a tensor of 8 TB": lambda path: sparse(
        path, entry(shape=[2**41 - 64], data_offsets=[0, 2**43 - 256]), 2**43
    ),
}


def write_all(folder: Path) -> list[str]:
    """Write an adapter directory for each trick; return the names, in order."""
    names = [*TRICKS, *LARGE]
    for number, name in enumerate(names):
        place = folder / str(number)
        place.mkdir()
        (place / "adapter_config.json").write_text("{}")
        weights = place / "adapters.safetensors"
        if name in TRICKS:
            weights.write_bytes(TRICKS[name])
        else:
            LARGE[name](weights)
    return names


def _outcome(folder: Path) -> dict[str, Any]:
    from nested_core.errors import DamagedError
    from nested_core.storage.adapter import read_adapter

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = time.process_time()
    try:
        read_adapter(folder)
        error = "accepted"
    except DamagedError as damage:
        error = str(damage)
    seconds = time.process_time() - began
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return {"error": error, "seconds": seconds, "bytes": grown * RSS_UNIT}


def main(folder: Path) -> None:
    """One line of JSON a file, in order; a reader that dies leaves its exit status."""
    from nested_core import read_adapter  # noqa: F401 -- imported once, before the forks

    for number in range(len(TRICKS) + len(LARGE)):
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            print(json.dumps(_outcome(folder / str(number))), flush=True)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if status:
            print(json.dumps({"error": f"died with {status}", "seconds": 0, "bytes": 0}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
