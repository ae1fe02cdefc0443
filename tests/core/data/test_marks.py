"""Marks of rows and turns, such as `weight: 0`: masked to the token, kept, or refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from nested_core.data.data_settings import DataSettings
from nested_core.data.example_rows import RowKeys, read_split_rows
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from tests.builders.data_sets import found_in, load, warnings_in
from tests.core.data.conftest import WriteData
from tests.core.data.test_supervise_all import learnt, load_all
from tests.left_out import needs_rooms

BAD, GOOD = "No idea.<|end|>", "In Norway.<|end|>"
TURNS = [
    {"role": "user", "content": "Oslo?"},
    {"role": "assistant", "content": "No idea."},
    {"role": "user", "content": "Please."},
    {"role": "assistant", "content": "In Norway."},
]


def chat(
    first: dict[str, Any] | None = None, last: dict[str, Any] | None = None, **row: Any
) -> Any:
    """The conversation with these marks of its answers, and of the row."""
    return {
        "messages": [TURNS[0], TURNS[1] | (first or {}), TURNS[2], TURNS[3] | (last or {})]
    } | row


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        *[(chat({key: False}), [GOOD]) for key in ("train", "trainable", "loss")],
        *[(chat({key: 0}, {key: 1.0}), [GOOD]) for key in ("weight", "loss_mask", "train")],
        (chat({"weight": "0"}), [GOOD]),
        (chat({"weight": 1, "train": False}), [GOOD]),
        (chat(last={"weight": 0}), [BAD]),
        (chat(loss_mask=[0, 1]), [GOOD]),
        (chat(loss_mask=[1, 0, 0, 1]), [GOOD]),
        (chat(loss_mask="[1, 0]"), [BAD]),
        (chat({"loss": 0.0}, loss=0.0, train=True, weight=1), [BAD, GOOD]),
    ],
)
def test_a_mark_masks_its_answer_and_nothing_else(row, expected, write_data, tokenizer) -> None:
    report, splits = load_all(write_data(train=[row]), tokenizer)
    assert found_in(report) == []
    assert learnt(splits["train"], tokenizer) == expected


def test_without_masked_prompts_all_but_the_marked_turns_is_learnt(write_data, tokenizer) -> None:
    folder = write_data(train=[chat({"weight": 0}), chat(last={"weight": 0})])
    split = load(folder, tokenizer, batch_size=1)[1]["train"]
    asked = "Oslo?<|end|><|assistant|>"
    between = "<|user|>Please.<|end|><|assistant|>"
    assert learnt(split, tokenizer, 0) == [asked, f"{between}{GOOD}"]
    assert learnt(split, tokenizer, 1) == [f"{asked}{BAD}{between}"]


def test_a_row_whose_only_learnt_answer_is_marked_is_refused_by_name(write_data, tokenizer) -> None:
    folder = write_data(train=[chat(), chat({"weight": 0}), chat(last={"weight": 0})])
    report, _ = load(folder, tokenizer, mask_prompt=True, batch_size=1)
    assert found_in(report) == [("train.jsonl", 3, "nothing-to-learn")]
    message = report.errors[0].message
    assert "(messages[3].weight): leave the row out" in message
    assert message.endswith("or learn the other answers with training.supervise: all")


def test_marks_are_kept_by_rows_that_are_read_again(write_data, tokenizer) -> None:
    sharegpt = {
        "system": "Be brief.",
        "conversations": [
            {"from": "human", "value": "Oslo?"},
            {"from": "gpt", "value": "No idea.", "loss": False},
            {"from": "human", "value": "Please."},
            {"from": "gpt", "value": "In Norway."},
        ],
    }
    folder = write_data(train=[sharegpt])
    read = read_split_rows(DataSettings(str(folder)), "train")
    assert read is not None
    assert [row["loss_mask"] for row in read.rows] == [[1, 1, 0, 1, 1]]
    again = write_data(train=read.rows)
    assert learnt(load_all(again, tokenizer)[1]["train"], tokenizer) == [GOOD]


def test_rows_that_differ_in_marks_are_different_rows_and_alike_to_replay(write_data) -> None:
    marked, plain = chat({"weight": 0}), chat()
    policy = {"duplicates": "drop"}
    folder = write_data(train=[marked, plain, marked])
    report, _ = load(folder, policy=policy, batch_size=1)
    assert report.splits["train"].dropped == {"duplicate": (3,)}
    other, _ = load(write_data(train=[plain, marked]), batch_size=1)
    plain_alone, _ = load(write_data(train=[plain, plain]), batch_size=1)
    assert other.digest != plain_alone.digest
    assert RowKeys.of(marked).content != RowKeys.of(plain).content
    assert RowKeys.of(marked).folded == RowKeys.of(plain).folded
    held_out = write_data(train=[marked], valid=[plain])
    assert ("valid.jsonl", 1, "near-duplicate") in warnings_in(held_out, batch_size=1)


@needs_rooms("tables")
def test_a_mark_in_a_table_is_a_word(write_data: WriteData, tokenizer: TokenizerSource) -> None:
    folder = write_data()
    (folder / "train.csv").write_text("prompt,completion,weight\na,b,1\nc,d,0\ne,f,\n")
    report, _ = load(folder, tokenizer, batch_size=1)
    assert found_in(report) == [("train.csv", 3, "nothing-to-learn")]
    assert not [one for one in report.findings if one.check == "unknown-key"]
    (folder / "train.csv").unlink()
    chats = json.dumps(TURNS).replace('"', '""')
    (folder / "train.csv").write_text(f'messages,loss_mask\n"{chats}","[0, 1]"\n')
    assert learnt(load_all(folder, tokenizer)[1]["train"], tokenizer) == [GOOD]


def test_a_logged_loss_is_an_unread_key_and_no_mark(write_data: WriteData) -> None:
    folder = write_data(train=[chat({"loss": 0.0}, loss=0.0), chat({"loss": 0.1}, id=1)])
    report, _ = load(folder, batch_size=1)
    (found,) = [one.message for one in report.findings if one.check == "unknown-key"][:1]
    assert found.startswith("ignored: loss, messages[].loss")
