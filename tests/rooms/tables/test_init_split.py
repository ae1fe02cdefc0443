"""`init --split` on rows that are examples already: nothing about them is changed."""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import pytest

from flows.rooms.tables.command import add_flags
from nested_core import load_config
from nested_core.rooms import ROOMS
from tests.builders.data_sets import write_lines
from tests.example import DATA, MODEL
from tests.flows.conftest import called


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
    assert called(*command, "--overwrite", cwd=tmp_path).code == 0
    assert load_config(tmp_path / "lora-split.yaml").data == "data-split"


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
    assert added - {"-h", "--help"} == {*ROOMS["tables"].flags["init"]}
