"""What only the neighbours of a line, the whole file or the tokens can tell."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from tests.builders.data_sets import (
    GOOD,
    HELD_OUT,
    Found,
    chat,
    errors_in,
    found_in,
    load,
    warnings_in,
)
from tests.core.data.conftest import TEMPLATE, WriteData, build_tokenizer
from tests.left_out import needs_rooms

TEXTS = [{"text": f"{place} is in {place}land."} for place in "ABCD"]


def test_a_sound_data_set_gives_no_error_and_no_warning(write_data, tokenizer) -> None:
    folder = write_data(train=GOOD, valid=HELD_OUT, test=[chat("Where is Y?", "In Yland.")])
    assert errors_in(folder, tokenizer=tokenizer, mask_prompt=True) == []
    assert warnings_in(folder, tokenizer, mask_prompt=True) == []


FILE_ERRORS: dict[str, tuple[dict[str, list[Any]], list[Found]]] = {
    "no train file": ({"valid": HELD_OUT}, [("train.jsonl", None, "missing-train-file")]),
    "empty train": ({"train": [], "valid": HELD_OUT}, [("train.jsonl", None, "empty-file")]),
    "blank train": ({"train": [b"", b" "]}, [("train.jsonl", None, "empty-file")]),
    "empty valid": ({"train": GOOD, "valid": []}, [("valid.jsonl", None, "empty-file")]),
    "three rows, batch of four": ({"train": GOOD[:3]}, [("train.jsonl", None, "too-few-rows")]),
    "train row in valid": (
        {"train": GOOD, "valid": [*HELD_OUT, GOOD[2]]},
        [("valid.jsonl", 2, "leakage")],
    ),
    "train row in test": (
        {"train": GOOD, "valid": HELD_OUT, "test": [b"", GOOD[0]]},
        [("test.jsonl", 2, "leakage")],
    ),
    "train row in test, as a completion": (
        {
            "train": GOOD,
            "valid": HELD_OUT,
            "test": [{"prompt": "Where is A?", "completion": "In Aland."}],
        },
        [("test.jsonl", 1, "leakage")],
    ),
}


@pytest.mark.parametrize("name", FILE_ERRORS)
def test_an_unfit_file_is_named(name: str, write_data: WriteData) -> None:
    splits, expected = FILE_ERRORS[name]
    assert errors_in(write_data(**splits)) == expected


def test_names_that_are_not_utf8_do_no_harm_and_are_shown_escaped(
    write_data: WriteData, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a disk of another system may hold; the working directory may have such a name too."""
    working = tmp_path / os.fsdecode(b"r\xe9sum\xe9")
    working.mkdir()
    folder = write_data(train=GOOD, valid=HELD_OUT).rename(working / "data")
    (folder / os.fsdecode(b"caf\xe9.txt")).touch()
    monkeypatch.chdir(working)
    assert errors_in(Path("data")) == []
    (folder / "train.jsonl").unlink()
    report, _ = load(Path("data"))
    assert "r\\xe9sum\\xe9/data, which holds caf\\xe9.txt, valid.jsonl;" in report.errors[0].message


def test_masking_prompts_of_plain_text_is_refused(write_data: WriteData) -> None:
    folder = write_data(train=TEXTS)
    assert errors_in(folder, mask_prompt=True) == [("train.jsonl", None, "mask-prompt-on-text")]


def test_an_odd_first_row_is_the_one_that_is_named(write_data: WriteData) -> None:
    folder = write_data(train=[TEXTS[0], *GOOD])
    assert errors_in(folder) == [("train.jsonl", 1, "mixed-format")]


WARNINGS: dict[str, tuple[dict[str, list[Any]], list[Found]]] = {
    "no validation set": ({"train": GOOD}, [("valid.jsonl", None, "no-validation-set")]),
    "duplicates": (
        {"train": [*GOOD, GOOD[1], GOOD[1]], "valid": HELD_OUT},
        [("train.jsonl", 5, "duplicate"), ("train.jsonl", 6, "duplicate")],
    ),
    "duplicate in other JSON": (
        {"train": [*TEXTS, b'{ "text" : "A is in \\u0041land." }'], "valid": [{"text": "z"}]},
        [("train.jsonl", 5, "duplicate")],
    ),
    "near-duplicate": (
        {"train": [*GOOD, chat("where  is a?", "In Aland.\n")], "valid": HELD_OUT},
        [("train.jsonl", 5, "near-duplicate")],
    ),
    "near-duplicate in valid": (
        {"train": GOOD, "valid": [chat("WHERE IS A?", "In Aland.")]},
        [("valid.jsonl", 1, "near-duplicate")],
    ),
    "near-duplicate with an end text": (
        {"train": GOOD, "valid": [chat("Where is A?", "In Aland.<|im_end|>")]},
        [("valid.jsonl", 1, "near-duplicate")],
    ),
    "other answer": (
        {"train": GOOD, "valid": [chat("Where is A?", "Elsewhere.")]},
        [("valid.jsonl", 1, "same-prompt-other-answer")],
    ),
    "unknown keys, once a file": (
        {"train": [chat("a", "b", id=1), chat("c", "d", id=2), *GOOD], "valid": HELD_OUT},
        [("train.jsonl", 1, "unknown-key")],
    ),
    "byte-order mark": (
        {"train": [b'\xef\xbb\xbf{"text": "a"}', *TEXTS], "valid": [{"text": "z"}]},
        [("train.jsonl", 1, "byte-order-mark")],
    ),
    "CRLF, once a file": (
        {"train": [*TEXTS, b'{"text": "a"}\r', b'{"text": "b"}\r'], "valid": [{"text": "z"}]},
        [("train.jsonl", 5, "crlf")],
    ),
    "control characters": (
        {"train": [*TEXTS, b'{"text": "a\\u0007"}', b'{"text": "\\b"}', b'{"text": "\x7f"}']}
        | {"valid": [{"text": "z"}]},
        [("train.jsonl", line, "control-character") for line in (5, 6, 7)],
    ),
    "control character in a call": (
        {"train": [*GOOD, chat("a\x02", "b", tools=[{"name": "f"}])], "valid": HELD_OUT},
        [("train.jsonl", 5, "control-character")],
    ),
    "replacement characters": (
        {"train": [*TEXTS, {"text": "a\ufffd"}, '{"text": "\ufffd"}'.encode()]}
        | {"valid": [{"text": "z"}]},
        [("train.jsonl", 5, "replacement-character"), ("train.jsonl", 6, "replacement-character")],
    ),
}


@pytest.mark.parametrize("name", WARNINGS)
def test_a_doubtful_line_is_named(name: str, write_data: WriteData) -> None:
    splits, expected = WARNINGS[name]
    folder = write_data(**splits)
    assert warnings_in(folder) == expected
    assert errors_in(folder) == []


def test_an_example_cut_before_its_answer_is_an_error(write_data, tokenizer) -> None:
    folder = write_data(train=[*GOOD, chat("x" * 200, "y")], valid=HELD_OUT)
    settings: dict[str, Any] = {"tokenizer": tokenizer, "max_seq_length": 64}
    assert errors_in(folder, mask_prompt=True, **settings) == [
        ("train.jsonl", 5, "no-supervised-token")
    ]
    assert errors_in(folder, **settings) == []


def test_a_template_that_rewrites_the_prompt_cannot_be_masked(write_data: WriteData) -> None:
    rewriting = "{{ messages | length }}" + TEMPLATE
    folder = write_data(train=GOOD, valid=HELD_OUT)
    tokenizer = build_tokenizer(rewriting)
    found = errors_in(folder, tokenizer=tokenizer, mask_prompt=True)
    assert found == [
        *(("train.jsonl", line, "prompt-not-a-prefix") for line in (1, 2, 3, 4)),
        ("valid.jsonl", 1, "prompt-not-a-prefix"),
    ]
    assert errors_in(folder, tokenizer=tokenizer) == []


@pytest.mark.parametrize("is_masked", [True, False])
def test_a_generation_prompt_that_rows_lack_is_said_with_what_differs(
    write_data: WriteData, is_masked: bool
) -> None:
    end = "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    thinking = TEMPLATE.replace(end, end.replace("<|assistant|>", "<|assistant|><think></think>"))
    thought = [chat(f"Where is {place}?", f"<think></think>In {place}land.") for place in "ABCD"]
    held_out = [chat("Where is Z?", "<think></think>In Zland.")]
    tokenizer = build_tokenizer(thinking)
    folder = write_data(train=[*GOOD[:2], *thought[2:]], valid=held_out)
    report, _ = load(folder, tokenizer=tokenizer, mask_prompt=is_masked)
    errors, warnings = report.errors, [one for one in report.warnings if "prefix" in one.check]
    found = errors if is_masked else warnings
    assert [len(errors), len(warnings)] == [2, 0] if is_masked else [0, 1]
    assert {one.check for one in found} == {"prompt-not-a-prefix"}
    shown = "goes on with '<think></think>' where a row goes on with 'It is a lighthouse."
    assert all(shown in one.message for one in found)
    assert all("mask_prompt" not in one.message for one in found)
    folder = write_data(train=thought, valid=held_out)
    assert errors_in(folder, tokenizer=tokenizer, mask_prompt=is_masked) == []
    assert warnings_in(folder, tokenizer, mask_prompt=is_masked) == []


def test_a_template_that_writes_nothing_leaves_nothing_to_learn(write_data: WriteData) -> None:
    found = errors_in(write_data(train=GOOD, valid=HELD_OUT), tokenizer=build_tokenizer(""))
    assert {check for _, _, check in found} == {"no-supervised-token"}
    assert len(found) == 5


def test_a_missing_chat_template_is_an_error_for_chats_only(write_data, bare_tokenizer) -> None:
    folder = write_data(train=GOOD, valid=TEXTS)
    found = errors_in(folder, tokenizer=bare_tokenizer)
    assert found == [("train.jsonl", None, "chat-template-missing")]


def test_answers_of_one_token_and_without_an_end_are_told_once_a_file(write_data) -> None:
    endless = TEMPLATE.replace("<|end|>{% endfor %}", "{% endfor %}")
    folder = write_data(train=[chat(str(n), "x") for n in range(4)], valid=HELD_OUT)
    found = warnings_in(folder, build_tokenizer(endless), mask_prompt=True)
    assert found == [
        ("train.jsonl", 1, "short-answer"),
        ("train.jsonl", 1, "no-end-of-sequence"),
        ("valid.jsonl", 1, "no-end-of-sequence"),
    ]


def test_few_held_out_rows_and_answers_that_are_all_the_same_are_said(write_data) -> None:
    same = [chat(f"Is {place} here?", "No.") for place in "PQRST"]
    folder = write_data(train=GOOD, valid=same, test=HELD_OUT)
    assert warnings_in(folder) == [("valid.jsonl", None, "one-answer")]
    assert ("test.jsonl", None, "few-held-out-rows") in found_in(load(folder)[0], "info")
    different = write_data(train=GOOD, valid=[*same[:4], chat("Is U here?", "Yes.")])
    assert warnings_in(different) == []
    assert ("valid.jsonl", None, "few-held-out-rows") not in found_in(load(different)[0], "info")


@needs_rooms("tables")
def test_an_error_of_a_spreadsheet_in_the_place_of_a_text_is_a_warning_at_its_line(
    write_data: WriteData,
) -> None:
    folder = write_data()
    cells = ("#N/A", " #REF! ", "#DIV/0!", "#NAME?", "Err:508", "NaN", "#N/A means none", "nan")
    rows = "".join(f"{n}?,{cell}\n" for n, cell in enumerate(cells))
    (folder / "train.csv").write_text(f"prompt,completion\n{rows}#VALUE!,8\n")
    found = [one for one in warnings_in(folder) if one[2] == "error-cell"]
    assert found == [("train.csv", line, "error-cell") for line in (2, 3, 4, 5, 6, 7, 10)]
