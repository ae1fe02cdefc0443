"""Files and models that would take all time, memory or disk: refused soon, in one sentence."""

from __future__ import annotations

import gzip
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from nested_core.data.sources import file_formats
from nested_core.data.tokens import example_encoding
from nested_core.data.tokens.template_time_limit import TemplateTimeLimit, TemplateTooSlow
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError
from nested_core.records.dataset import Finding
from tests.builders.adapter_folders import base_copy
from tests.builders.data_sets import json_lines, load, write_lines
from tests.left_out import needs_rooms

LINE = b'{"text": "Where is Oslo? In Norway."}\n'


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds of real files, at a thousandth of their size."""
    monkeypatch.setattr(file_formats, "_LINES_ALWAYS_ALLOWED", 1_000)
    monkeypatch.setattr(file_formats, "_BYTES_ALWAYS_ALLOWED", 64 * 2**10)


def damage_in(folder: Path) -> Finding:
    """The first damage that is found."""
    report, _ = load(folder, batch_size=1)
    return next(each for each in report.errors if each.check == "damaged-file")


@pytest.mark.usefixtures("small_limits")
def test_a_gzip_of_nothing_but_line_ends_is_cut_off_by_its_lines(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(LINE * 3 + b"\n" * 60_000))
    damage = damage_in(tmp_path)
    assert "it unpacks to more lines than one for 4 of its bytes" in damage.message
    size = (tmp_path / "train.jsonl.gz").stat().st_size
    assert damage.line == 1_000 + size // 4 + 1


@pytest.mark.usefixtures("small_limits")
@pytest.mark.parametrize(
    "suffix", ["jsonl.gz", pytest.param("parquet", marks=needs_rooms("tables"))]
)
def test_a_file_that_repeats_one_row_without_end_is_cut_off_by_its_bytes(tmp_path, suffix) -> None:
    path, text = tmp_path / f"train.{suffix}", "a" * 10_000
    if suffix == "parquet":
        pl.DataFrame({"text": [text] * 3_000}).write_parquet(path)
    else:
        path.write_bytes(gzip.compress(json_lines([{"text": text}]) * 3_000))
    report, _ = load(tmp_path, batch_size=1)
    assert [each.check for each in report.errors] == ["damaged-file"]
    assert "it unpacks to more than 200 times its size" in report.errors[0].message
    assert report.splits["train"].lines < 3_000


def test_a_sparse_file_of_forty_gigabytes_is_refused_at_its_hole(tmp_path: Path) -> None:
    with (tmp_path / "train.jsonl").open("wb") as file:
        file.write(LINE * 3)
        file.truncate(40 * 2**30)
    began = time.process_time()
    damage = damage_in(tmp_path)
    assert damage.line == 4
    assert "the line is longer than 67,108,864 bytes" in damage.message
    assert time.process_time() - began < 5


@pytest.mark.parametrize("size", [99, 100, 101, 250])
def test_the_first_line_that_is_too_long_is_found_wherever_it_stands(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_formats, "MAX_LINE_BYTES", 100)
    monkeypatch.setattr(file_formats, "_CHUNK_BYTES", 7)
    path = tmp_path / "lines"
    for before in (0, 1, 30, 99, 100, 205):
        lines = [b"x" * min(before, 60), b"y" * 40, b""]
        head = b"\n".join(lines)
        path.write_bytes(head + b"z" * size + b"\nend\n")
        expected = len(head) if size > 100 else None
        assert file_formats.find_start_of_too_long_line(path) == expected


@pytest.mark.parametrize(
    ("name", "content", "line"),
    [
        pytest.param(
            *("train.csv", b"text\na\nb\n" + b"c" * 5_000, 4), marks=needs_rooms("tables"), id="csv"
        ),
        pytest.param("train.jsonl.gz", gzip.compress(LINE + b"c" * 5_000, mtime=0), 2, id="gzip"),
    ],
)
def test_a_line_that_never_ends_is_damage_there(tmp_path, monkeypatch, name, content, line) -> None:
    monkeypatch.setattr(file_formats, "MAX_LINE_BYTES", 1_000)
    (tmp_path / name).write_bytes(content)
    damage = damage_in(tmp_path)
    assert damage.line == line
    assert damage.message.startswith("the line is longer than 1,000 bytes")


@pytest.mark.parametrize("key", ["chat_template_type", "tool_parser_type"])
@pytest.mark.parametrize("value", ["no_such_thing", "../../os", "\x1b[2J"])
def test_a_template_or_parser_that_mlx_lm_does_not_have_is_one_sentence(
    key: str, value: str, tmp_path: Path
) -> None:
    changes: dict[str, Any] = {key: value}
    folder = base_copy(tmp_path / "model", file="tokenizer_config.json", **changes)
    with pytest.raises(ConfigError) as refused:
        TokenizerSource(str(folder)).load()
    assert "no tokenizer could be loaded" in str(refused.value)
    assert "\x1b" not in str(refused.value)
    if value == "no_such_thing":
        assert f"its {key} 'no_such_thing' is not one that this mlx-lm has" in str(refused.value)


LOOPS = {
    "nested loops": "{% for a in range(100000) %}{% for b in range(100000) %}x"
    "{% endfor %}{% endfor %}",
    "loops over what it is given": "{% for a in messages[0].content * 1000 %}"
    "{% for b in messages[0].content * 1000 %}{% for c in messages[0].content * 1000 %}"
    "{% endfor %}{% endfor %}{% endfor %}",
}


@pytest.mark.slow("a template loops until it is stopped")
@pytest.mark.parametrize("name", LOOPS)
def test_a_chat_template_that_loops_is_refused_in_one_message(name, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(example_encoding, "TemplateTimeLimit", lambda: TemplateTimeLimit(0.5))
    said: dict[str, Any] = {"chat_template": LOOPS[name]}
    folder = base_copy(tmp_path / "model", file="tokenizer_config.json", **said)
    (folder / "chat_template.jinja").write_text(LOOPS[name])
    row = {"prompt": "Where is Oslo?", "completion": "In Norway."}
    write_lines(tmp_path / "train.jsonl", [row])
    began = time.process_time()
    with pytest.raises(ConfigError, match=r"line 1 of train.jsonl, and may never end") as refused:
        load(tmp_path, TokenizerSource(str(folder)), batch_size=1)
    assert str(folder) in str(refused.value)
    assert time.process_time() - began < 20


@pytest.mark.slow("a template runs until it is stopped")
def test_a_template_in_time_is_left_alone_and_one_out_of_time_is_ended() -> None:
    with TemplateTimeLimit(0.3) as limit:
        for _ in range(3):
            with limit.watching(0):
                pass
        with pytest.raises(TemplateTooSlow), limit.watching(0):
            burn(60)
        with limit.watching(10**6):  # ten seconds more
            burn(0.8)
        with pytest.raises(ZeroDivisionError), limit.watching(0):
            print(1 / 0)


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass
