"""Random damage to good files: nothing uncaught, no line lost."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core.data.lines.example_parsing import FieldNames, parse_line
from nested_core.data.lines.json_decoding import LineProblem
from nested_core.data.lines.line_rows import parse_line_to_row
from nested_core.data.lines.line_table import read_line_range
from nested_core.data.parallel_jobs import ByteRange
from tests.builders.data_sets import load

MUTATIONS = 2000
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
GOOD = [
    {"messages": [{"role": "user", "content": "Où?"}, {"role": "assistant", "content": "Là."}]},
    {
        "messages": [
            {"role": "system", "content": 'Say "yes".\n'},
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
            {"role": "tool", "content": "1", "tool_call_id": "1"},
            {"role": "assistant", "content": "b \U0001f600"},
        ],
        "tools": [{"type": "function", "function": {"name": "f"}}],
    },
    {"prompt": "p", "completion": "c", "id": 1.5},
    {"text": "some text \\ with a backslash"},
]
SEED_FILE = b"\n".join(
    json.dumps(row, ensure_ascii=bool(n % 2)).encode() for n, row in enumerate(GOOD)
)
TOKENS = [
    *(b"\n", b"\r\n", b"\0", b'"', b"\\", b"\\u0000", b"\\ud800", b"{", b"}", b"["),
    *(b"]", b"null"),
]
TOKENS += [
    *(b"\xff", b"\xef\xbb\xbf", b":", b",", b"1e999", b'"role"', b'"tool"', b" "),
    *(b"-", b"\xed\xa0\x80"),
]


def mutate(content: bytes, dice: random.Random) -> bytes:
    damaged = bytearray(content)
    for _ in range(dice.randint(1, 4)):
        start = dice.randrange(len(damaged) + 1)
        stop = min(len(damaged), start + dice.choice((0, 1, 1, 2, 30)))
        piece = dice.choice(
            (b"", dice.choice(TOKENS), bytes([dice.randrange(256)]), content[start:stop])
        )
        damaged[start:stop] = piece
    return bytes(damaged)


@pytest.mark.slow("reads two thousand damaged files")
def test_mutated_files_never_raise_and_never_lose_a_line(tmp_path: Path) -> None:
    dice = random.Random(20)
    path = tmp_path / "train.jsonl"
    for _ in range(MUTATIONS):
        content = mutate(SEED_FILE, dice)
        path.write_bytes(content)
        read = read_line_range(path, ByteRange(0, len(content)), FieldNames())
        frame = read.frame
        expected = content.count(b"\n") + (not content.endswith(b"\n") and bool(content))
        assert frame.height == expected
        for row in frame.iter_rows(named=True):
            assert row["is_blank"] + (row["check"] is not None) + (row["format"] is not None) == 1
        assert len(read.digests) == 32 * frame["format"].count()


def good_files() -> dict[str, bytes]:
    """The same kind of examples in each format."""
    table = pl.DataFrame([{"text": f"Où? {n}", "n": n} for n in range(12)])
    parquet = io.BytesIO()
    table.write_parquet(parquet)
    return {
        "jsonl": SEED_FILE * 3,
        "jsonl.gz": gzip.compress(SEED_FILE * 3),
        "json": json.dumps(GOOD * 3, indent=1).encode(),
        "csv": b'prompt,completion\r\n"Where, is\nit?","In ""A"" it is."\r\na,b\r\n\r\nc,d\r\n' * 3,
        "parquet": parquet.getvalue(),
    }


def judge_mutations(suffix: str, count: int, folder: Path, seed: int) -> None:
    """Damage three files at a time; nothing may be raised, and each line must be accounted for."""
    dice, good = random.Random(seed), good_files()[suffix]
    for _ in range(count // 3):
        written = {split: mutate(good, dice) for split in ("train", "valid", "test")}
        for split, content in written.items():
            (folder / f"{split}.{suffix}").write_bytes(content)
        report, _ = load(folder)
        assert set(report.splits) == set(written)
        for split, counted in report.splits.items():
            bad = {f.line for f in report.errors if f.file == counted.file and f.line}
            assert counted.rows + len(bad) + counted.blank == counted.lines, written[split]
            if suffix == "jsonl":
                content = written[split]
                assert counted.lines == content.count(b"\n") + (content[-1:] not in (b"", b"\n"))


@pytest.mark.slow("judges many damaged data sets")
@pytest.mark.parametrize("suffix", good_files())
def test_mutated_data_sets_account_for_every_line(suffix: str, tmp_path: Path) -> None:
    judge_mutations(suffix, 30, tmp_path, seed=1)


@pytest.mark.reliability
@pytest.mark.timeout(3600)  # each parquet file is read in a process of its own
@pytest.mark.parametrize("suffix", good_files())
def test_2000_mutations_of_each_format_account_for_every_line(suffix: str, tmp_path: Path) -> None:
    judge_mutations(suffix, 2001, tmp_path, seed=2)


@given(st.binary(max_size=200))
def test_any_bytes_make_a_row(raw: bytes) -> None:
    row = parse_line_to_row(raw, FieldNames())
    assert row.is_blank or row.check or row.format


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["messages", "role", "content", "tool_calls", "tools", "id", "text"]),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def problem_of(raw: bytes) -> LineProblem | None:
    try:
        parse_line(raw, FieldNames())
    except LineProblem as problem:
        return problem
    return None


@pytest.mark.slow("reads hundreds of rows that hypothesis makes")
@given(json_values)
def test_any_json_is_an_example_or_a_problem(value: object) -> None:
    raw = json.dumps(value).encode()
    problem = problem_of(raw)
    row = parse_line_to_row(raw, FieldNames())
    assert row.check == (problem and problem.check)
    assert (row.format is None) == (problem is not None)


@given(st.dictionaries(st.text(max_size=5), json_values, max_size=4), st.text(max_size=9))
def test_a_repeated_key_is_always_found(extra: dict[str, object], text: str) -> None:
    extra.pop("text", None)
    whole = json.dumps({"text": "a", **extra, "last": text})
    once, twice = problem_of(whole.encode()), problem_of(f'{whole[:-1]}, "text": "b"}}'.encode())
    assert twice is not None
    assert twice.check in ("duplicate-key", "lone-surrogate", "nul-character")
    assert once is None or once.check != "duplicate-key"
