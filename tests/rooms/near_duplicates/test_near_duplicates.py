"""Held-out examples that nearly are a training example are named with the line of train."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from nested_core.rooms.near_duplicates import word_ngrams
from nested_core.rooms.near_duplicates.word_ngrams import (
    MAX_NGRAMS_PER_TEXT,
    AskedNgrams,
    TrainMatches,
    find_near_duplicates,
    hash_word_ngrams,
    hash_word_sequences,
    pair_near_duplicates,
)
from tests.builders.data_sets import load, write_lines
from tests.example import DATA

FOX = "The quick brown fox jumps over the lazy dog near the river every single day"
ORDER = "Order 17, please: ship it to Berlin by 4 May!"
OTHER = "Nothing in this sentence is in any other sentence of the whole set"


def columns(texts: Sequence[str | None]) -> pl.DataFrame:
    """A row each text, with the columns of NGRAM_SCHEMA."""
    return pl.DataFrame(hash_word_ngrams(texts).to_columns(texts))


def keys(texts: Sequence[str | None]) -> pl.Series:
    """A key each text, as its content has one."""
    return pl.Series(texts, dtype=pl.String).hash()


def find(
    train: Sequence[str | None], held_out: Sequence[str | None], range_lines: int = 1000
) -> list[int | None]:
    """The line of train that each held-out text nearly is, where train is read in ranges."""
    frame = columns(held_out)
    asked = AskedNgrams.of_frames([frame])
    matches = TrainMatches()
    for first in range(0, len(train), range_lines):
        texts = train[first : first + range_lines]
        shared, examples = asked.find_in(texts, keys(texts))
        matches.add_range(shared, examples, first)
    lines = pl.Series(range(1, len(train) + 1), dtype=pl.Int32)
    found = find_near_duplicates(matches.finish(lines), matches.examples, frame)
    return found["near"].to_list()


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (FOX.upper() + "!!", 2),
        (FOX.replace("jumps", "leaps"), 2),
        ("Please note: " + FOX + ". Thanks", 2),
        (" ".join(FOX.split()[::-1]), None),
        ("order 23 please ship it to berlin by 31 may", 3),
        ("ORDER\u201417 please\u2026 ship it to Berlin by 4 May", 3),
        ("The quick brown cat sleeps under the old tree near the house", None),
        (OTHER, None),
        ("Hello.", 4),
        ("...", None),
        ("", None),
        (None, None),
    ],
)
def test_what_nearly_is_a_line_of_train(text, line) -> None:
    assert find([None, FOX, ORDER, "hello"], [text]) == [line]


def test_of_equally_near_lines_the_first_is_named_and_of_others_the_nearest() -> None:
    changed = FOX.replace("jumps", "leaps")
    assert find([OTHER, changed, FOX, FOX], [FOX + "."]) == [3]


def test_a_template_does_not_make_examples_near_duplicates() -> None:
    template = "Tell me please in one short and polite sentence what the capital of {} is now: {}"
    names = [f"{letter}{other}ia" for letter in "bcdfghklmn" for other in "aeiou"]
    train = [template.format(name, name[::-1]) for name in names]
    assert find(train, [template.format("Fuji", "Suva")]) == [None]
    assert find(train, [template.format(names[7], names[7][::-1]) + " indeed"]) == [8]


def test_long_texts_are_compared_by_a_sample_of_bounded_size() -> None:
    words = [
        f"{letter}{other}{third}"
        for letter in "bcdfghklmn"
        for other in "aeiou"
        for third in "rstvw"
    ]
    long = " ".join(words * 4 + words[::-1] * 4 + words[::2] * 3 + words[::3] * 3)
    ngrams = hash_word_ngrams([long])
    assert np.count_nonzero(ngrams.is_sampled) <= 2 * MAX_NGRAMS_PER_TEXT
    assert ngrams.halvings[0] >= 3
    changed = long.split()
    changed[100:110] = ["something"] * 10
    assert find([OTHER, long], [" ".join(changed)]) == [2]


@pytest.mark.parametrize("worth_a_look", [0, 1_000])
def test_ranges_of_train_change_nothing(worth_a_look, monkeypatch) -> None:
    monkeypatch.setattr(word_ngrams, "_MATCHES_WORTH_A_LOOK", worth_a_look)
    changed = FOX.replace("jumps", "leaps")
    train = [OTHER, changed, FOX, "hello", FOX, ORDER, None, changed]
    held_out = [FOX + ".", "Hello", changed + " so", ORDER.replace("17", "18")]
    for range_lines in (1, 3, 8):
        assert find(train, held_out, range_lines) == [3, 4, 2, 6]


@pytest.mark.slow("reads many rows")
def test_what_is_kept_of_train_does_not_grow_with_it(monkeypatch) -> None:
    monkeypatch.setattr(TrainMatches, "_ROWS_BETWEEN_LOOKS", 1_000)
    template = "please say in one short and polite sentence what the answer to {} is today"
    asked = AskedNgrams.of_frames([columns([template.format("x")])])
    matches = TrainMatches()
    most = 0
    for first in range(0, 20_000, 100):
        texts = [template.format(first + row) for row in range(100)]
        shared, examples = asked.find_in(texts, keys(texts))
        matches.add_range(shared, examples, first)
        most = max(most, matches._kept.height)
    assert matches.examples == 20_000
    assert most < 2_000
    kept = matches.finish(pl.Series(range(20_000), dtype=pl.Int32))
    assert kept.height == 11 * kept["ngram"].n_unique() > 0


@pytest.mark.parametrize(
    ("text", "same", "other"),
    [
        ("ÄRGER über Straßen", "ärger, über: straßen!", "arger uber strassen"),
        ("١٧ Tage", "١٧ tage", "١٨ tage"),
        ("x" * 70 + " y", "X" * 70 + "; Y", "x" * 71 + " y"),
        ("12345678", "12345678.", "12345679"),
        ("one two", "one\n\ttwo", "two one"),
        ("a’b", "A—B", "ab"),
    ],
)
def test_equal_words_have_equal_hashes(text, same, other) -> None:
    words = hash_word_sequences([text, same, other]).to_list()
    assert words[0] == words[1] != words[2]


def test_the_same_words_in_another_order_are_no_equal_sequence() -> None:
    train = ["two one", "one 2", "one two", "One; two!"]
    assert find(train, ["one  two", "ONE 3", "...", "two, one"]) == [3, None, None, 1]


def test_all_digits_count_as_one_in_ngrams() -> None:
    texts = ["order 17 of ٤ please", "order 23 of ٩ please", "order no on four please"]
    sets = [set(ngrams) for ngrams in columns(texts)["ngrams"].to_list()]
    assert sets[0] == sets[1]
    assert not sets[0] & sets[2]


def sampled_ngrams(text: str) -> tuple[set[int], int]:
    """The n-grams of a text that are compared, and how often their sample is halved, by polars."""
    words = pl.Series([text.lower()]).str.extract_all(r"\w+").explode().str.replace_all(r"\d", "0")
    hashes = words.hash(seed=0).to_list()
    factors = (0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 1)
    sums = [
        sum(a * b for a, b in zip(hashes[start : start + 3], factors, strict=True)) % 2**64
        for start in range(len(hashes) - 2)
    ]
    ngrams = [value ^ value >> 29 for value in sums]
    halvings = 0
    while len(ngrams) > MAX_NGRAMS_PER_TEXT * 2**halvings:
        halvings += 1
    return {value >> 32 for value in ngrams if value % 2**halvings == 0}, halvings


def test_the_sample_of_a_text_is_by_the_hashes_of_polars() -> None:
    """Findings depend on which n-grams are compared: another hash would find other lines."""
    dice = random.Random(3)
    words = ["Straße", "ÄRGER", "x_1", "a’b", "日本", "४२", "ΣΊΣΥΦΟΣ", "İ", "3rd", "17", "Word"]
    words += ["b" * length for length in (7, 8, 9, 16, 63, 64, 65, 200)]
    words += ["".join(dice.choices("aeioukrt", k=dice.randint(1, 12))) for _ in range(400)]
    texts = [" ".join(dice.choices(words, k=count)) for count in (1, 2, 3, 34, 35, 66, 67, 900)]
    texts += [". ".join(dice.choices(words[-400:], k=count)) for count in (30, 60, 300)]
    frame = columns(texts)
    for text, ngrams, halvings in zip(texts, frame["ngrams"], frame["halvings"], strict=True):
        found = set() if ngrams is None else set(ngrams)
        assert (found, halvings) == sampled_ngrams(text)


def test_common_ngrams_are_looked_for_no_more(monkeypatch) -> None:
    monkeypatch.setattr(word_ngrams, "_MATCHES_WORTH_A_LOOK", 0)
    template = "please say in one short and polite sentence what the answer to {} is today"
    asked = AskedNgrams.of_frames([columns([template.format("x"), FOX])])
    texts = [template.format(row) for row in range(12)] + [FOX]
    first, _ = asked.find_in(texts, keys(texts))
    again, _ = asked.find_in(texts, keys(texts))
    common = first.filter(pl.col("ngram").is_in(again["ngram"].implode()).not_())
    assert set(common.group_by("ngram").len()["len"]) == {11}
    assert set(again["row"]) == {12}


def near_duplicates(folder: Path, **policy: Any) -> list[tuple[str, int | None, str, str]]:
    """File, line, severity and message of each near-duplicate that is found."""
    report, _ = load(folder, batch_size=1, policy=policy)
    found = [finding for finding in report.findings if finding.check == "near-duplicate"]
    return [(each.file, each.line, each.severity, each.message) for each in found]


@pytest.fixture
def folder(tmp_path):
    files: dict[str, list[str]] = {
        "train": [OTHER, FOX, ORDER, OTHER + " but one"],
        "valid": [FOX + "!", "A text of its own, unlike all the rest"],
        "test": [OTHER, "Order 9 please ship it to Berlin by 8 May", FOX.lower()],
    }
    for name, texts in files.items():
        write_lines(tmp_path / f"{name}.jsonl", ({"text": text} for text in texts))
    return tmp_path


def test_by_default_it_is_a_warning(folder) -> None:
    found = near_duplicates(folder)
    assert [entry[:3] for entry in found] == [
        ("valid.jsonl", 1, "warning"),
        ("test.jsonl", 2, "warning"),
        ("test.jsonl", 3, "warning"),
    ]
    assert (
        "nearly the row train.jsonl:2, which is trained on: 100 % of its sequences" in found[0][3]
    )
    assert found[1][3].startswith("nearly the row train.jsonl:3, which is trained on: ")
    assert "take one of the two out, or set data_policy.near_duplicates: off" in found[1][3]
    same = "like train.jsonl:2 but for case, white space, end texts and marks"
    assert found[2][3] == same


def test_by_policy_it_is_an_error_or_nothing(folder) -> None:
    errors = near_duplicates(folder, near_duplicates="error")
    places = [("valid.jsonl", 1), ("test.jsonl", 2), ("test.jsonl", 3)]
    assert [entry[:2] for entry in errors if entry[2] == "error"] == places
    left = near_duplicates(folder, near_duplicates="off")
    assert [entry[:2] for entry in left] == [("test.jsonl", 3)]


def test_the_shipped_examples_have_none() -> None:
    assert near_duplicates(DATA) == []


def test_texts_that_nearly_are_one_another_are_pairs() -> None:
    texts = [FOX, ORDER, OTHER, f"{FOX}, they say", "", ORDER.upper().replace("17", "23"), "  "]
    assert {frozenset(pair) for pair in pair_near_duplicates(texts)} == {
        *map(frozenset, [(0, 3), (1, 5)])
    }
    assert [*pair_near_duplicates([])] == []


@pytest.mark.parametrize(
    "text",
    [
        "天地玄黃宇宙洪荒日月盈昃",
        "わたしは東京へ行きたいです",
        "ฉันอยากไปกรุงเทพพรุ่งนี้",
        "ខ្ញុំចង់ទៅភ្នំពេញថ្ងៃស្អែក",
    ],
)
def test_texts_written_without_blanks_are_compared_by_their_characters(text: str) -> None:
    other = text[::-1]
    assert find([other, text], [text + "新", text[:-1] + "!", other[2:6] + text[:3]]) == [
        2,
        2,
        None,
    ]
    assert sorted(pair_near_duplicates([text, other, f"{text}。 新"])) == [(0, 2), (2, 0)]
    lands = ("法国", "德国", "日本", "埃及", "巴西", "印度", "智利", "冰岛", "泰国")
    asked = [f"我想去{land}。首都是什么？" for land in lands]
    assert [*pair_near_duplicates(asked)] == []


def test_what_many_texts_begin_with_joins_none_of_them() -> None:
    draw = random.Random(3)
    tails = [" ".join(draw.choices(OTHER.split() + FOX.split(), k=9)) for _ in range(40)]
    assert [*pair_near_duplicates([f"{FOX}. {tail}" for tail in tails])] == []
