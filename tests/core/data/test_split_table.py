"""What a line gives does not depend on the range, the process or the path it is read in."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nested_core.data import split_table
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.data.lines.example_parsing import BLANK_TURN_PATTERN, FieldNames, parse_plain_row
from nested_core.data.lines.line_rows import parse_line_to_row
from nested_core.data.lines.line_table import read_line_range
from nested_core.data.parallel_jobs import ByteRange
from nested_core.data.sources.split_files import SplitFile
from nested_core.data.split_table import read_tables_with_repeats
from nested_core.errors import DatasetError, DataWorkerFailed
from tests.builders.data_sets import GOOD, HELD_OUT, load
from tests.core.data.conftest import WriteData
from tests.core.data.test_bad_lines import BAD_LINES, GOOD_LINES

LINES = [
    b"\xef\xbb\xbf" + json.dumps(GOOD[0]).encode(),
    *GOOD[1:],
    *[line for line, _ in BAD_LINES.values()],
    *GOOD_LINES.values(),
    b"",
    *GOOD,  # duplicates, in other ranges
    b'{"messages": [{"role": "user", "content": "WHERE is  b?"}, '
    b'{"role": "assistant", "content": "In Bland.\\u0007"}]}\r',
    {"messages": [{"role": "user", "content": "Where is Q?"}], "extra": "jane.doe@firm.org"},
]


STARTS = pytest.mark.slow("starts processes that import polars, a line each")


@pytest.mark.parametrize(
    ("size", "processes"),
    [
        pytest.param(1, 2, marks=STARTS),
        pytest.param(1, 1, marks=pytest.mark.slow("a range for each byte")),
        pytest.param(300, 2, marks=STARTS),
        (5000, 1),
        (10**9, 1),
    ],
)
def test_ranges_and_processes_change_nothing(size, processes, write_data, monkeypatch) -> None:
    settings = DataSettings(str(write_data(train=LINES, valid=[*HELD_OUT, GOOD[1]], test=[])))
    expected = load_dataset(settings, None)[0].to_json()
    monkeypatch.setattr(split_table, "RANGE_BYTES", size)
    monkeypatch.setattr(split_table, "count_processes_for", lambda _: processes)
    assert load_dataset(settings, None)[0].to_json() == expected


def test_a_file_that_becomes_shorter_is_not_read_as_if_it_ended_there(tmp_path: Path) -> None:
    path = tmp_path / "train.jsonl"
    path.write_bytes(b'{"text": "a"}\n')
    with pytest.raises(DatasetError, match=r"train\.jsonl became shorter while it was read"):
        read_line_range(path, ByteRange(0, 20), FieldNames())


def test_a_reader_that_is_killed_is_one_error_and_leaves_nothing(
    write_data: WriteData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    private = tmp_path / "tmp"
    private.mkdir()
    folder = write_data(train=GOOD, valid=[*HELD_OUT, *HELD_OUT])
    monkeypatch.setattr("tempfile.tempdir", str(private))
    monkeypatch.setattr(split_table, "LINE_RANGE_JOB", "tests.core.data.jobs:die")
    monkeypatch.setattr(split_table, "count_processes_for", lambda _: 2)
    monkeypatch.setattr(split_table, "RANGE_BYTES", 1)  # one range would be read in this process
    with pytest.raises(DataWorkerFailed, match="ended by SIGKILL"):
        load(folder)
    assert list(private.iterdir()) == []


def test_progress_is_told_in_bytes(write_data: WriteData, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_data(train=GOOD, valid=HELD_OUT)
    monkeypatch.setattr(split_table, "RANGE_BYTES", 100)
    told: list[tuple[str, int, int]] = []
    load_dataset(
        DataSettings(str(folder)), None, on_progress=lambda *progress: told.append(progress)
    )
    size = sum(path.stat().st_size for path in Path(folder).iterdir())
    assert told[-1] == ("reading the data", size, size)
    assert [done for _, done, _ in told] == sorted({done for _, done, _ in told})


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=12)
turns = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": texts}
)
examples = (
    st.fixed_dictionaries({"messages": st.lists(turns, max_size=4)})
    | st.fixed_dictionaries({"prompt": texts, "completion": texts})
    | st.fixed_dictionaries({"text": texts})
)


@given(examples, st.booleans())
def test_the_quick_path_reads_what_the_exact_one_reads(example, ascii_) -> None:
    raw = json.dumps(example, ensure_ascii=ascii_).encode()
    plain, row = parse_plain_row(raw, FieldNames()), parse_line_to_row(raw, FieldNames())
    if plain is not None:
        assert plain == (row.format, row.roles, row.content)
        assert row.shown == row.content
        assert (row.unknown_keys, row.check) == (None, None)
        is_doubtful = pl.Series([plain[2]]).str.contains(BLANK_TURN_PATTERN)[0]
        assert row.blank_field is None or is_doubtful


@pytest.mark.parametrize(
    "raw",
    [
        b'{"messages": [{"role": "user", "content": 5}]}',
        b'{"messages": [{"role": "user", "content": null}]}',
        b'{"messages": [{"role": "user", "content": "a"}, {}]}',
        b'{"messages": [{"role": "user", "content": "a"}, null]}',
        b'{"messages": [{"role": "user", "content": "a"}, NaN]}',
        b'{"messages": [{"role": "user", "content": "a", "weight": 1}]}',
        b'{"messages": [{"role": "user", "content": "a"}], "id": 7}',
        b'{"messages": [{"role": "user", "content": "a", "content": "b"}]}',
        b'{"messages": [{"role": "person", "content": "a"}]}',
        b'{"messages": [{"role": ["user"], "content": "a"}]}',
        b'{"messages": [{"role": "user", "content": "a"}]} 1',
        b'{"messages": {"role": "user", "content": "a"}}',
        b'{"messages": "user"}',
        b'{"messages": []}',
        b'{"messages": 5}',
        b'{"prompt": "a", "completion": 5}',
        b'{"prompt": "a", "completion": "b", "text": "c"}',
        b'{"prompt": "a", "prompt": "b", "completion": "c"}',
        b'{"text": 5}',
        b'{"text": ["a"]}',
        b'{"text": {"a": "b"}}',
        b'{"text": "\\ud800"}',
        b'{"text": "\xff"}',
        b'{"text": NaN}',
        b'["text"]',
        b'"text"',
        b"5",
        b"null",
        b"",
        b"{",
    ],
)
def test_lines_of_another_shape_are_left_to_the_exact_path(raw: bytes) -> None:
    assert parse_plain_row(raw, FieldNames()) is None


def test_rules_over_parts_of_a_table_find_what_they_find_over_all_of_it(
    write_data: WriteData, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = DataSettings(str(write_data(train=LINES, valid=[*HELD_OUT, GOOD[1]], test=GOOD)))
    expected = load_dataset(settings, None)[0].to_json()
    monkeypatch.setattr("nested_core.data.rules.rule_table._ROWS_JUDGED_AT_ONCE", 3)
    assert load_dataset(settings, None)[0].to_json() == expected


@pytest.mark.parametrize("name", GOOD_LINES)
def test_rows_of_every_range_have_one_schema(name: str, write_data: WriteData) -> None:
    folder = write_data(train=[GOOD_LINES[name]])
    files = {"train": SplitFile("train.jsonl", folder / "train.jsonl")}
    tables = read_tables_with_repeats(files, DataSettings(str(folder)), None)
    assert tables["train"].frame.schema == tables["valid"].frame.schema
