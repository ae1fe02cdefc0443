"""`init --split` on rows that are examples already: nothing about them is changed."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import pytest

from flows.cli import build_parser
from flows.rooms.tables.command import add_flags, prepare_data, run_init
from nested_core import ConfigError, load_config
from nested_core.registry.data_store import RunExamples
from nested_core.rooms.tables.data_set import read_known_questions
from nested_core.seams import read_rooms
from tests.builders.data_sets import write_lines
from tests.builders.registering import promote, register
from tests.core.registry.conftest import write_run
from tests.example import DATA, MODEL
from tests.flows.conftest import called
from tests.rooms.tables.people_tables import named


@pytest.mark.slow("a command and its data")
def test_init_splits_data_that_has_only_train_in_a_new_folder(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    train = (DATA / "train.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "data" / "train.jsonl").write_text("".join(train[:20]))
    bare = called("init", "--data", "data", "--model", str(MODEL), "-o", "bare.yaml", cwd=tmp_path)
    (note,) = [line for line in bare.stderr.splitlines() if line.startswith("note: ")]
    assert "note: there is no data to evaluate the adapter on." in note
    pasted = shlex.split(note.partition(" for it: ")[2].strip("`"))  # as a person would
    assert f"#   {shlex.join(pasted)}" in (tmp_path / "bare.yaml").read_text()
    assert pasted[0] == "nested-tune"
    command = pasted[1:]
    done = called(*command, cwd=tmp_path)
    assert done.code == 0
    assert "data-split (train.jsonl 16, valid.jsonl 2, test.jsonl 2 rows" in done.stderr
    assert load_config(tmp_path / "lora-split.yaml").data == "data-split"
    again = called(*command, cwd=tmp_path)  # the file and the folder are said together
    assert again.code == 2
    assert "lora-split.yaml exists, and is not written over. Give another name" in again.message()
    assert "data-split exists, and is not written over. Take it as it is by" in again.message()


def test_the_split_that_is_offered_keeps_the_groups_that_were_asked_for(tmp_path: Path) -> None:
    rows = ({"prompt": f"What of {n}?", "completion": f"{n}.", "of": n // 4} for n in range(40))
    write_lines(tmp_path / "rows.jsonl", rows)
    given = ("--data", "rows.jsonl", "--model", str(MODEL), "--group", "of")
    bare = called("init", *given, "-o", "bare.yaml", cwd=tmp_path)
    pasted = shlex.split(bare.stderr.partition(" for it: `")[2].partition("`")[0])
    assert called(*pasted[1:], cwd=tmp_path).code == 0
    held = [
        {json.loads(line)["of"] for line in path.read_text().splitlines()}
        for path in (tmp_path / "rows-split").glob("[tv]*.jsonl")
    ]
    assert sum(map(len, held)) == len(set.union(*held)) == 10


def test_a_group_that_no_row_has_is_refused_with_and_without_a_split(tmp_path: Path) -> None:
    write_lines(tmp_path / "rows.jsonl", [{"prompt": f"{n}?", "completion": "x"} for n in range(9)])
    given = ("--data", "rows.jsonl", "--model", str(MODEL), "--group", "artcle")
    for more in ((), ("--split", "0.2")):
        refused = called("init", *given, *more, "-o", "out.yaml", cwd=tmp_path)
        assert refused.code == 2
        assert "--group: no row of rows.jsonl has a field 'artcle'" in refused.message()
    assert not (tmp_path / "out.yaml").exists()


def test_groups_that_valid_and_test_share_are_not_said_to_be_in_one_split(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    for name, first in (("train", 0), ("valid", 8), ("test", 8)):
        rows = [
            {"prompt": f"{name} {n}?", "completion": "x", "of": first + n % 2} for n in range(8)
        ]
        write_lines(tmp_path / "data" / f"{name}.jsonl", rows)
    given = ("--data", "data", "--model", str(MODEL), "--system", "Be brief.", "--group", "of")
    done = called("init", *given, "-o", "out.yaml", cwd=tmp_path)
    assert done.code == 0
    assert "each of is in one split" not in done.stderr


@pytest.mark.parametrize(
    ("sizes", "held_out"),
    [((50, 30, 4, 3), {3, 4}), ((50, 45, 30, 4, 3), {3, 4}), ((50, 30, 20), {20, 30})],
)
def test_the_smallest_groups_are_held_out_where_they_are_large(
    sizes: tuple[int, ...], held_out: set[int], tmp_path: Path
) -> None:
    rows = [
        {"prompt": f"{n} of {size}?", "completion": f"{n}.", "of": f"k{size}"}
        for size in sizes
        for n in range(size)
    ]
    write_lines(tmp_path / "rows.jsonl", rows)
    given = ("--data", "rows.jsonl", "--model", str(MODEL), "--group", "of", "--split", "0.1")
    done = called("init", *given, "-o", "out.yaml", cwd=tmp_path)
    assert done.code == 0, done.stderr
    found = {
        name: len((tmp_path / "rows-split" / f"{name}.jsonl").read_text().splitlines())
        for name in ("train", "valid", "test")
    }
    assert {found["valid"], found["test"]} == held_out
    assert sum(found.values()) == sum(sizes)
    told = f"valid has {found['valid']} rows, {round(sum(sizes) / 10)} were asked for"
    assert told in done.stderr
    assert "nearly are one another" not in done.stderr


def test_two_groups_are_too_few_for_three_splits(tmp_path: Path) -> None:
    rows = [{"prompt": f"{n}?", "completion": "x", "of": n % 2} for n in range(40)]
    write_lines(tmp_path / "rows.jsonl", rows)
    given = ("--data", "rows.jsonl", "--model", str(MODEL), "--group", "of", "--split", "0.1")
    refused = called("init", *given, "-o", "out.yaml", cwd=tmp_path)
    assert refused.code == 2
    assert "those of one of, or that ask one question count as one" in refused.message()


@pytest.mark.parametrize("name", ["tools", "messages", "weight"])
def test_a_group_named_as_a_field_of_chats_is_refused(name: str, tmp_path: Path) -> None:
    rows = [f"{n}?,{n}.,{n // 4}" for n in range(40)]
    (tmp_path / "rows.csv").write_text("\n".join([f"q,a,{name}", *rows]))
    columns = ("--prompt-feature", "q", "--completion-feature", "a", "--group", name)
    given = ("--data", "rows.csv", "--model", str(MODEL), *columns)
    refused = called("init", *given, "-o", "out.yaml", cwd=tmp_path)
    assert refused.code == 2
    assert f"--group: chats have a field '{name}' of their own" in refused.message()


def test_the_answers_are_no_group_to_keep_together(tmp_path: Path) -> None:
    rows = [{"prompt": f"Is it {n}?", "completion": f"label {n % 20}"} for n in range(200)]
    write_lines(tmp_path / "rows.jsonl", rows)
    given = ("--data", "rows.jsonl", "--model", str(MODEL), "--split", "0.2", "-o", "out.yaml")
    done = called("init", *given, cwd=tmp_path)
    assert done.code == 0
    assert "--group" not in done.stderr


def test_a_split_that_init_cannot_use_is_taken_away_again(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text("{}\n{ }\n" + '{"a": 1}\n{"a": 2}\n{"a": 3}\n')
    done = called("init", "--data", "data", "--model", str(MODEL), "--split", "0.2", cwd=tmp_path)
    assert done.code == 3
    assert "Written" not in done.stderr
    assert "The data set data is rejected" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["data"]


@pytest.mark.slow("a command and its data")
def test_init_says_and_writes_the_format_of_a_split_of_alpaca_rows(tmp_path: Path) -> None:
    rows = (
        {"instruction": f"Where is {n}?", "output": "Here.", "input": f"{n} km"} for n in range(12)
    )
    write_lines(tmp_path / "rows.jsonl", rows)
    arguments = ("init", "--data", "rows.jsonl", "--model", str(MODEL), "--split", "0.2")
    done = called(*arguments, "-o", "lora.yaml", cwd=tmp_path)
    assert done.code == 0
    assert "train.jsonl: alpaca, 8 of 8 rows" in done.stderr.splitlines()
    config = load_config(tmp_path / "lora.yaml")
    assert (config.data, config.data_format, config.mask_prompt) == ("rows-split", "alpaca", True)


def test_the_static_table_names_the_flags_that_the_room_adds() -> None:
    parser = argparse.ArgumentParser()
    add_flags(parser)
    added = {flag for action in parser._actions for flag in action.option_strings}
    assert added - {"-h", "--help"} == {*read_rooms()["tables"].flags["init"]}


def test_the_files_of_a_folder_are_listed_and_its_test_table_is_held_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("faq_train", "faq_test", "notes"):
        rows = "".join(f"{name} {n}?,Yes {n}.\n" for n in range(9))
        (tmp_path / "data" / f"{name}.csv").write_text(f"Q,A\n{rows}")
    prepared = prepare_data(parse("data", *named("Q", "A"), "--suite", "4"))
    assert prepared.data_set is not None
    assert prepared.data_set.rows == {"train": 9, "test": 9}
    assert prepared.messages[:2] == [
        "read: faq_train.csv (train), faq_test.csv (test)",
        "not read: notes.csv",
    ]
    assert "faq_test" not in (tmp_path / "data-split" / "train.jsonl").read_text()


def parse(data: str, *flags: str) -> argparse.Namespace:
    return build_parser("init").parse_args(("init", "--data", data, "--model", str(MODEL), *flags))


def test_rows_that_correct_the_champions_are_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    old = [{"prompt": f"Is {n} open?", "completion": "Yes."} for n in range(12)]
    examples = RunExamples(old[:8], old[8:10], kept_out=old[10:])
    trained = {"config": {"gate": {"tasks": [{"name": "words", "file": "words.jsonl"}]}}}
    version = register(
        write_run(tmp_path / "run", 1), tmp_path / "registry", "faq", trained, examples=examples
    )
    rows = [f"is {n} open?,No {n}.\n" for n in range(12)] + [
        f"Is {n} new?,Y {n}.\n" for n in range(12)
    ]
    (tmp_path / "night.csv").write_text("Q,A\n" + "".join(rows))
    arguments = parse(
        "night.csv", *named("Q", "A"), "--system", "Be.", "--champion", "registry/faq"
    )
    (tmp_path / "night-split").mkdir()  # which is no reason to keep a wrong name back
    with pytest.raises(ConfigError, match="has no champion whose rows are kept"):
        prepare_data(arguments)
    (tmp_path / "night-split").rmdir()
    promote(tmp_path / "registry", "faq", version, by="ann")
    prepared = prepare_data(arguments)
    assert prepared.data_set is not None
    assert prepared.data_set.rows == {"train": 22, "valid": 1, "test": 1}
    assert "asked in the champion's data too: 12 rows, all in train" in prepared.messages
    held_out = [
        (tmp_path / "night-split" / f"{name}.jsonl").read_text() for name in ("valid", "test")
    ]
    assert "open?" not in "".join(held_out)
    lines: dict[str, str] = {}
    (tmp_path / "night-split").rename(tmp_path / "other")
    arguments.write_configuration = lambda *_, **more: lines.update(more)
    run_init(arguments)
    assert 'registry: {path: "registry", name: "faq", promote: better}' in lines["registry"]
    assert "continual: {from: champion}" in lines["registry"]
    told = " ".join(capsys.readouterr().err.split())
    assert "the champion's eval set words (words.jsonl) is not asked" in told


@pytest.mark.slow("writes a configuration")
def test_rows_of_which_none_is_new_are_not_to_be_split(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    old = RunExamples([{"prompt": f"Is {n} open?", "completion": "Yes."} for n in range(12)], [])
    run, registry = write_run(tmp_path / "run", 1), tmp_path / "registry"
    promote(registry, "faq", register(run, registry, "faq", {}, examples=old), by="ann")
    rows = [f"Is {n} open?,No.\n" for n in range(12)]
    (tmp_path / "night.csv").write_text("Q,A\n" + "".join(rows))
    flags = (*named("Q", "A"), "--champion", "registry/faq")
    for count in ("5", "-1"):
        with pytest.raises(ConfigError) as refused:
            prepare_data(parse("night.csv", *flags, "--suite", count))
        told = f"--suite {count}: none can be drawn, for no question is new: the champion's data"
        assert told in str(refused.value)
    run_init(parse("night.csv", *flags, "-o", "night.yaml"))
    assert "--split" not in (tmp_path / "night.yaml").read_text()
    told = " ".join(capsys.readouterr().err.split())
    assert "asked in the champion's data too: 12 rows, all in train" in told
    assert "some held-out ones" not in told
    assert "--split" not in told
    assert "Too few rows ask what the champion's data does not: add rows that do" in told


@pytest.mark.slow("writes two configurations")
@pytest.mark.parametrize(("system", "is_told"), [("Be.", True), ("Sort it.", False)])
def test_another_system_text_than_the_champions_is_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    system: str,
    is_told: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    old = RunExamples([{"prompt": "Is it open?", "completion": "Yes."}], [])
    recorded = {"prompt_format": {"is_chat": True, "system": "Sort it.", "tools": None}}
    run, registry = write_run(tmp_path / "run", 1), tmp_path / "registry"
    promote(registry, "faq", register(run, registry, "faq", recorded, examples=old), by="ann")
    rows = [f"Is {n} open?,Yes {n}.\n" for n in range(12)]
    (tmp_path / "night.csv").write_text("Q,A\n" + "".join(rows))
    flags = (*named("Q", "A"), "--system", system, "--champion", "registry/faq")
    run_init(parse("night.csv", *flags))
    told = " ".join(capsys.readouterr().err.split())
    said = "system text of the rows: 'Be.'; of the champion's rows: 'Sort it.'. The run learns"
    assert (said in told) == is_told
    assert ("of the champion's rows" in told) == is_told


def test_that_some_rows_of_the_champion_are_not_known_is_said(tmp_path: Path) -> None:
    old = [{"prompt": f"Is {n} open?", "completion": "Yes."} for n in range(12)]
    run, registry = write_run(tmp_path / "run", 1), tmp_path / "registry"
    examples = RunExamples(old, [], 300)
    promote(registry, "faq", register(run, registry, "faq", {}, examples=examples), by="ann")
    with pytest.warns(UserWarning, match=r"--champion: \d+ of its rows are not known here"):
        assert 0 < len(read_known_questions(registry, "faq")) < 12
