"""Every file format reads as the same examples; damage is named with its place, never raised."""

from __future__ import annotations

import contextlib
import csv
import gzip
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.errors import ConfigError
from nested_core.records.dataset import DatasetReport

Found = tuple[str, int | None, str]

CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
TOOL = {"type": "function", "function": {"name": "f", "description": "d"}}
CHATS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f'Où est "{place}"?\nPlease.'},
            {"role": "assistant", "content": f"In {place}land, of course."},
        ]
    }
    for place in "ABCDEF"
]
COMPLETIONS = [{"prompt": f"p, {n}\n\nx", "completion": f'"c" {n}'} for n in range(6)]
TEXTS = [{"text": f"é {n}\r\nsecond line"} for n in range(6)]
TOOLS: list[dict[str, Any]] = [
    {
        "messages": [
            {"role": "user", "content": f"a {n}", "tool_calls": None},
            {"role": "assistant", "content": None, "tool_calls": [CALL]},
        ],
        "tools": [TOOL],
    }
    for n in range(6)
]
ROWS = {"chats": CHATS, "completions": COMPLETIONS, "texts": TEXTS, "tools": TOOLS}


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    if path.name.endswith(".jsonl"):
        path.write_bytes(as_lines(rows))
    elif path.name.endswith(".gz"):
        path.write_bytes(gzip.compress(as_lines(rows)))
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            for row in rows:
                cells = {k: v if isinstance(v, str) else json.dumps(v) for k, v in row.items()}
                writer.writerow(cells)
    else:
        pl.DataFrame(rows).write_parquet(path)


def judge(folder: Path, **settings: Any) -> DatasetReport:
    return load_dataset(DataSettings(str(folder), **settings), None)[0]


def errors_in(folder: Path, **settings: Any) -> list[Found]:
    return [(found.file, found.line, found.check) for found in judge(folder, **settings).errors]


ANOTHER_FORMAT = pytest.mark.slow("the same rows in another format, judged twice")
FAST_KINDS = {"jsonl.gz": "texts", "json": "tools", "csv": "chats", "parquet": "completions"}


@pytest.mark.parametrize(
    ("suffix", "kind"),
    [
        pytest.param(suffix, kind, marks=[] if FAST_KINDS[suffix] == kind else [ANOTHER_FORMAT])
        for suffix in FAST_KINDS
        for kind in ROWS
    ],
)
def test_every_format_gives_the_digest_of_the_same_jsonl(suffix, kind, tmp_path) -> None:
    reports = []
    for name in ("jsonl", suffix):
        folder = tmp_path / name
        folder.mkdir()
        write_rows(folder / f"train.{name}", ROWS[kind][:4])
        write_rows(folder / f"valid.{name}", ROWS[kind][4:])
        reports.append(judge(folder))
    plain, other = reports
    assert other.errors == ()
    assert other.digest == plain.digest
    assert [stats.rows for stats in other.splits.values()] == [4, 2]
    assert other.splits["train"].file == f"train.{suffix}"
    assert [f.check for f in other.warnings] == [f.check for f in plain.warnings]


@pytest.mark.parametrize("suffix", ["pkl", "pickle", "pt", "bin", "npy", "joblib", "py", "yaml"])
def test_what_can_run_code_is_no_format_of_data(suffix: str, tmp_path: Path) -> None:
    (tmp_path / f"train.{suffix}").write_bytes(b"cos\nsystem\n(S'touch ran'\ntR.")
    with contextlib.chdir(tmp_path):
        report = judge(tmp_path)
    assert (dict(report.splits), bool(report.errors)) == ({}, True)
    assert [path.name for path in tmp_path.iterdir()] == [f"train.{suffix}"]


def test_two_files_for_one_split_are_refused_by_name(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", TEXTS)
    write_rows(tmp_path / "train.csv", TEXTS)
    with pytest.raises(ConfigError, match=re.escape("holds train.csv and train.jsonl")):
        judge(tmp_path)


BAD_ROWS: dict[str, tuple[str, bytes, dict[int, str]]] = {
    "line of gzip": (
        "train.jsonl.gz",
        gzip.compress(as_lines(TEXTS) + b"\n\n{bad}\n"),
        {9: "bad-json"},
    ),
    "element of an array, over several lines": (
        "train.json",
        json.dumps([*TEXTS, {"text": 5}, *CHATS[:1]], indent=2).encode(),
        {7: "wrong-type", 8: "mixed-format"},
    ),
    "element that is no object": (
        "train.json",
        json.dumps([*TEXTS, 5, None]).encode(),
        {7: "not-an-object", 8: "not-an-object"},
    ),
    "repeated key in an element": (
        "train.json",
        json.dumps(TEXTS).encode()[:-1] + b', {"text": "a", "text": "b"}]',
        {7: "duplicate-key"},
    ),
    "lone surrogate in an element": (
        "train.json",
        json.dumps(TEXTS).encode()[:-1] + b', {"text": "\\ud800"}]',
        {7: "lone-surrogate"},
    ),
    "line of a csv where a record begins": (
        "train.csv",
        b'text\none\n"two\nlines"\n\nthree\n" "\nfour\n',
        {7: "blank-field"},
    ),
    "too many cells and too few": (
        "train.csv",
        b"prompt,completion\na,b\na,b,c\nd,e\nf\ng,h\ni,j\n",
        {3: "cell-count", 5: "cell-count"},
    ),
    "cell that is not JSON": (
        "train.csv",
        b"messages\n" + b'"[{""role"":""user"",""content"":""a""}"\n',
        {2: "bad-json"},
    ),
    "cell of JSON with a wrong type": (
        "train.csv",
        b'messages\n"[{""role"": ""user"", ""content"": 5}]"\n',
        {2: "wrong-type"},
    ),
    "latin-1 in one record of a csv": (
        "train.csv",
        b"text\none\ncaf\xe9\ntwo\nthree\nfour\n",
        {3: "not-utf8"},
    ),
    "NUL in a csv": ("train.csv", b"text\none\na\0b\n", {3: "nul-character"}),
    "columns that are not known": ("train.csv", b"question,answer\na,b\n", {2: "unknown-format"}),
}
# The line of the damage, 0 for the last that is counted, and what is said of it.
DAMAGED: dict[str, tuple[str, bytes, int, str]] = {
    "cut gzip": (
        "train.jsonl.gz",
        gzip.compress(as_lines([{"text": f"{n * n:x} {n * 7919}"} for n in range(4000)]))[:-9000],
        0,
        "the gzip file is cut off in this line",
    ),
    "no gzip": ("train.jsonl.gz", b"{}\n", 1, "damaged"),
    "flipped checksum": (
        "train.jsonl.gz",
        gzip.compress(as_lines(TEXTS))[:-8] + b"12345678",
        7,
        "damaged: CRC check failed",
    ),
    "array cut in the middle": (
        "train.json",
        json.dumps(TEXTS).encode()[:-20],
        6,
        "not valid JSON at line 1 column",
    ),
    "array broken in the middle": (
        "train.json",
        b'[{"text": "a"},\n {"text": "b"},\n {"text" "c"},\n {"text": "d"}]',
        3,
        "not valid JSON at line 3 column 10: Expecting ':' delimiter",
    ),
    "comma at the end": (
        "train.json",
        b'[{"text": "a"},\n]',
        2,
        "a comma before the closing ] at line 2 column 1",
    ),
    "missing comma": (
        "train.json",
        b'[{"text": "a"} {"text": "b"}]',
        2,
        "expected a comma or ] at line 1 column 16",
    ),
    "array without an end": (
        "train.json",
        b'[{"text": "a"}\n',
        2,
        "expected a comma or ] at line 2 column 1",
    ),
    "text after the array": (
        "train.json",
        b'[{"text": "a"}]\n[]',
        2,
        "text after the array at line 2 column 1",
    ),
    "an object": (
        "train.json",
        b'{"text": "a"}\n',
        1,
        "expected an array of objects, [{...}, ...], found '{'; name a file with an object a line "
        ".jsonl",
    ),
    "empty .json": ("train.json", b"", 1, "found nothing"),
    "deep nesting": (
        "train.json",
        b"[" * 100_000,
        1,
        "the value at line 1 column 2 is nested too deep",
    ),
    "latin-1 array": (
        "train.json",
        '[\n{"text": "é"}]'.encode("latin-1"),
        1,
        "byte 0xe9 in line 2 is not UTF-8. Save the file as UTF-8",
    ),
    "UTF-16 that is cut off": (
        "train.csv",
        "text\none\n".encode("utf-16")[:-1],
        2,
        "the file begins as UTF-16 does, and is none from here on: truncated data. Save the file",
    ),
    "text after a quote": (
        "train.csv",
        b'text\none\n"two" and a half\nthree\n',
        3,
        "not valid CSV in this line: ',' expected after '\"'",
    ),
    "open quote": (
        "train.csv",
        b'text\none\n"two\nthree\n',
        3,
        "not valid CSV in lines 3 to 4: unexpected end of data",
    ),
    "empty csv": ("train.csv", b"", 1, "expected a header"),
    "header twice the same": (
        "train.csv",
        b"text,text\na,b\n",
        1,
        "two columns of the header have one name: text, text",
    ),
    "no parquet": ("train.parquet", b"PAR1 but not really", 1, "the parquet file cannot be read"),
    "empty parquet": ("train.parquet", b"", 1, "the parquet file cannot be read"),
}


def test_null_keys_that_a_table_fills_in_are_as_good_as_absent(tmp_path: Path) -> None:
    rows = [
        *CHATS[:4],
        {"messages": [*CHATS[4]["messages"][:1], {"role": "assistant", "tool_calls": [CALL]}]},
    ]
    (tmp_path / "jsonl").mkdir()
    write_rows(tmp_path / "jsonl" / "train.jsonl", rows)
    pl.DataFrame(rows).write_parquet(tmp_path / "train.parquet")
    plain, table = judge(tmp_path / "jsonl"), judge(tmp_path)
    assert [f.check for f in table.warnings] == ["no-validation-set"]
    assert table.errors == ()
    assert table.splits["train"].roles == plain.splits["train"].roles


@pytest.mark.parametrize("name", BAD_ROWS)
def test_a_bad_record_is_named_by_the_number_a_person_finds_it_by(name, tmp_path) -> None:
    file, content, expected = BAD_ROWS[name]
    (tmp_path / file).write_bytes(content)
    found = [(file, line, check) for line, check in expected.items()]
    assert errors_in(tmp_path, batch_size=1) == found


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_named_with_its_place(name: str, tmp_path: Path) -> None:
    file, content, line, message = DAMAGED[name]
    (tmp_path / file).write_bytes(content)
    report = judge(tmp_path, batch_size=1)
    finding = next(found for found in report.errors if found.check == "damaged-file")
    assert finding.file == file
    assert message in finding.message
    assert finding.message.endswith("; nothing from there on was read")
    counted = report.splits["train"]
    assert finding.line == (line or counted.lines)
    assert counted.rows + counted.blank + counted.rejected == counted.lines


def test_tokens_come_from_any_format_with_the_numbers_of_its_file(tmp_path, tokenizer) -> None:
    record = b'"Long ' + b"word " * 400 + b'\nend"\n'
    (tmp_path / "train.csv").write_bytes(b"text\n" + b"one\n\n" + record + b'two\n""\nthree\n')
    report, splits = load_dataset(
        DataSettings(str(tmp_path), batch_size=1, max_seq_length=50), tokenizer
    )
    assert [(f.line, f.check) for f in report.errors] == [(7, "blank-field")]
    assert len(splits["train"]) == 4
    truncated = [f.line for f in report.warnings if f.check == "truncated"]
    assert truncated == [4]


def test_nothing_of_a_spool_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    private = tmp_path / "tmp"
    private.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(private))
    write_rows(tmp_path / "train.csv", TEXTS)
    judge(tmp_path)
    assert list(private.iterdir()) == []


def test_bytes_that_are_no_text_are_no_text_and_a_missing_number_is_null(tmp_path: Path) -> None:
    columns = {"prompt": ["a", "b"], "completion": ["c d", "e f"], "score": [float("nan"), 1.0]}
    unread = {"key": [b"\x80\x7f", b"\x00\x01\x02\x03"]}  # the second is UTF-8
    pl.DataFrame(columns | unread).write_parquet(tmp_path / "train.parquet")
    columns = {"prompt": [b"\xff", b"f\x00", b"f"], "completion": ["h i", "h i", "h\x00i"]}
    pl.DataFrame(columns).write_parquet(tmp_path / "valid.parquet")
    assert errors_in(tmp_path, batch_size=2) == [
        ("valid.parquet", 1, "wrong-type"),
        ("valid.parquet", 2, "wrong-type"),
        ("valid.parquet", 3, "nul-character"),
    ]


ODD: dict[str, tuple[Callable[[Path], None], str]] = {
    "folder": (lambda path: path.mkdir(), "this is a folder"),
    "pipe": (lambda path: os.mkfifo(path), "this is a pipe"),
    "link to nothing": (lambda path: path.symlink_to("nowhere"), "a link that leads nowhere"),
    "link to itself": (lambda path: path.symlink_to(path.name), "a link that leads nowhere"),
    "device": (lambda path: path.symlink_to(os.devnull), "this is a pipe, a device"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_has_the_name_of_a_split_and_is_no_file_is_an_error(name, tmp_path) -> None:
    make, message = ODD[name]
    files = ("train.jsonl", "valid.csv", "test.jsonl.gz")
    for file in files:
        make(tmp_path / file)
    errors = judge(tmp_path, batch_size=1).errors
    assert {(each.file, each.line, each.check) for each in errors} == {
        (file, 1, "damaged-file") for file in files
    }
    assert all(message in each.message for each in errors)
    assert len(errors) == len(files)
