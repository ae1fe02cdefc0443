"""The parsers that are fuzzed: what each is given, and the errors that it may answer with."""

from __future__ import annotations

import gzip
import json
import struct
import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nested_core.config.loading import parse_config, read_yaml
from nested_core.data.lines.example_parsing import FieldNames, parse_line, strip_line
from nested_core.data.lines.json_decoding import LineProblem
from nested_core.data.lines.line_table import read_line_range
from nested_core.data.parallel_jobs import ByteRange
from nested_core.data.sources.file_formats import (
    MAX_LINE_BYTES,
    RestOfFileUnreadable,
    TableReader,
    limit_expansion,
    read_gzip_jsonl,
)
from nested_core.errors import ConfigError, DamagedError, DatasetError
from nested_core.records.metrics import read_metrics
from nested_core.registry.ledger import LEDGER_NAME, read_ledger
from nested_core.seams import load_only
from nested_core.storage.adapter import read_adapter_config
from nested_core.storage.manifest import MANIFEST_NAME, read_manifest
from nested_core.storage.safetensors_files import read_tensors
from nested_core.storage.untrusted_files import parse_json
from tests.example import MODEL, SETTINGS

FOLDER = Path(tempfile.mkdtemp(prefix="nested-tune-fuzz-"))
GZIP_MAGIC = b"\x1f\x8b"
JSON_TOKENS = (
    *(b"{", b"}", b"[", b"]", b",", b":", b'"', b"\\", b"\\u0000", b"\\ud800", b"null", b"true"),
    *(b"NaN", b"-Infinity", b'{"a":', b'"a":1,', b"1e5", b"[[", b'"rank"', b'"lora_parameters"'),
)


@dataclass(frozen=True)
class FuzzTarget:
    """A parser: sound inputs and words of its language, the call, and the errors it may raise."""

    corpus: tuple[bytes, ...]
    tokens: tuple[bytes, ...]
    parse: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    prepare: Callable[[bytes], bytes] = bytes
    seconds: float = 3.0  # of processor time, for one input


def _file(name: str, content: bytes) -> Path:
    path = FOLDER / name
    path.write_bytes(content)
    return path


def _parse_safetensors(content: bytes) -> None:
    for tensor in read_tensors(_file("adapters.safetensors", content)).values():
        if tensor.dtype != "F64":
            tensor.to_mlx()


def _with_true_length(content: bytes) -> bytes:
    """The file with the length of its header set to where the JSON ends, so that it is read."""
    end = content.rfind(b"}", 8)
    return content if end < 0 else struct.pack("<Q", end - 7) + content[8:]


def _safetensors(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def _parse_json(content: bytes) -> None:
    path = _file("adapter_config.json", content)
    for read in (read_adapter_config, lambda path: read_manifest(path.parent)):
        with suppress(DamagedError):
            read(path)
        _file(MANIFEST_NAME, content)
    if json.loads(json.dumps(parse_json(content))) != json.loads(content):
        raise AssertionError("parse_json gives another value than json")


def _parse_yaml(content: bytes) -> None:
    parse_config(read_yaml(_file("config.yaml", content)), source="config.yaml")


def _parse_jsonl(content: bytes) -> None:
    path = _file("train.jsonl", content)
    if content:
        read_line_range(path, ByteRange(0, len(content)), FieldNames())
    with warnings.catch_warnings(action="ignore"):
        read_metrics(path)
    for number, line in enumerate(content.split(b"\n")):
        body = strip_line(line, is_first=number == 0)
        with suppress(LineProblem):
            parse_line(body, FieldNames())


def _parse_gzip(content: bytes) -> None:
    packed = content if content.startswith(GZIP_MAGIC) else gzip.compress(content, mtime=0)
    lines = read_gzip_jsonl(_file("train.jsonl.gz", packed))
    for line in limit_expansion(lines, len(packed), is_packed=True):
        if len(line.line) > MAX_LINE_BYTES:
            raise AssertionError("a line is longer than any may be")


def _parse_array(content: bytes) -> None:
    path = _file("train.json", content)
    lines, _ = load_only(TableReader, path.name).read(path, path.suffix, frozenset())
    for line in lines:
        json.loads(line.line)


def _parse_ledger(content: bytes) -> None:
    ledger = read_ledger(_file(LEDGER_NAME, content).parent)
    ledger.changes()
    ledger.rollback_target()
    ledger.barred_versions()
    ledger.champion_versions()


def _ledger_lines() -> bytes:
    entry = {"time": "2026-01-01T00:00:00.000000+00:00", "by": "me", "manifest": "0" * 64}
    lines: list[dict[str, Any]] = [
        {"action": "promote", "version": "a" * 64, "previous": None},
        {"action": "promote", "version": "b" * 64, "previous": "a" * 64, "automatic": True},
        {"action": "rollback", "version": "a" * 64, "previous": "b" * 64, "explicit": True},
        {"action": "declined", "version": "b" * 64, "previous": "a" * 64},
        {"action": "tried", "version": None, "previous": "a" * 64, "outcome": "Rejected: worse"},
        {"action": "collected", "version": "b" * 64, "previous": "a" * 64},
    ]
    return b"".join(json.dumps(line | entry).encode() + b"\n" for line in lines)


TENSORS = {
    "__metadata__": {"format": "mlx"},
    "model.layers.0.lora_a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]},
    "model.layers.0.lora_b": {"dtype": "BF16", "shape": [2, 2], "data_offsets": [16, 24]},
}
CHAT = {"messages": [{"role": "user", "content": "é"}, {"role": "assistant", "content": "b"}]}
CALL = {"role": "assistant", "tool_calls": [{"function": {"name": "f"}}]}
EXAMPLES: tuple[dict[str, Any], ...] = (
    CHAT,
    {"prompt": "a", "completion": "b"},
    {"text": "a\u2028"},
    {"messages": [CALL, {"role": "tool", "content": "1"}], "tools": [{"name": "f"}]},
    {"step": 1, "iteration": 2, "loss": 0.5, "updates": [1, 0]},
)
LINES = b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in EXAMPLES)
YAML = b"".join(f"{key}: {json.dumps(value)}\n".encode() for key, value in SETTINGS.items())
YAML_TOKENS = (
    *(b"- ", b": ", b"? ", b"&a ", b"*a", b"!!python/object:", b"!t ", b"<<: ", b"|\n  ", b">-\n "),
    *(b"%YAML 1.1\n", b"---\n", b"...\n", b"{", b"}", b"[", b"]", b"'", b'"', b"#", b"1:30:00"),
    *(b"0x1F", b"1_000", b".inf", b"~", b"yes", b"2026-01-01", b"\\x41", b"nested:\n  "),
)

TARGETS = {
    "safetensors": FuzzTarget(
        (_safetensors(TENSORS, bytes(24)), _safetensors({}, b"")),
        (*JSON_TOKENS, b'"F32"', b'"shape"', b'"data_offsets"', b'"dtype"', b'"F64"', b'"I8"'),
        _parse_safetensors,
        (DamagedError,),
        prepare=_with_true_length,
    ),
    "json": FuzzTarget(
        (
            (MODEL / "config.json").read_bytes(),
            b'{"lora_parameters": {"rank": 8, "scale": 2.0, "keys": ["a"]}, "num_layers": -1}',
            b'{"facts": {"step": 1}, "files": {"a": {"bytes": 1, "sha256": ""}}, "digest": ""}',
        ),
        JSON_TOKENS,
        _parse_json,
        (ValueError,),
    ),
    "yaml": FuzzTarget(
        (YAML, b"a: [1, {b: c}]\nd:\n  - |\n    text\n  - 'x'\n"),
        YAML_TOKENS,
        _parse_yaml,
        (ConfigError,),
        seconds=20.0,  # PyYAML reads some 50 kB a second
    ),
    "jsonl": FuzzTarget((LINES,), JSON_TOKENS, _parse_jsonl, (DatasetError,)),
    "array": FuzzTarget(
        (json.dumps(EXAMPLES).encode(),), JSON_TOKENS, _parse_array, (RestOfFileUnreadable,)
    ),
    "gz": FuzzTarget(
        (LINES, gzip.compress(LINES), gzip.compress(b"\n" * 50_000), gzip.compress(bytes(10**6))),
        (GZIP_MAGIC, b"\x1f\x8b\x08\x1c", b"\0\0\0\xff\xff"),
        _parse_gzip,
        (RestOfFileUnreadable,),
    ),
    "ledger": FuzzTarget(
        (_ledger_lines(), b""), (*JSON_TOKENS, b'"action"'), _parse_ledger, (DamagedError,)
    ),
}
