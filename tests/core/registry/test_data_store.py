"""The data store of a name keeps the examples of its versions, once each, and gives them back."""

from __future__ import annotations

import json
import stat
from pathlib import Path
from typing import Any

import pytest

from nested_core.data.data_settings import DataSettings
from nested_core.data.example_rows import fold_prompt_and_answer, read_split_rows
from nested_core.errors import DamagedError
from nested_core.registry import register
from nested_core.registry.data_store import (
    RunExamples,
    digest_row,
    read_lineage,
    read_stored_data,
)
from tests.core.registry.conftest import write_run
from tests.core.registry.states import NAME

Row = dict[str, Any]


def question(number: int, answer: str = "yes") -> Row:
    return {"prompt": f"Is {number} a number?", "completion": answer}


def add_night(tmp_path: Path, seed: int, train: list[Row], held_out: list[Row]) -> str:
    run = write_run(tmp_path / f"run-{seed}", seed)
    examples = RunExamples(train, held_out)
    return register(run, tmp_path / "registry", NAME, {}, examples=examples)


def rows_of(registry: Path, version: str) -> tuple[list[Row], list[Row]]:
    data = read_stored_data(registry, NAME, version)
    assert data is not None
    return [row.row for row in data.train], [row.row for row in data.held_out]


def test_a_version_keeps_its_examples_and_rows_of_two_versions_are_kept_once(tmp_path):
    registry = tmp_path / "registry"
    first = add_night(tmp_path, 1, [question(1), question(2), question(1)], [question(3)])
    second = add_night(tmp_path, 2, [question(2), question(4)], [question(3)])
    assert rows_of(registry, first) == ([question(1), question(2)], [question(3)])
    assert rows_of(registry, second) == ([question(2), question(4)], [question(3)])
    packs = (registry / NAME / "data").glob("*.jsonl")
    lines = [line for pack in packs for line in pack.read_bytes().splitlines()]
    assert len(lines) == len({*lines}) == 4
    data = read_stored_data(registry, NAME, first)
    assert data is not None
    assert data.train[0].digest == digest_row(question(1))


def test_a_version_without_examples_has_no_stored_data(tmp_path):
    registry = tmp_path / "registry"
    version = register(write_run(tmp_path / "run", 1), registry, NAME, {})
    assert read_stored_data(registry, NAME, version) is None
    assert not (registry / NAME / "data").exists()


def test_only_the_owner_reads_the_store(tmp_path):
    add_night(tmp_path, 1, [question(1)], [])
    assert stat.S_IMODE((tmp_path / "registry" / NAME / "data").stat().st_mode) == 0o700


def test_an_altered_row_is_missing_and_a_list_that_is_none_is_damage(tmp_path):
    registry = tmp_path / "registry"
    version = add_night(tmp_path, 1, [question(1), question(2)], [question(3)])
    (pack,) = (registry / NAME / "data").glob("*.jsonl")
    pack.write_bytes(pack.read_bytes().replace(b"Is 2", b"Is 5"))
    data = read_stored_data(registry, NAME, version)
    assert data is not None
    assert [row.row for row in data.train] == [question(1)]
    assert data.missing == 1
    (registry / NAME / "data" / f"{version}.json").write_text('{"train": 3}')
    with pytest.raises(DamagedError, match=f"{version}.json: .*remove it"):
        read_stored_data(registry, NAME, version)


def test_the_lineage_follows_what_training_began_with_and_ends_at_a_fresh_adapter(tmp_path):
    registry = tmp_path / "registry"
    first, second = (
        register(write_run(tmp_path / name, seed), registry, NAME, {"parent": "0" * 64})
        for seed, name in enumerate(("before", "fresh"))
    )
    run = write_run(tmp_path / "third", 3, initial=second)
    third = register(run, registry, NAME, {"parent": second})
    followed = write_run(tmp_path / "fourth", 4, initial="1" * 64)
    fourth = register(followed, registry, NAME, {"parent": third})
    assert read_lineage(registry, NAME, first) == [first, "0" * 64]  # it was collected
    assert read_lineage(registry, NAME, third) == [third, second, "0" * 64]
    assert read_lineage(registry, NAME, fourth) == [fourth]


@pytest.mark.parametrize(
    ("line", "row"),
    [
        (
            {"instruction": "Name it.", "input": "A cat.", "output": "cat"},
            {
                "messages": [
                    {"role": "user", "content": "Name it.\nA cat."},
                    {"role": "assistant", "content": "cat"},
                ]
            },
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
            {
                "messages": [
                    {"role": "user", "content": "Hi"},
                    {"role": "assistant", "content": "Ho"},
                ]
            },
        ),
        ({"prompt": "Hi", "completion": "Ho"}, {"prompt": "Hi", "completion": "Ho"}),
        ({"text": "Hi Ho"}, {"text": "Hi Ho"}),
    ],
)
def test_rows_of_other_formats_become_rows_that_are_read_again_as_they_are(tmp_path, line, row):
    (tmp_path / "train.jsonl").write_text(f"{json.dumps({'text': 'no'})}\n{json.dumps(line)}\n")
    settings = DataSettings(str(tmp_path))
    first = read_split_rows(settings, "train")
    assert first is not None
    assert first.rows == [{"text": "no"}, row]
    (tmp_path / "train.jsonl").write_text(
        f"{json.dumps({'text': 'no'})}\nnot JSON\n{json.dumps(row)}\n"
    )
    assert read_split_rows(settings, "train") == first
    assert read_split_rows(settings, "valid") is None


def test_prompts_are_compared_without_case_and_white_space():
    prompt, answer = fold_prompt_and_answer({"prompt": "What is\nIT?", "completion": "A Cat"})
    turns = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "acat"}]
    assert (prompt, answer) == fold_prompt_and_answer({"messages": turns})
    assert fold_prompt_and_answer({"text": "A Cat"}) == (b"", b"acat")
