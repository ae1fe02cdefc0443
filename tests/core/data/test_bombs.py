"""Files and models that would take all time, memory or disk: refused soon, in one sentence."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import resource
import sys
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.data.held_out_rows import as_test_set_alone
from nested_core.data.lines.example_parsing import FieldNames, parse_line
from nested_core.data.sources import file_formats
from nested_core.data.sources.split_files import SplitFile
from nested_core.data.tokens import parallel_tokenization
from nested_core.data.tokens.example_encoding import encode_example
from nested_core.data.tokens.parallel_tokenization import LinesToTokenize, tokenize_splits
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError
from nested_core.models.tokenizer_cell import BYTES_PER_TOKENIZER_BYTE, TokenizerCell, end_kept_cell
from nested_core.records.dataset import Finding
from tests.builders.adapter_folders import base_copy
from tests.builders.data_sets import json_lines, load, write_lines
from tests.example import MODEL
from tests.left_out import needs_rooms

LINE_OF_PROMPT = b'{"prompt": "Where is Oslo?", "completion": "In Norway."}'
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


@needs_rooms("tables")
@pytest.mark.usefixtures("small_limits")
def test_a_packed_record_of_nothing_but_commas_counts_with_all_its_bytes(tmp_path: Path) -> None:
    record = b"," * 100_000 + b"\n"
    (tmp_path / "train.csv.gz").write_bytes(gzip.compress(b"prompt,completion\n" + record * 100))
    assert "it unpacks to more than 200 times its size" in damage_in(tmp_path).message


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


def nested_replacements(tokenizer: dict[str, Any]) -> None:
    doubling = {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}
    tokenizer["normalizer"] = {"type": "Sequence", "normalizers": [doubling] * 30}


SHOWN = "{% for m in messages %}{{ m.content }}{% endfor %}"
ENDLESS = "{% for a in range(100000) %}{% for b in range(100000) %}{% endfor %}{% endfor %}"
TEMPLATES = {  # each with what the message names; the first is judged in `make test`
    "a text of 8 GB": ("{% set x = 'a' * 8000000000 %}", "more than 271 MB of memory"),
    "a list that grows": (
        "{% set n = namespace(x=[0]) %}{% for a in range(99) %}{% set n.x = n.x + n.x %}"
        "{% endfor %}",
        "more than 271 MB of memory",
    ),
    "nested loops": (ENDLESS, "more than 3 seconds of processor time"),
    "one long operation": ("{% set x = 7 ** 30000000 %}", "more than 3 seconds of processor time"),
}


def write_rows(folder: Path, count: int = 1) -> None:
    rows = [
        {"prompt": f"Where is Oslo, number {n}?", "completion": "In Norway."} for n in range(count)
    ]
    write_lines(folder / "train.jsonl", rows)


def hostile_base(folder: Path, template: str) -> TokenizerSource:
    base_copy(folder, file="tokenizer_config.json", chat_template=template)
    (folder / "chat_template.jinja").write_text(template)
    return TokenizerSource(str(folder))


@pytest.mark.usefixtures("started_cell")
def test_a_sparse_file_beside_a_tokenizer_allows_no_more_memory(tmp_path: Path) -> None:
    template, limit = TEMPLATES["a text of 8 GB"]
    source = hostile_base(tmp_path / "base", template)
    with (tmp_path / "base" / "tokenizer.bin").open("wb") as file:
        file.write(bytes(4096))
        file.truncate(2**34)
    with pytest.raises(ConfigError, match=limit):
        source.load().apply_chat_template([{"role": "user", "content": "Where?"}])


@pytest.mark.parametrize(
    "escape",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "cycler.__init__.__globals__.os.system('touch ran')",
        "messages.append(1)",
    ],
)
def test_a_chat_template_does_not_leave_its_sandbox(escape, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = hostile_base(tmp_path / "base", f"{{{{ {escape} }}}}{SHOWN}")
    with pytest.raises(Exception, match="is unsafe"):
        source.load().apply_chat_template([{"role": "user", "content": "Where?"}])
    assert not (tmp_path / "ran").exists()


def test_a_small_tokenizer_beside_a_large_one_may_take_what_both_need(tmp_path: Path) -> None:
    large = base_copy(tmp_path / "large")
    (large / "tokenizer.model").write_bytes(bytes(20_000_000))
    with TokenizerCell() as cell:
        for folder in (large, MODEL):
            cell.ask(
                {
                    "job": "nested_core.models.tokenizer_cell:call_tokenizer",
                    "files": (str(folder), False, "as it is"),
                    "method": None,
                    "given": (),
                    "characters": 0,
                    "done": "loading",
                }
            )
        assert cell.allowance.memory_bytes > 20_000_000 * BYTES_PER_TOKENIZER_BYTE


def processor_time() -> float:
    """Seconds of this process and of those that it has waited for."""
    used = os.times()
    return used.user + used.system + used.children_user + used.children_system


@pytest.mark.usefixtures("started_cell")
@pytest.mark.parametrize(
    "name",
    [
        next(iter(TEMPLATES)),
        *(
            pytest.param(name, marks=pytest.mark.slow("a template runs until it is ended"))
            for name in list(TEMPLATES)[1:]
        ),
    ],
)
def test_a_chat_template_that_takes_too_much_is_one_message(name: str, tmp_path: Path) -> None:
    template, said = TEMPLATES[name]
    source = hostile_base(tmp_path / "model", template + SHOWN)
    write_rows(tmp_path)
    began, most = processor_time(), peak_memory()
    with pytest.raises(ConfigError) as refused:
        load(tmp_path, source, batch_size=1)
    assert re.fullmatch(
        rf"model: making tokens of train.jsonl, line 1 was ended: it took {said}. The cause is the "
        rf"chat template or tokenizer in {re.escape(source.folder)}: mend it, or give another "
        rf"model.",
        str(refused.value),
    )
    assert peak_memory() - most < 300 * 10**6
    end_kept_cell()
    assert processor_time() - began < 20


def peak_memory() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1024 if sys.platform == "linux" else 1
    )


@pytest.mark.slow("a template runs until it is ended")
@pytest.mark.usefixtures("started_cell")
def test_a_template_that_is_hostile_at_one_row_is_ended_there_in_each_process(tmp_path) -> None:
    hostile = "{% if '57' in messages[0].content %}" + ENDLESS + "{% endif %}" + SHOWN
    source = hostile_base(tmp_path / "model", hostile)
    write_rows(tmp_path, 100)
    with pytest.raises(ConfigError, match=r"train.jsonl, line 58 was ended: it took more than 3 "):
        load(tmp_path, source, batch_size=1)
    alone = as_test_set_alone(tmp_path / "train.jsonl", DataSettings(""))
    with (
        pytest.raises(ConfigError, match=rf"of {tmp_path}/train.jsonl, line 58 was"),
        alone as set_,
    ):
        load_dataset(set_, source)
    splits = {
        "train": LinesToTokenize(SplitFile("train.jsonl", tmp_path / "train.jsonl"), frozenset())
    }
    settings = DataSettings(str(tmp_path), max_seq_length=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parallel_tokenization, "RANGE_BYTES", 1000)
        with pytest.raises(ConfigError, match=r"train.jsonl, line 58 was ended"):
            tokenize_splits(tmp_path, splits, settings, source, processes=2)


@pytest.mark.slow("starts processes that are ended")
@pytest.mark.usefixtures("started_cell")
def test_a_tokenizer_that_takes_too_much_is_one_message(tmp_path: Path) -> None:
    source = hostile_base(tmp_path / "model", SHOWN)
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    nested_replacements(tokenizer)
    path.write_text(json.dumps(tokenizer))
    write_rows(tmp_path)
    with pytest.raises(ConfigError, match=r"line 1 was ended: it took more than \d+ MB of memory"):
        load(tmp_path, source, batch_size=1)
    with pytest.raises(ConfigError, match=r"making tokens of a text was ended: it took more than"):
        source.load().encode("a")
    sound = TokenizerSource(str(MODEL)).load()
    assert sound.encode("Where is Oslo?")  # the process is started again


@pytest.mark.parametrize("suffix", [".jsonl", pytest.param(".json", marks=needs_rooms("tables"))])
def test_a_row_of_millions_of_empty_objects_is_refused_before_they_are_made(
    tmp_path: Path, suffix: str
) -> None:
    many = b'{"prompt": "a", "completion": "b", "x": [' + b"{}," * 1_500_000 + b"0]}"
    rows = [LINE_OF_PROMPT, many, LINE_OF_PROMPT]
    content = b"\n".join(rows) if suffix == ".jsonl" else b"[" + b",".join(rows) + b"]"
    (tmp_path / f"train{suffix}").write_bytes(content)
    report, _ = load(tmp_path, batch_size=1)
    assert [(each.line, each.check) for each in report.findings if each.severity == "error"] == [
        (2, "bad-json")
    ]


@pytest.mark.parametrize(
    "suffix", [".jsonl.gz", pytest.param(".json", marks=needs_rooms("tables"))]
)
def test_a_file_that_is_a_hole_is_not_read(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"train{suffix}"
    line = LINE_OF_PROMPT + b"\n"
    path.write_bytes(gzip.compress(line) if suffix == ".jsonl.gz" else b"[" + line + b"]")
    os.truncate(path, 2**31)
    began = time.process_time()
    report, _ = load(tmp_path, batch_size=1)
    assert time.process_time() - began < 5
    assert [each.check for each in report.findings if each.severity == "error"] == ["damaged-file"]


@needs_rooms("tables")
def test_a_record_of_a_table_is_bounded_as_a_line_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its cells may go over lines, each of which is short enough."""
    from nested_core.rooms.tables import data_files

    monkeypatch.setattr(data_files, "MAX_LINE_BYTES", 40_000)
    cell = "\n".join("a" * 99 for _ in range(60))
    rows = ["prompt,completion", *(f'"{cell}",b{n}' for n in range(5)), f'"{cell}{cell}","{cell}"']
    (tmp_path / "train.csv").write_text("\n".join(rows) + "\n")
    report, _ = load(tmp_path, batch_size=1)
    errors = [each for each in report.findings if each.severity == "error"]
    assert [each.check for each in errors] == ["damaged-file"]
    assert "the record is longer than a line may be" in errors[0].message
    assert report.splits["train"].rows == 5


def test_a_packed_line_of_wide_characters_counts_by_what_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file_formats, "MAX_LINE_BYTES", 4_000)
    rows = [
        json.dumps({"prompt": "a", "completion": text}, ensure_ascii=False)
        for text in ("b", "\U0001f600" * 1_100)
    ]
    content = "".join(f"{row}\n" for row in rows).encode("utf-16")
    (tmp_path / "train.jsonl.gz").write_bytes(gzip.compress(content))
    report, _ = load(tmp_path, batch_size=1)
    errors = [(each.line, each.check) for each in report.findings if each.severity == "error"]
    assert errors == [(2, "damaged-file")]


@pytest.mark.slow("encodes a text of megabytes")
@pytest.mark.usefixtures("started_cell")
def test_a_short_text_after_a_long_one_may_take_what_it_needs() -> None:
    sound = TokenizerSource(str(MODEL)).load()
    words = ["Where", "is", "Oslo,", "the", "capital", "of", "Norway?"]
    draws = random.Random(1)
    for characters in (100, 3_000_000, 100, 20_000):
        text = " ".join(draws.choices(words, k=characters // 5))
        assert len(sound.encode(text)) > characters // 10


@pytest.mark.slow("encodes a text of megabytes")
@pytest.mark.usefixtures("started_cell")
def test_a_long_row_of_numbers_is_no_attack(tmp_path: Path) -> None:
    """Each digit is a token."""
    draws = random.Random(1)
    table = "\n".join(f"{draws.random():.12f}" for _ in range(60_000))
    turns = [("user", table), ("assistant", "In Norway."), ("user", "Why?"), ("assistant", "So.")]
    long = {"messages": [{"role": role, "content": content} for role, content in turns]}
    short = {"messages": [long["messages"][2], long["messages"][3]]}
    write_lines(tmp_path / "train.jsonl", [short, long, *[short] * 20])
    source = TokenizerSource(str(MODEL))
    report, _ = load(tmp_path, source, batch_size=1, supervise="all", max_seq_length=64)
    assert report.splits["train"].lines == 22


def test_a_chat_of_many_short_turns_takes_its_length_in_time(tmp_path: Path) -> None:
    turns = [{"role": ("user", "assistant")[n % 2], "content": str(n % 10)} for n in range(20_000)]
    write_lines(tmp_path / "train.jsonl", [{"messages": turns}])
    began = time.process_time()
    source = TokenizerSource(str(MODEL))
    report, _ = load(tmp_path, source, batch_size=1, max_seq_length=64)
    assert report.splits["train"].lines == 1
    tokens = encode_example(
        parse_line(json.dumps({"messages": turns}).encode(), FieldNames()), source.load(), "last"
    ).tokens
    assert time.process_time() - began < 8
    assert len(tokens) > 20_000


@pytest.mark.slow("a chat of a thousand turns")
@pytest.mark.usefixtures("started_cell")
def test_a_template_that_counts_the_calls_of_an_agent_is_no_attack(tmp_path: Path) -> None:
    """Each beginning of a chat is then rendered as a whole."""
    numbered = (
        "{% set calls = namespace(n=0) %}{% for m in messages %}{% if m.role == 'tool' %}"
        "<|user|>{{ calls.n }}:{{ m.content }}{% set calls.n = calls.n + 1 %}{% else %}"
        "<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}"
        "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    source = hostile_base(tmp_path / "model", numbered)
    turns = [{"role": "user", "content": "Where is Oslo?"}]
    for call in range(800):
        turns.append({"role": "assistant", "content": f"search {call}"})
        turns.append({"role": "tool", "content": "Lima is in Peru."})
    turns.append({"role": "assistant", "content": "Norway."})
    write_lines(tmp_path / "train.jsonl", [{"messages": turns}])
    report, _ = load(tmp_path, source, batch_size=1, supervise="all", max_seq_length=100_000)
    assert report.splits["train"].lines == 1, report.findings


def test_a_tokenizer_that_panics_is_a_finding(tmp_path: Path) -> None:
    source = hostile_base(tmp_path / "model", SHOWN)
    path = tmp_path / "model" / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    split = {"type": "Split", "behavior": "Isolated", "invert": False}
    hostile = [split | {"pattern": {"Regex": each}} for each in ("(a|a)*$x", "((a+)+)+c")]
    steps = [*hostile, tokenizer["pre_tokenizer"]]
    tokenizer["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
    path.write_text(json.dumps(tokenizer))
    write_lines(tmp_path / "train.jsonl", [{"prompt": "a" * 50, "completion": "b"}])
    problems = load(tmp_path, source, batch_size=1, max_seq_length=64)[0].findings
    assert any("PanicException: Onig: Regex search" in each.message for each in problems)


def test_a_process_that_was_started_in_another_folder_finds_a_relative_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert TokenizerSource(str(MODEL)).load().encode("Where is Oslo?")
    base_copy(tmp_path / "model")
    write_rows(tmp_path / "data")
    monkeypatch.chdir(tmp_path)
    report, splits = load(Path("data"), TokenizerSource("model"), batch_size=1)
    assert (report.errors, len(splits["train"])) == ((), 1)
