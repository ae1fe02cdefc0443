"""data_policy: what is dropped is gone from training, counted and listed; the rest stays."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.records.dataset import DatasetReport
from tests.builders.data_sets import found_in, load
from tests.core.data.conftest import TEMPLATE, WriteData, build_tokenizer

A, B, C, D, E = ({"text": f"{name} is the river of {name}land."} for name in "ABCDE")
LONG = {"text": "It is near the capital. " * 30}


judge = partial(load, batch_size=1)


def adds_up(report: DatasetReport) -> bool:
    """Whether no line of any file is lost."""
    return all(
        stats.lines
        == stats.blank + stats.rejected + sum(map(len, stats.dropped.values())) + stats.rows
        for stats in report.splits.values()
    )


def test_duplicates_are_kept_with_a_warning_by_default(write_data, tokenizer) -> None:
    report, splits = judge(write_data(train=[A, B, A], valid=[C]), tokenizer)
    assert ("train.jsonl", 3, "duplicate") in found_in(report, "warning")
    assert report.splits["train"].dropped == {}
    assert splits["train"].lines.tolist() == [1, 2, 3]


def test_dropped_duplicates_leave_the_first_of_each_are_counted_and_listed(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    folder = write_data(train=[A, B, b"", A, A, C, B], valid=[D])
    report, splits = judge(folder, tokenizer, policy={"duplicates": "drop"})
    assert splits["train"].lines.tolist() == [1, 2, 6]
    assert report.splits["train"].dropped == {"duplicate": (4, 5, 7)}
    assert report.splits["train"].rows == 3
    (told,) = [f for f in report.findings if f.check == "dropped-duplicate"]
    assert (told.line, told.severity) == (4, "warning")
    assert told.message == ("lines dropped because they repeat an earlier example: 3 (4, 5, 7)")
    assert "duplicate" not in [check for _, _, check in found_in(report, "warning")]
    assert adds_up(report)


def test_leakage_is_an_error_by_default_and_dropped_from_train_by_policy(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    folder = write_data(train=[A, B, C, B, D], valid=[B], test=[b" ", D])
    report, _ = judge(folder, tokenizer)
    assert found_in(report) == [("valid.jsonl", 1, "leakage"), ("test.jsonl", 2, "leakage")]
    report, splits = judge(folder, tokenizer, policy={"leakage": "drop"})
    assert found_in(report) == []
    assert splits["train"].lines.tolist() == [1, 3]
    assert splits["valid"].lines.tolist() == [1]
    assert splits["test"].lines.tolist() == [2]
    assert report.splits["train"].dropped == {"leakage": (2, 4, 5)}
    assert report.splits["valid"].dropped == {}
    assert adds_up(report)


def test_a_test_set_that_repeats_the_validation_set_is_an_error_by_default(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    folder = write_data(train=[A], valid=[B, C, C], test=[D, C, b"", b"{", C])
    report, _ = judge(folder, tokenizer)
    repeated = [finding for finding in report.findings if finding.check == "test-in-valid"]
    assert [(f.file, f.line, f.severity) for f in repeated] == [
        ("test.jsonl", 2, "error"),
        ("test.jsonl", 5, "error"),
    ]
    assert "the same example is in valid.jsonl:2" in repeated[0].message


def test_rows_that_come_twice_in_a_held_out_file_are_said_once_a_file(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    folder = write_data(train=[A, A], valid=[B, C, B, B], test=[D])
    report, _ = judge(folder, tokenizer)
    (found,) = [finding for finding in report.findings if finding.check == "repeated-held-out"]
    assert (found.file, found.line, found.severity) == ("valid.jsonl", 3, "warning")
    assert (
        "lines that repeat another one of this file: 2, the first of them line 1" in found.message
    )


def test_held_out_sets_stay_as_they_are_under_every_policy(write_data, tokenizer) -> None:
    folder = write_data(train=[A, B], valid=[B, C], test=[C, B, D])
    report, splits = judge(folder, tokenizer, policy={"leakage": "drop"})
    assert found_in(report) == []
    assert [check for check in found_in(report, "warning") if check[0] == "test.jsonl"] == [
        ("test.jsonl", 1, "test-in-valid"),
        ("test.jsonl", 2, "test-in-valid"),
    ]
    lines = {name: split.lines.tolist() for name, split in splits.items()}
    assert lines == {"train": [1], "valid": [1, 2], "test": [1, 2, 3]}
    assert adds_up(report)


def test_a_repeated_leak_is_counted_once(write_data: WriteData, tokenizer: TokenizerSource) -> None:
    folder = write_data(train=[A, B, B, C, C], valid=[B])
    policy = {"leakage": "drop", "duplicates": "drop"}
    report, splits = judge(folder, tokenizer, policy=policy)
    assert report.splits["train"].dropped == {"leakage": (2, 3), "duplicate": (5,)}
    assert splits["train"].lines.tolist() == [1, 4]
    assert adds_up(report)


def test_overlong_examples_are_cut_dropped_or_refused(write_data, tokenizer) -> None:
    folder = write_data(train=[A, LONG, B], valid=[C, LONG | {"text": LONG["text"][3:]}])
    report, splits = judge(folder, tokenizer, max_seq_length=64)
    assert ("train.jsonl", 2, "truncated") in found_in(report, "warning")
    assert splits["train"].lengths.max() == 64
    report, splits = judge(folder, tokenizer, policy={"overlong": "drop"}, max_seq_length=64)
    assert splits["train"].lines.tolist() == [1, 3]
    assert splits["valid"].lines.tolist() == [1]
    dropped = {split: stats.dropped for split, stats in report.splits.items()}
    assert dropped == {"train": {"overlong": (2,)}, "valid": {"overlong": (2,)}}
    assert "truncated" not in [check for _, _, check in found_in(report, "warning")]
    assert adds_up(report)
    report, _ = judge(folder, tokenizer, policy={"overlong": "error"}, max_seq_length=64)
    assert found_in(report) == [("train.jsonl", 2, "overlong"), ("valid.jsonl", 2, "overlong")]
    assert "shorten it, raise max_seq_length, or" in report.errors[0].message
    assert adds_up(report)


@pytest.mark.slow("loads a data set several times")
def test_an_example_as_long_as_the_bound_is_neither_cut_nor_dropped(write_data, tokenizer) -> None:
    folder = write_data(train=[A, LONG, B], valid=[C])
    _, whole = judge(folder, tokenizer, max_seq_length=1000)
    longest = int(whole["train"].lengths.max())
    report, splits = judge(folder, tokenizer, policy={"overlong": "drop"}, max_seq_length=longest)
    assert splits["train"].lengths.tolist() == whole["train"].lengths.tolist()
    assert report.splits["train"].dropped == {}
    _, splits = judge(folder, tokenizer, policy={"overlong": "drop"}, max_seq_length=longest - 1)
    assert splits["train"].lines.tolist() == [1, 3]


def test_a_line_with_an_error_is_rejected_and_not_dropped(write_data, tokenizer) -> None:
    bad = {"text": "A is the river.", "x": 1}
    folder = write_data(train=[A, b"{", A, bad, {"text": " "}, {"text": " "}], valid=[C])
    report, _ = judge(folder, tokenizer, policy={"duplicates": "drop"})
    assert report.splits["train"].dropped == {"duplicate": (3,)}
    assert report.splits["train"].rejected == 3
    assert adds_up(report)


@pytest.mark.parametrize(
    ("row", "policy", "why"),
    [
        (
            B,
            {"leakage": "drop"},
            "2, valid or test has the same example, or the beginning of the chat); write one",
        ),
        (LONG, {"overlong": "drop"}, "2, they are longer than max_seq_length); give shorter rows"),
    ],
)
def test_a_file_of_which_nothing_is_left_is_an_error(
    write_data, tokenizer, row, policy, why
) -> None:
    folder = write_data(train=[row, row], valid=[B])
    report, _ = judge(folder, tokenizer, policy=policy, max_seq_length=64)
    assert found_in(report) == [("train.jsonl", None, "empty-file")]
    assert f"(lines: 2; dropped: {why}" in report.errors[0].message


def test_what_is_left_must_fill_a_batch(write_data: WriteData, tokenizer: TokenizerSource) -> None:
    folder = write_data(train=[A, B, A, A], valid=[C])
    report, _ = load(folder, tokenizer, policy={"duplicates": "drop"}, batch_size=3)
    assert found_in(report) == [("train.jsonl", None, "too-few-rows")]
    assert "it holds 2 of the 3 rows that fill one batch" in report.errors[0].message


DEVELOPER = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": "Where is A?"},
    {"role": "assistant", "content": "In Aland."},
]
GREETING = [
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Where is B?"},
    {"role": "assistant", "content": "In Bland."},
]
SYSTEM_LATER = [GREETING[1], GREETING[2], {"role": "system", "content": "It is the capital."}]


def chats(*conversations: Any) -> list[dict[str, Any]]:
    return [{"messages": messages} for messages in conversations]


def test_roles_and_their_order_are_judged_by_default(write_data, tokenizer) -> None:
    folder = write_data(train=chats(DEVELOPER, GREETING, SYSTEM_LATER, GREETING[1:]))
    report, _ = judge(folder, tokenizer, policy={"roles": "strict"})
    assert report == judge(folder, tokenizer)[0]
    assert found_in(report) == [
        ("train.jsonl", 1, "unknown-role"),
        ("train.jsonl", 2, "role-order"),
        ("train.jsonl", 3, "last-turn-not-assistant"),
        ("train.jsonl", 3, "role-order"),
    ]


@pytest.mark.parametrize("settings", [{}, {"mask_prompt": True}, {"supervise": "all"}])
def test_a_chat_template_that_takes_other_roles_decides_where_it_is_asked(
    write_data: WriteData, tokenizer: TokenizerSource, settings: dict[str, Any]
) -> None:
    folder = write_data(train=chats(DEVELOPER, GREETING), valid=chats(GREETING[1:]))
    report, splits = judge(folder, tokenizer, policy={"roles": "template"}, **settings)
    assert found_in(report) == []
    wrapped = tokenizer.load()
    texts = [wrapped.decode(splits["train"].example(row).tolist()) for row in range(2)]
    assert texts == [
        "<|developer|>Be brief.<|end|><|user|>Where is A?<|end|><|assistant|>In Aland.<|end|>",
        "<|assistant|>Hello.<|end|><|user|>Where is B?<|end|><|assistant|>In Bland.<|end|>",
    ]
    assert report.splits["train"].roles == {"user": 2, "assistant": 3, "other": 1}


def test_a_line_that_the_chat_template_refuses_is_an_error_with_its_message(write_data) -> None:
    template = TEMPLATE.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.role not in ('user', 'assistant', 'developer') %}"
        "{{ raise_exception('no turns of ' + m.role) }}{% endif %}",
    )
    folder = write_data(
        train=chats(DEVELOPER, [{"role": "critic", "content": "Is it?"}, *GREETING])
    )
    report, splits = judge(folder, build_tokenizer(template), policy={"roles": "template"})
    assert found_in(report) == [("train.jsonl", 2, "chat-template-raised")]
    assert "no turns of critic" in report.errors[0].message
    assert splits["train"].lines.tolist() == [1]


def test_what_is_no_text_is_an_error_in_any_role(write_data, tokenizer) -> None:
    bad = [{"role": 3, "content": "x"}], [{"role": "developer", "content": 3}], [{"content": "x"}]
    report, _ = judge(write_data(train=chats(*bad)), tokenizer, policy={"roles": "template"})
    assert found_in(report)[:3] == [
        ("train.jsonl", 1, "wrong-type"),
        ("train.jsonl", 2, "wrong-type"),
        ("train.jsonl", 3, "missing-field"),
    ]
