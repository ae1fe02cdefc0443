"""Rows of preferences: what is read, what is refused, and what tokens they become."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nested_core.config.loading import parse_config
from nested_core.data.data_settings import DataSettings
from nested_core.data.dataset_loading import load_dataset
from nested_core.data.example_rows import RowKeys, read_split_rows
from nested_core.data.lines.example_parsing import FieldNames, parse_line, read_examples
from nested_core.data.lines.json_decoding import LineProblem
from nested_core.data.lines.line_rows import encode_content
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.errors import ConfigError
from nested_core.rooms.preferences.answer_rows import correlate_length_and_choice
from nested_core.rooms.preferences.side_by_side import lay_out, read_pair, round_up_width
from tests.rooms.preferences.pair_data import BASE, list_pairs, make_values, write_rows

ASKED = [{"role": "user", "content": "Why?"}]
YES, NO = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
PAIR = {"prompt": "Why?", "chosen": "Yes.", "rejected": "No."}


def parse(row: dict[str, Any], loss: str = "dpo") -> Any:
    return parse_line(json.dumps(row).encode(), FieldNames(loss=loss))


def findings(folder: Path, loss: str = "dpo", **splits: Any) -> set[tuple[str, int | None, str]]:
    """File, line and check of each error and warning."""
    data = write_rows(folder, splits)
    report, _ = load_dataset(DataSettings(str(data), batch_size=1, loss=loss), None)
    listed = [one for one in report.findings if one.severity != "info"]
    return {(one.file, one.line, one.check) for one in listed}


@pytest.mark.parametrize(
    "row",
    [
        PAIR,
        {"prompt": ASKED, "chosen": YES, "rejected": NO},
        {"prompt": "Why?", "chosen": [*ASKED, YES], "rejected": [*ASKED, NO]},
        {"messages": [*ASKED, YES], "rejected": "No."},
        {"chosen": [*ASKED, YES], "rejected": [*ASKED, NO]},
        {"prompt": "Why?", "chosen": json.dumps([YES]), "rejected": json.dumps([NO])},
        {**PAIR, "score_chosen": 4.5, "prompt_id": "a1"},
    ],
    ids=["texts", "turns", "with the prompt", "messages", "no prompt", "cells", "other keys"],
)
def test_each_way_to_write_a_pair_is_the_same_pair(row: dict[str, Any]) -> None:
    example = parse(row)
    assert example.messages == [*ASKED, YES]
    assert example.rest == {"rejected": "No."}


def test_an_answer_that_is_json_stays_a_text() -> None:
    example = parse({"prompt": "As JSON?", "chosen": '{"a": 1}', "rejected": "[1, 2]"})
    assert (example.messages[-1]["content"], example.rest["rejected"]) == ('{"a": 1}', "[1, 2]")


@pytest.mark.parametrize(
    ("row", "check"),
    [
        (PAIR | {"rejected": " Yes. "}, "equal-answers"),
        (PAIR | {"rejected": ""}, "empty-answer"),
        ({"prompt": "Why?", "chosen": "Yes."}, "missing-field"),
        ({"prompt": "Why?", "chosen": [*ASKED, YES], "rejected": [YES, NO]}, "other-prompt"),
        ({"chosen": [*ASKED, YES], "rejected": ASKED}, "no-answer"),
        ({"chosen": [*ASKED, YES], "rejected": [YES, *ASKED, NO]}, "other-prompt"),
        ({"messages": [*ASKED, YES], "rejected": [YES, *ASKED, NO]}, "other-prompt"),
        ({"chosen": "Why? Yes.", "rejected": "Why? No."}, "no-answer"),
        ({"messages": ASKED, "rejected": "No."}, "no-answer"),
        (PAIR | {"context": "What was said before."}, "unread-field"),
        ({"text": "Only a text."}, "unknown-format"),
        (PAIR | {"prompt": [{"role": "bot", "content": "Why?"}]}, "unknown-role"),
        (PAIR | {"prompt": [*ASKED, YES | {"tool_calls": "ask"}]}, "malformed-tool-calls"),
        (PAIR | {"tools": [{"function": "ask"}]}, "malformed-tools"),
    ],
)
def test_a_row_that_prefers_nothing_is_refused(row: dict[str, Any], check: str) -> None:
    with pytest.raises(LineProblem) as problem:
        parse(row)
    assert problem.value.check == check


def test_without_a_loss_pairs_are_refused_as_before() -> None:
    with pytest.raises(LineProblem, match="preference pairs") as problem:
        parse_line(json.dumps(PAIR).encode(), FieldNames())
    assert problem.value.check == "preference-pair"


def test_swapped_and_shared_pairs_are_errors_at_their_lines(tmp_path: Path) -> None:
    swapped = {"prompt": "Why?", "chosen": "No.", "rejected": "Yes."}
    other = {"prompt": "How?", "chosen": "So.", "rejected": "Not."}
    found = findings(tmp_path / "pairs", train=[PAIR, swapped, other], valid=[other])
    assert ("train.jsonl", 2, "swapped-pair") in found
    assert ("valid.jsonl", 1, "leakage") in found


def test_length_that_tells_the_choice_is_told_with_its_correlation(tmp_path: Path) -> None:
    assert ("train.jsonl", None, "length-tells-choice") in findings(
        tmp_path / "short", train=list_pairs("train")
    )
    even = [
        row if number % 2 else {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        for number, row in enumerate(list_pairs("train"))
    ]
    assert findings(tmp_path / "even", train=even, valid=list_pairs("valid")) == set()
    assert correlate_length_and_choice([10, 20, 30], [5, 10, 15]) == pytest.approx(1, abs=0.01)
    assert correlate_length_and_choice([5, 10], [10, 5]) == pytest.approx(0, abs=1e-12)


def test_a_row_that_is_kept_is_read_as_the_same_example(tmp_path: Path) -> None:
    data = write_rows(tmp_path / "first", {"train": list_pairs("train")})
    kept: Any = read_split_rows(DataSettings(str(data), loss="dpo"), "train")
    again = write_rows(tmp_path / "again", {"train": kept.rows})
    tokenizer = TokenizerSource(str(BASE))
    splits = [
        load_dataset(DataSettings(str(folder), loss="dpo"), tokenizer)[1]["train"]
        for folder in (data, again)
    ]
    np.testing.assert_array_equal(splits[0].tokens, splits[1].tokens)
    assert len({RowKeys.of(row).content for row in kept.rows}) == len(kept.rows)


TURN = {"role": "assistant", "content": "good"}


@pytest.mark.parametrize(
    "line",
    [
        {"prompt": "Q?", "chosen": TURN | {"reasoning_content": "think"}, "rejected": "bad"},
        {"prompt": "Q?", "chosen": TURN | {"name": "bob"}, "rejected": "bad"},
        {"prompt": "Q?", "chosen": "good", "rejected": "bad", "loss_mask": [0, 1]},
    ],
    ids=["reasoning", "name", "marks"],
)
def test_a_pair_that_is_kept_has_the_keys_of_its_line(tmp_path: Path, line) -> None:
    folder = write_rows(tmp_path, {"train": [line]})
    settings = DataSettings(str(folder), loss="dpo")
    kept: Any = read_split_rows(settings, "train")
    ((_, example),) = read_examples(folder / "train.jsonl", settings.field_names)
    assert RowKeys.of(kept.rows[0]).content == sha256(encode_content(example)).digest()


def test_both_answers_stand_behind_their_prompt_and_are_all_that_is_supervised(tmp_path) -> None:
    data = write_rows(tmp_path, {"train": list_pairs("train")})
    source = TokenizerSource(str(BASE))
    split = load_dataset(DataSettings(str(data), loss="dpo"), source)[1]["train"]
    pair: Any = read_pair(split.example(0), split.example_mask(0)[1:])
    chosen, rejected = pair
    decode = source.load().decode
    assert list(chosen.tokens[: chosen.prompt]) == list(rejected.tokens[: rejected.prompt])
    row = list_pairs("train")[0]
    assert row["prompt"] in decode(chosen.tokens[: chosen.prompt])
    assert decode(chosen.tokens[chosen.prompt :]).startswith(row["chosen"])
    assert decode(rejected.tokens[rejected.prompt :]).startswith(row["rejected"])
    tokens, mask = lay_out([chosen, rejected, None])
    assert mask.sum(axis=1).tolist() == [len(one.tokens) - one.prompt for one in pair] + [0]
    assert tokens[1][1:][mask[1]].tolist() == rejected.tokens[rejected.prompt :].tolist()


def test_a_pair_is_never_cut(tmp_path: Path) -> None:
    data = write_rows(tmp_path, {"train": list_pairs("train")})
    checks = {}
    for most in (39, 256):
        settings = DataSettings(str(data), loss="dpo", max_seq_length=most)
        report, _ = load_dataset(settings, TokenizerSource(str(BASE)))
        checks[most] = {one.check for one in report.findings}
    assert checks[39] - checks[256] == {"too-long-to-be-cut"}


def test_few_widths_are_used() -> None:
    widths = np.array([round_up_width(width) for width in range(1, 1025)])
    assert (widths >= np.arange(1, 1025)).all()
    assert len(np.unique(widths)) == 40
    assert not (widths % 8).any()


@pytest.mark.parametrize(
    ("loss", "changes", "said"),
    [
        ("dpo", {"loss_config": {"beta": 0}}, "loss_config.beta: "),
        ("orpo", {"loss_config": {"reference": "base"}}, "orpo compares with no reference"),
        ("simpo", {"loss_config": {"reference": "initial"}}, "simpo compares with no reference"),
        ("dpo", {"loss_config": {"gamma": 1}}, "loss_config.gamma: unknown key"),
        ("dpo", {"loss_config": {"label_smoothing": 0.5}}, "less than 0.5"),
        ("dpo", {"supervise": "all"}, "the last answer is compared"),
        ("dpo", {"reference": "mlx_lm"}, "mlx_lm.lora has no such loss"),
        ("dpo", {"loss": "kto"}, "docs/preferences.md#answers-with-a-label"),
    ],
)
def test_what_a_loss_cannot_have_is_exit_2(tmp_path, loss, changes, said) -> None:
    values = make_values(tmp_path, loss)
    with pytest.raises(ConfigError) as error:
        parse_config(values | {"training": {"loss": loss, **changes}}, source="test.yaml")
    assert said in str(error.value)
    parse_config(values | {"training": {"loss": loss}}, source="test.yaml")
