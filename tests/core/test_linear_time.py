"""Parsers and patterns take time in proportion to their input, however hostile it is."""

from __future__ import annotations

import gzip
import importlib
import json
import pkgutil
import re
import struct
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import flows
import nested_core
from nested_core.config.loading import parse_config, parse_yaml
from nested_core.data.lines.example_parsing import FieldNames, parse_line
from nested_core.data.lines.json_decoding import LineProblem, decode_json_object
from nested_core.data.sources.file_formats import RestOfFileUnreadable, TableReader, read_gzip_jsonl
from nested_core.errors import NestedTuneError
from nested_core.records.metrics import read_metrics
from nested_core.registry.ledger import LEDGER_NAME, read_ledger
from nested_core.seams import is_there, load, load_only
from nested_core.storage.manifest import MANIFEST_NAME, read_manifest
from nested_core.storage.safetensors_files import read_tensors
from nested_core.storage.untrusted_files import parse_json

pytestmark = pytest.mark.slow("times parsers at growing sizes")

REFUSALS = (NestedTuneError, LineProblem, RestOfFileUnreadable, ValueError)
UNMEASURED_SECONDS = 0.01  # of processor time; what is faster than this is fast enough
MOST_TIMES = 24.0  # linear is 8, quadratic 64; what outgrows the processor's caches, up to 16
TRIES = 3


def seconds(call: Callable[[], object]) -> float:
    """Processor time of one call, which may refuse what it is given."""
    started = time.process_time()
    with suppress(*REFUSALS), warnings.catch_warnings(action="ignore"):
        call()
    return time.process_time() - started


def growth(make: Callable[[int], Callable[[], object]], size: int) -> float:
    """How many times longer eight times the input takes, each at its best; 0 if it takes no time.

    From a quarter of the size to twice the size, in turn: on a busy machine one doubling alone
    measures anything between 1.5 and 3 of what takes linear time, and of what takes quadratic time
    too; a table of keys that no longer fits the caches was seen to take 8.9 times for 4.
    """
    large = make(2 * size)
    if seconds(large) < UNMEASURED_SECONDS:
        return 0.0
    small = make(size // 4)
    pairs = [(seconds(large), seconds(small)) for _ in range(TRIES)]
    return min(pair[0] for pair in pairs) / max(min(pair[1] for pair in pairs), 1e-9)


@dataclass(frozen=True)
class Parser:
    """A parser of a file and its bytes, with hostile inputs of some size."""

    parse: Callable[[Path, bytes], object]
    shapes: dict[str, Callable[[int], bytes]]
    size: int


def pairs(count: int, last: str) -> bytes:
    """An object of so many keys, then one more."""
    keys = ", ".join(f'"k{number}": 0' for number in range(count))
    return f'{{{keys}, "{last}": 1}}'.encode()


JSON_SHAPES: dict[str, Callable[[int], bytes]] = {
    "the first key again at the end": lambda n: pairs(n // 8, "k0"),
    "the last key twice": lambda n: pairs(n // 8, f"k{n // 8 - 1}"),
    "open arrays": lambda n: b"[" * n,
    "open objects": lambda n: b'{"a":' * (n // 5),
    "backslashes": lambda n: b'{"a": "' + b"\\\\" * (n // 2) + b'"}',
    "escaped quotes": lambda n: b'{"a": "' + b'\\"' * (n // 2) + b'", "a": 1}',
    "quotes without an end": lambda n: b'{"a": "' + b'\\"' * (n // 2),
    "no numbers": lambda n: b'{"a": [' + b"NaN, " * (n // 5) + b"0]}",
    "halves of surrogate pairs": lambda n: b'{"a": "' + b"\\ud800" * (n // 6) + b'"}',
    "digits": lambda n: b'{"a": ' + b"9" * n + b"}",
    "fractions": lambda n: b'{"a": [' + b"0.1e5," * (n // 6) + b"0]}",
    "spaces": lambda n: b"{" + b" " * n + b"}",
    "NULs": lambda n: b'{"a": "' + b"\\u0000" * (n // 6) + b'"}',
    "tools": lambda n: b'{"messages": [' + b'{"role": "x"},' * (n // 14) + b"{}]}",
}
YAML_SHAPES: dict[str, Callable[[int], bytes]] = {
    "keys": lambda n: b"".join(b"k%d: 0\n" % i for i in range(n // 8)),
    "one key again and again": lambda n: b"iters: 1\n" * (n // 9),
    "open lists": lambda n: b"[" * n,
    "nested keys": lambda n: b"".join(b" " * i + b"a:\n" for i in range(int((2 * n) ** 0.5))),
    "complex keys": lambda n: b"? " * (n // 2) + b"a",
    "dashes": lambda n: b"- " * (n // 2) + b"a",
    "anchors": lambda n: b"a: &a\n" * (n // 6),
    "a long text": lambda n: b"a: " + b"b " * (n // 2),
    "quoted lines": lambda n: b'a: "' + b"\n" * n + b'"',
    "commas": lambda n: b"a: [" + b"1," * (n // 2) + b"]",
    "underscored digits": lambda n: b"a: " + b"1_" * (n // 2) + b"x",
    "sixties": lambda n: b"a: " + b"1:" * (n // 2) + b"1",
}
ENTRY: dict[str, Any] = {"time": "t", "by": "me", "manifest": None, "previous": None}


def ledger_lines(*actions: tuple[str, int]) -> bytes:
    """For each action so many lines, each of another version."""
    lines = [
        {"action": action, "version": f"{number:064x}"} | ENTRY
        for action, count in actions
        for number in range(count)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def parse_ledger(path: Path, _: bytes) -> None:
    ledger = read_ledger(path.parent)
    ledger.changes()
    ledger.rollback_target()
    ledger.barred_versions()
    ledger.champion_versions()


def tensors(count: int) -> bytes:
    """A safetensors file of so many empty tensors."""
    entry = {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{number}": entry for number in range(count)}).encode()
    return struct.pack("<Q", len(header)) + header


def manifest(count: int) -> bytes:
    files = {f"f{number}": {"bytes": 0, "sha256": ""} for number in range(count)}
    return json.dumps({"facts": {}, "files": files, "digest": ""}).encode()


def read_file(path: Path) -> None:
    lines, _ = load_only(TableReader, path.name).read(path, path.suffix, frozenset())
    list(lines)


PARSERS = {
    "JSON": Parser(lambda _, content: parse_json(content), JSON_SHAPES, 30_000),
    "a line": Parser(lambda _, content: decode_json_object(content), JSON_SHAPES, 30_000),
    "an example": Parser(lambda _, line: parse_line(line, FieldNames()), JSON_SHAPES, 30_000),
    "YAML": Parser(lambda _, content: parse_yaml(content), YAML_SHAPES, 8_000),
    "a configuration": Parser(
        lambda _, content: parse_config(parse_yaml(content), source="x"),
        {"unknown keys": YAML_SHAPES["keys"]},
        4_000,
    ),
    "train.json": Parser(
        lambda path, _: read_file(path),
        {
            "elements": lambda n: b"[" + b"{}," * (n // 3) + b"{}]",
            "line ends": lambda n: b"[" + b"{}\n,\n" * (n // 5) + b"x",
            "no commas": lambda n: b"[" + b"{}\n" * (n // 3),
        },
        30_000,
    ),
    "train.csv": Parser(
        lambda path, _: read_file(path),
        {
            "quotes": lambda n: b"text\n" + b'"' * n,
            "doubled quotes": lambda n: b'text\n"' + b'""' * (n // 2),
            "records": lambda n: b"text\n" + b"a\n" * (n // 2),
            "columns": lambda n: b",".join(b"c%d" % i for i in range(n // 8)),
        },
        30_000,
    ),
    "train.jsonl.gz": Parser(
        lambda path, _: sum(1 for _line in read_gzip_jsonl(path)),
        {
            "empty lines": lambda n: gzip.compress(b"\n" * n),
            "one line": lambda n: gzip.compress(b"a" * n),
            "members": lambda n: gzip.compress(b"a\n") * (n // 22),
        },
        30_000,
    ),
    "metrics.jsonl": Parser(
        lambda path, _: read_metrics(path),
        {
            "records": lambda n: b'{"step": 1}\n' * (n // 12),
            "damage": lambda n: b"x\n" * (n // 2),
            "one line": lambda n: b"x" * n,
        },
        30_000,
    ),
    LEDGER_NAME: Parser(
        parse_ledger,
        {
            "promotions": lambda n: ledger_lines(("promote", n // 160)),
            "collections": lambda n: ledger_lines(("promote", n // 320), ("collected", n // 320)),
            "noes": lambda n: ledger_lines(("promote", n // 320), ("declined", n // 320)),
            "one line": lambda n: b"x" * n,
        },
        400_000,
    ),
    "adapters.safetensors": Parser(
        lambda path, _: read_tensors(path),
        {"empty tensors": lambda n: tensors(n // 60), "spaces": lambda n: bytes(8) + b" " * n},
        30_000,
    ),
    MANIFEST_NAME: Parser(
        lambda path, _: read_manifest(path.parent), {"files": lambda n: manifest(n // 40)}, 60_000
    ),
}
if not is_there("tables"):
    del PARSERS["train.json"], PARSERS["train.csv"]
CASES = [(name, shape) for name, parser in PARSERS.items() for shape in parser.shapes]
SLOW_TEXT = pytest.mark.slow("half a second and more for the longer of the texts")
YAML_CASES = [case for case in CASES if case[0] in ("YAML", "a configuration")]
SLOW_CASES = [*YAML_CASES[1:], ("train.csv", "records")]


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        pytest.param(*case, marks=[SLOW_TEXT] if case in SLOW_CASES else [], id="-".join(case))
        for case in CASES
    ],
)
def test_a_parser_takes_linear_time(tmp_path: Path, name: str, shape: str) -> None:
    parser = PARSERS[name]

    def make(size: int) -> Callable[[], object]:
        folder = tmp_path / str(size)
        folder.mkdir()
        content = parser.shapes[shape](size)
        path = folder / name.replace(" ", "-")
        path.write_bytes(content)
        return lambda: parser.parse(path, content)

    assert growth(make, parser.size) <= MOST_TIMES


PIECES = (
    *("a", "A", "1", " ", "-", "_", ".", "/", ":", "@", '"', "\\", "(", "[", "\n", "\0", "é", "+"),
    *("a.", "1 ", "a-", "1-", "-1", '\\"', '"\\', "a@", "@a.", "a1", "A1", " A", "\x1b[", "0;"),
    *("layers.1.", "sk-", "eyJ", "eyJ.", "ghp_", "hf_", "password=", "password: ", "-----BEGIN "),
    *("DE00 ", "4111 ", "+1 ", "http://", "hf://", "::", "::a", "NaN", "Infinity", "<a>", "&a;"),
)


# Never searched for: the beginnings of patterns for names of layers, addresses, keys of answers.
MATCHED_FROM_THE_START = ("(?P<stack>", "(https?|hf)://", r"[0-9]+\.(?:expected")


def modules(package: ModuleType) -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
        if ".cuda" not in found.name and "_main" not in found.name:
            with suppress(ImportError):
                yield importlib.import_module(found.name)


def patterns() -> dict[str, re.Pattern[Any]]:
    """Every compiled pattern that stands in a module, by its text."""
    found = {}
    if is_there("secrets"):
        known = load("nested_core.rooms.secrets.sensitive_data:SENSITIVE_PATTERNS")
        found = {pattern.form.pattern: pattern.form for pattern in known}
    for package in (nested_core, flows):
        for module in modules(package):
            values = vars(module).values()
            found |= {str(v.pattern): v for v in values if isinstance(v, re.Pattern)}
    return found


@pytest.mark.usefixtures("own_random_state")  # libraries draw from it when they are imported
def test_every_pattern_takes_linear_time() -> None:
    tried = patterns()
    assert len(tried) > 25
    for pattern in tried.values():
        for piece in PIECES:
            found = growth(lambda size: searching(pattern, piece, size), 5_000)  # noqa: B023
            assert found <= MOST_TIMES, (pattern.pattern, piece)


def searching(pattern: re.Pattern[Any], piece: str, size: int) -> Callable[[], object]:
    """A search for all places, or a match from the start, in one piece again and again."""
    text: Any = piece * (size // len(piece)) + "!"
    text = text.encode() if isinstance(pattern.pattern, bytes) else text
    if str(pattern.pattern).startswith(MATCHED_FROM_THE_START):
        return lambda: (pattern.match(text), pattern.fullmatch(text))
    return lambda: (sum(1 for _ in pattern.finditer(text)), pattern.fullmatch(text))


def repeated_by_counting(names: list[str]) -> list[str]:
    """How a key that stands twice was looked for before: it takes quadratic time."""
    return [name for name in names if names.count(name) > 1]


@pytest.mark.slow("searches for a quadratic time")
def test_a_quadratic_search_is_caught() -> None:
    def make(size: int) -> Callable[[], object]:
        names = [f"k{number}" for number in range(size)]
        return lambda: repeated_by_counting(names)

    assert growth(make, 2_000) > MOST_TIMES


def test_a_quadratic_pattern_is_caught() -> None:
    pattern = re.compile(r"[\w-]+\.eyJ")  # from each place to the end, and no dot there
    assert growth(lambda size: searching(pattern, "a", size), 4_000) > MOST_TIMES
