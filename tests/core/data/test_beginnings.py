"""Where each answer of a chat is learnt, what begins the chat is known as trained on."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.pipeline import steps
from tests.builders.data_sets import found_in, load
from tests.core.data.conftest import WriteData
from tests.example import DATA, train_example

SYSTEM = {"role": "system", "content": "Be brief."}
FIRST = [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "Here."}]
SECOND = [{"role": "user", "content": "And then?"}, {"role": "assistant", "content": "There."}]
THIRD = [{"role": "user", "content": "At last?"}, {"role": "assistant", "content": "Home."}]
LEARNS_EACH: list[dict[str, Any]] = [{"supervise": "all"}, {"mask_prompt": False}]
judge = partial(load, batch_size=1)


def chat(*parts: list[dict[str, Any]]) -> dict[str, Any]:
    return {"messages": [turn for part in parts for turn in part]}


def masked(part: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [part[0], part[1] | {"weight": 0}]


@pytest.mark.parametrize("settings", LEARNS_EACH)
def test_a_held_out_row_that_begins_a_chat_of_train_is_leakage(
    settings: dict[str, Any], write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    train = [chat(THIRD), chat([SYSTEM], FIRST, SECOND, THIRD), chat(FIRST, THIRD)]
    held_out = [chat(FIRST), chat(FIRST, SECOND), chat(SECOND), chat(FIRST[:1], SECOND[1:])]
    folder = write_data(train=train, valid=held_out, test=[b" ", chat([SYSTEM], FIRST)])
    report, _ = judge(folder, tokenizer, **settings)
    assert found_in(report) == [
        ("valid.jsonl", 1, "leakage"),
        ("valid.jsonl", 2, "leakage"),
        ("test.jsonl", 2, "leakage"),
    ]
    assert "train.jsonl:2 begins with the same turns" in str(report.errors[0].message)
    report, splits = judge(folder, tokenizer, policy={"leakage": "drop"}, **settings)
    assert found_in(report) == []
    assert report.splits["train"].dropped["leakage"] == (2, 3)
    assert splits["train"].lines.tolist() == [1]
    assert splits["train"].beginnings.size == 0


def test_where_the_last_answer_alone_is_learnt_nothing_begins_it(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    folder = write_data(train=[chat(FIRST, SECOND), chat(THIRD)], valid=[chat(FIRST)])
    report, splits = judge(folder, tokenizer, mask_prompt=True)
    assert found_in(report) == []
    assert splits["train"].beginnings.size == 0


@pytest.mark.parametrize("settings", LEARNS_EACH)
def test_a_beginning_is_known_by_the_digest_of_a_row_and_ends_in_a_learnt_answer(
    settings: dict[str, Any], write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    train = [chat([SYSTEM], masked(FIRST), SECOND, THIRD), chat(FIRST, masked(SECOND))]
    rows = [chat(FIRST), chat(FIRST, SECOND), chat(FIRST, SECOND, THIRD)]
    _, rows_split = judge(write_data(train=rows, valid=[]), tokenizer, mask_prompt=True)
    one, two, three = rows_split["train"].contents.tolist()
    _, splits = judge(write_data(train=train, valid=[]), tokenizer, **settings)
    assert splits["train"].contents.tolist() == [three, two]
    np.testing.assert_array_equal(splits["train"].beginnings, [two, one])


@pytest.mark.usefixtures("own_random_state")
@pytest.mark.slow("trains and judges a run of its own")
def test_the_gate_leaves_out_what_begins_a_chat_of_which_each_answer_was_learnt(
    tmp_path: Path,
) -> None:
    (tmp_path / "data").mkdir()
    train, valid = (
        list(map(json.loads, (DATA / f"{split}.jsonl").read_text().splitlines()))
        for split in ("train", "valid")
    )
    chats = [
        chat(held_out["messages"], row["messages"])
        for held_out, row in zip(valid, train, strict=False)
    ]
    write_rows(tmp_path / "data" / "train.jsonl", [*chats[:4], *train[4:]])
    write_rows(tmp_path / "held_out.jsonl", valid)
    for supervise, left_out in (("all", 4), ("last", 0)):
        done = train_example(
            tmp_path / supervise,
            data=str(tmp_path / "data"),
            iters=4,
            mask_prompt=True,
            val_batches=0,
            training={"supervise": supervise},
            gate={"held_out": str(tmp_path / "held_out.jsonl")},
        )
        validation = steps.judge(done.config, done.run).validation
        assert validation is not None
        assert (validation.examples, validation.left_out) == (len(valid) - left_out, left_out)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
