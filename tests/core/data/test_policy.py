"""data_policy: what is dropped is gone from training, counted and listed; the rest stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nested_core.config.data import DataPolicy
from nested_core.data.dataset import load_dataset
from nested_core.data.rules.dataset_report import DatasetReport
from nested_core.data.settings import DataSettings
from nested_core.data.tokens.tokenized_split import TokenizedSplit
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from tests.core.data.conftest import WriteData

Splits = dict[str, TokenizedSplit]
A, B, C, D, E = ({"text": f"{name} is the river of {name}land."} for name in "ABCDE")
LONG = {"text": "It is near the capital. " * 30}


def load(
    folder: Path, tokenizer: TokenizerSource | None, policy: dict[str, Any], **settings: Any
) -> tuple[DatasetReport, Splits]:
    chosen = DataSettings(str(folder), batch_size=1, policy=DataPolicy(**policy), **settings)
    return load_dataset(chosen, tokenizer)


def checks(report: DatasetReport, severity: str) -> list[tuple[str, int | None, str]]:
    return [(f.file, f.line, f.check) for f in report.findings if f.severity == severity]


def adds_up(report: DatasetReport) -> bool:
    """Whether no line of any file is lost."""
    return all(
        stats.lines
        == stats.blank + stats.rejected + sum(map(len, stats.dropped.values())) + stats.rows
        for stats in report.splits.values()
    )


def test_duplicates_are_kept_with_a_warning_by_default(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    report, splits = load(write_data(train=[A, B, A], valid=[C]), tokenizer, {})
    assert ("train.jsonl", 3, "duplicate") in checks(report, "warning")
    assert report.splits["train"].dropped == {}
    assert splits["train"].lines.tolist() == [1, 2, 3]


def test_dropped_duplicates_leave_the_first_of_each_are_counted_and_listed(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    folder = write_data(train=[A, B, b"", A, A, C, B], valid=[D])
    report, splits = load(folder, tokenizer, {"duplicates": "drop"})
    assert splits["train"].lines.tolist() == [1, 2, 6]
    assert report.splits["train"].dropped == {"duplicate": (4, 5, 7)}
    assert report.splits["train"].rows == 3
    (told,) = [f for f in report.findings if f.check == "dropped-duplicate"]
    assert (told.line, told.severity) == (4, "warning")
    assert told.message == ("lines dropped because they repeat an earlier example: 3 (4, 5, 7)")
    assert "duplicate" not in [check for _, _, check in checks(report, "warning")]
    assert adds_up(report)


def test_leakage_is_an_error_by_default_and_dropped_from_train_by_policy(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    folder = write_data(train=[A, B, C, B, D], valid=[B], test=[b" ", D])
    report, _ = load(folder, tokenizer, {})
    assert checks(report, "error") == [
        ("valid.jsonl", 1, "leakage"),
        ("test.jsonl", 2, "leakage"),
    ]
    report, splits = load(folder, tokenizer, {"leakage": "drop"})
    assert checks(report, "error") == []
    assert splits["train"].lines.tolist() == [1, 3]
    assert splits["valid"].lines.tolist() == [1]
    assert splits["test"].lines.tolist() == [2]
    assert report.splits["train"].dropped == {"leakage": (2, 4, 5)}
    assert report.splits["valid"].dropped == {}
    assert adds_up(report)


def test_a_repeated_leak_is_counted_once(write_data: WriteData, tokenizer: TokenizerSource) -> None:
    folder = write_data(train=[A, B, B, C, C], valid=[B])
    policy = {"leakage": "drop", "duplicates": "drop"}
    report, splits = load(folder, tokenizer, policy)
    assert report.splits["train"].dropped == {"leakage": (2, 3), "duplicate": (5,)}
    assert splits["train"].lines.tolist() == [1, 4]
    assert adds_up(report)


def test_overlong_examples_are_cut_dropped_or_refused(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    folder = write_data(train=[A, LONG, B], valid=[C, LONG | {"text": LONG["text"][3:]}])
    report, splits = load(folder, tokenizer, {}, max_seq_length=64)
    assert ("train.jsonl", 2, "truncated") in checks(report, "warning")
    assert splits["train"].lengths.max() == 64
    report, splits = load(folder, tokenizer, {"overlong": "drop"}, max_seq_length=64)
    assert splits["train"].lines.tolist() == [1, 3]
    assert splits["valid"].lines.tolist() == [1]
    dropped = {split: stats.dropped for split, stats in report.splits.items()}
    assert dropped == {"train": {"overlong": (2,)}, "valid": {"overlong": (2,)}}
    assert "truncated" not in [check for _, _, check in checks(report, "warning")]
    assert adds_up(report)
    report, _ = load(folder, tokenizer, {"overlong": "error"}, max_seq_length=64)
    assert checks(report, "error") == [
        ("train.jsonl", 2, "overlong"),
        ("valid.jsonl", 2, "overlong"),
    ]
    assert adds_up(report)


def test_a_line_with_an_error_is_rejected_and_not_dropped(
    write_data: WriteData, tokenizer: TokenizerSource
) -> None:
    bad = {"text": "A is the river.", "x": 1}
    folder = write_data(train=[A, b"{", A, bad, {"text": " "}, {"text": " "}], valid=[C])
    report, _ = load(folder, tokenizer, {"duplicates": "drop"})
    assert report.splits["train"].dropped == {"duplicate": (3,)}
    assert report.splits["train"].rejected == 3
    assert adds_up(report)


@pytest.mark.parametrize(
    ("train", "policy", "expected"),
    [
        ([B, B], {"leakage": "drop"}, ("train.jsonl", None, "empty-file")),
        ([LONG, LONG], {"overlong": "drop"}, ("train.jsonl", None, "empty-file")),
    ],
)
def test_a_file_of_which_nothing_is_left_is_an_error(
    write_data: WriteData,
    tokenizer: TokenizerSource,
    train: list[Any],
    policy: dict[str, Any],
    expected: tuple[str, int | None, str],
) -> None:
    folder = write_data(train=train, valid=[B])
    report, _ = load(folder, tokenizer, policy, max_seq_length=64)
    assert checks(report, "error") == [expected]


def test_what_is_left_must_fill_a_batch(write_data: WriteData, tokenizer: TokenizerSource) -> None:
    folder = write_data(train=[A, B, A, A], valid=[C])
    policy = DataPolicy(duplicates="drop")
    settings = DataSettings(str(folder), batch_size=3, policy=policy)
    report, _ = load_dataset(settings, tokenizer)
    assert checks(report, "error") == [("train.jsonl", None, "too-few-rows")]
    assert "2 rows do not fill one batch of 3" in report.errors[0].message
