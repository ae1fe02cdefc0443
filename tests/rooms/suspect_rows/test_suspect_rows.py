"""Rows that can be trained on and look wrong are named, and their healthy twins are not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import polars as pl
import pytest

from nested_core.data.dataset_loading import dataset_cache
from nested_core.data.tokens.tokenizer_source import TokenizerSource
from nested_core.rooms.suspect_rows.text_checks import find_encoded, find_suspect_texts
from nested_core.rooms.suspect_rows.tokenizer_checks import find_tokens_alike
from nested_core.storage.safetensors_files import load_arrays, save_arrays
from tests.builders.data_sets import Found, chat, load, warnings_in, write_lines
from tests.example import DATA, MODEL

pytestmark = pytest.mark.slow("tokenizes data set after data set")

CAPITALS = re.compile(r"see (.+), the capital of (.+)!")
BASE = TokenizerSource(str(MODEL))
OLD = "Ask Tina and Tina."


def rows_of(split: str) -> list[dict[str, Any]]:
    """The rows of the example, which is the healthy twin of each plant."""
    return [json.loads(line) for line in (DATA / f"{split}.jsonl").read_text().splitlines()]


def rewrite(
    split: str, answer: str, question: str = "I want to see {land}. Where to?"
) -> list[Any]:
    """The example's rows with another question and answer, which name {city} and {land}."""
    rows = []
    for row in rows_of(split):
        match = CAPITALS.search(row["messages"][1]["content"])
        assert match is not None
        names = {"city": match[1], "land": match[2]}
        rows.append(chat(question.format(**names), answer.format(**names)))
    return rows


def in_latin_1(rows: list[Any]) -> list[Any]:
    """The rows with answers whose UTF-8 was read as Latin-1."""
    turns = [[turn["content"] for turn in row["messages"]] for row in rows]
    return [chat(asked, answer.encode().decode("latin-1")) for asked, answer in turns]


def found(folder: Path, splits: Mapping[str, Iterable[Any]], **settings: Any) -> list[Found]:
    """The warnings on a data set of these files."""
    for name, rows in splits.items():
        write_lines(folder / f"{name}.jsonl", rows)
    return warnings_in(folder, **settings)


def test_the_example_has_no_suspect_row(tmp_path: Path) -> None:
    splits = {"train": rows_of("train"), "valid": rows_of("valid")}
    assert found(tmp_path, splits, tokenizer=BASE) == []


def test_two_answers_to_one_prompt_of_train_are_told_once(tmp_path: Path) -> None:
    old = [chat(row["messages"][0]["content"], OLD) for row in rows_of("train")]
    splits = {"train-1": rows_of("train"), "train-2": old, "valid": rows_of("valid")}
    assert found(tmp_path, splits) == [("train-2.jsonl", 1, "two-answers")]
    (message,) = (one.message for one in load(tmp_path)[0].warnings)
    assert "earlier line: 40 (train-2.jsonl:1" in message
    assert "this one and train-1.jsonl:1 have one prompt" in message


def test_two_labels_of_one_text_are_told(tmp_path: Path) -> None:
    labels = ["question", "greeting", "thanks"]
    train = [chat(f"Text {n % 95}", labels[n % 3]) for n in range(100)]
    assert found(tmp_path, {"train": train}) == [
        ("train.jsonl", 96, "two-answers"),
        ("valid.jsonl", None, "no-validation-set"),
    ]


@pytest.mark.parametrize("files", [1, 2])
def test_alternatives_in_each_file_are_not_told(tmp_path: Path, files: int) -> None:
    answers = ("See {city}.", "Go to {city}.")
    train = [row for answer in answers for row in rewrite("train", answer)]
    shards = {f"train-{n + 1}": train[n::files] for n in range(files)}
    assert found(tmp_path, {**shards, "valid": rewrite("valid", answers[0])}) == []


BELLE = "Go and see {city}, très belle, the capital of {land}!"


def test_text_whose_utf8_was_read_as_latin_1_is_told_once_a_file(tmp_path: Path) -> None:
    splits = {split: in_latin_1(rewrite(split, BELLE)) for split in ("train", "valid")}
    assert found(tmp_path / "planted", splits) == [
        ("train.jsonl", 1, "mojibake"),
        ("valid.jsonl", 1, "mojibake"),
    ]
    splits = {split: rewrite(split, BELLE) for split in ("train", "valid")}
    assert found(tmp_path / "healthy", splits) == []


@pytest.mark.parametrize(
    "text", ["très", "naïve café", "“it’s”…", "£5 at 30°", "привет", "你好", "🙂"]
)
@pytest.mark.parametrize("wrong", ["latin-1", "cp1252"])
def test_mojibake_of_many_scripts_is_found_and_the_text_itself_is_not(
    text: str, wrong: str
) -> None:
    spoilt = "".join(
        bytes([byte]).decode("latin-1" if byte in (0x81, 0x8D, 0x8F, 0x90, 0x9D) else wrong)
        for byte in text.encode()
    )
    assert find_suspect_texts(pl.Series([text, spoilt]))["is_mojibake"].to_list() == [False, True]


@pytest.mark.parametrize(
    "text",
    [
        *("Das macht Spaß… „Spaß“, Spaß–", "« CAFÉ » et « CAFÉ»", "AMANHÃ… “AMANHÔ AMANHÃ»"),
        *(
            "ÂNGELO, “ĐÂ”, TRẦN Â”",
            "Ä” Ö’ Ü–",
            "10 €, ½ à 3 °C",
            "ÅÄÖ",
            "Ðöð",
            "àâä",
            "señor ¿qué?",
        ),
    ],
)
def test_rightly_decoded_text_is_no_mojibake(text: str) -> None:
    assert find_suspect_texts(pl.Series([text]))["is_mojibake"].to_list() == [False]


@pytest.mark.parametrize(
    ("encoded", "plain"),
    [
        ("Go and see {city}, {land}&#39;s capital!", "Go and see {city}, {land}'s capital!"),
        ("{land}:\\nGo to the caf\\u00e9s of {city}.", "{land}:\nGo to the caf\u00e9s of {city}."),
    ],
)
def test_answers_in_an_encoding_are_told_once_a_file(
    encoded: str, plain: str, tmp_path: Path
) -> None:
    half = [
        pair[n % 2]
        for n, pair in enumerate(
            zip(rewrite("train", encoded), rewrite("train", plain), strict=True)
        )
    ]
    splits = {"train": half, "valid": rewrite("valid", plain)}
    assert found(tmp_path / "planted", splits) == [("train.jsonl", 1, "encoded-answers")]
    splits["train"] = [*rewrite("train", plain), *half[:4:2]]
    assert found(tmp_path / "healthy", splits) == []  # two of 42 are too few


@pytest.mark.parametrize(
    ("asked", "answer", "expected"),
    [
        ("What?", "Tom &amp; Jerry", "&amp;"),
        ("What?", "New%20York", "%20"),
        ("What?", "First.\\nSecond.", "\\n"),
        ("A page?", "<p>Tom &amp; Jerry&#39;s</p>", None),
        ("Escape: Tom & Jerry", "Tom &amp; Jerry", None),
        ("Which form has Tom &amp; Jerry?", "Tom &amp; Jerry", None),
        ("Write C.", 'printf("%02d\\n", a && b);', None),
        ("Write C.", "```\nputc('\\n');\n```", None),
        ("As JSON?", '{"place": "caf\\u00e9"}', None),
        ("A formula?", "$\\nabla f$ is \\nu times \\theta", None),
        ("Where?", "At https://example.org/a%20b&lt;c", None),
        ("How?", "By `&amp;`, or sort -t '\\t'", None),
        ("How?", "C:\\new is 20% of A&B; and 5%", None),
        ("Regex?", "^\\s*(\\w+)\\t(\\d+)$", None),
        ("Regex?", "[^\\n]*\\n{2,}", None),
        ("Regex?", "\\r?\\n", None),
        ("Regex?", "(\\n*|\\t+)\\n$", None),
        ("How?", "Steps:\\n* open\\n* close", "\\n"),
        ("How?", "Two:\\n\\n**Bold** and\\n+ more", "\\n"),
        ("How much?", "In all\\n$ 5", "\\n"),
        ("Write C.", "for (; n%10 == 0 && i%16; n /= k%25)", None),
        ("A formula?", "\\( \\lVert x \\rVert \\nRightarrow y \\)", None),
        ("Where?", "At caf%C3%A9%3A", "%C3%A9%3A"),
        ("How strong?", "12%ABV, and 0.1%FA in 95%ACN", None),
        ("Write Haskell.", "map (\\n -> n * 2)", None),
        ("Who?", "Tom &amp; Jerry[^1] in C:\\Data and \\Share", "&amp;"),
    ],
)
def test_an_encoding_that_is_meant_is_not_told(
    asked: str, answer: str, expected: str | None
) -> None:
    assert find_encoded(f"{asked}\0{answer}") == expected
    (column,) = find_suspect_texts(pl.Series([f"{asked}\0{answer}"]))["encoded"].to_list()
    assert column == expected


def test_a_file_of_one_row_with_a_very_long_answer_is_looked_at() -> None:
    found = find_suspect_texts(pl.Series(["Write on.\0" + "so it goes on " * 70_000]))
    assert not any(
        column.any()
        for name, column in found.items()
        if column.dtype == pl.Boolean and name != "has_answer"
    )
    (flag,) = find_suspect_texts(pl.Series(["Is it red or blue?\0blue"]))["is_in_prompt"].to_list()
    assert flag


def as_python(rows: list[Any]) -> list[Any]:
    """The rows with each content written as Python writes its message."""
    turns = [row["messages"] for row in rows]
    return [chat(str(asked[:1]), str(asked[1])) for asked in turns]


def as_sharegpt(rows: list[Any]) -> list[Any]:
    """The rows with each content written as ShareGPT's turn, in a tuple."""
    turns = [row["messages"] for row in rows]
    return [
        chat(str(({"from": "human", "value": one["content"]},)), str(two)) for one, two in turns
    ]


def as_encoded_twice(rows: list[Any]) -> list[Any]:
    """The rows with each answer written as the JSON of the JSON of its turn, an id first."""
    turns = [row["messages"] for row in rows]
    return [chat(one["content"], json.dumps(json.dumps([{"id": 7} | two]))) for one, two in turns]


def as_json_text(rows: list[Any]) -> list[Any]:
    """The rows as texts that hold the JSON of the whole row."""
    return [{"text": json.dumps(row)} for row in rows]


@pytest.mark.parametrize("write", [as_python, as_json_text, as_sharegpt, as_encoded_twice])
def test_turns_that_were_written_as_text_are_told_once_a_file(write: Any, tmp_path: Path) -> None:
    rows = rows_of("train")
    is_part = write != as_json_text
    plant = [*rows[:20], *write(rows[20:])] if is_part else write(rows)
    assert (write(rows_of("valid")) == rows_of("valid")) is False
    splits = {"train": plant, "valid": write(rows_of("valid"))}
    told = [one for one in found(tmp_path, splits) if one[2] == "serialised-turns"]
    first = 21 if is_part else 1
    assert told == [
        ("train.jsonl", first, "serialised-turns"),
        ("valid.jsonl", 1, "serialised-turns"),
    ]


NBSP = "\u00a0"
UNLIKE_PEOPLES = {
    "odd-blanks": ("Go and see {city}!", "I want to see {land}. Where to?".replace(" ", NBSP)),
    "answers-repeat-prompts": ("I want to see {land}. Where to? Go and see {city}!",),
}


@pytest.mark.parametrize("check", UNLIKE_PEOPLES)
def test_texts_unlike_what_people_write_are_told_once_a_file(check: str, tmp_path: Path) -> None:
    splits = {name: rewrite(name, *UNLIKE_PEOPLES[check]) for name in ("train", "valid")}
    assert found(tmp_path, splits) == [("train.jsonl", 1, check), ("valid.jsonl", 1, check)]


def test_french_marks_and_a_correction_of_its_text_are_as_they_should_be(tmp_path: Path) -> None:
    french = f"Je veux voir {{land}}{NBSP}! Où aller{NBSP}?"
    splits = {
        name: rewrite(name, f"Vois «{NBSP}{{city}}{NBSP}» en {{land}}, c'est beau.", french)
        for name in ("train", "valid")
    }
    assert found(tmp_path, splits) == []
    figures = [
        chat(f"Combien, {index} ?", f"{index}{NBSP}000{NBSP}000{NBSP}€") for index in range(40)
    ]
    figures_told = found(tmp_path, {"train": figures[:30], "valid": figures[30:]})
    assert "odd-blanks" not in {check for *_, check in figures_told}
    same = "{land} has a town, {city}."
    splits = {name: rewrite(name, same, same) for name in ("train", "valid")}
    assert "answers-repeat-prompts" not in {check for *_, check in found(tmp_path, splits)}


@pytest.mark.parametrize("other", ["south america", "SouthAmerica", "South America "])
def test_labels_in_two_spellings_are_told(other: str, tmp_path: Path) -> None:
    def label(index: int, *labels: str) -> Any:
        return chat(f"Where is the place {index}?", labels[index % 4])

    rows = [label(index, "Asia", "South America", "South America", other) for index in range(60)]
    told = found(tmp_path, {"train": rows[:48], "valid": rows[48:]})
    assert ("train.jsonl", 4, "labels-in-two-spellings") in told
    rows = [label(index, "Asia", "South America", "North America", "Africa") for index in range(60)]
    assert found(tmp_path, {"train": rows[:48], "valid": rows[48:]}) == []
    rows = [  # whose prompt lists the labels
        chat(f"Is mail {i} spam? Answer Yes or No.", ("Yes", "No", "Yes", "no")[i % 4])
        for i in range(60)
    ]
    told = found(tmp_path, {"train": rows[:48], "valid": rows[48:]})
    assert ("train.jsonl", 4, "labels-in-two-spellings") in told
    spans = [  # which a task of finding copies from its prompt
        chat(f"Day {index}: meet at {span} please.", answer.format(span))
        for answer in ("{}", '{{"at": "{}"}}')
        for index, span in zip(range(60), ["Noon", "noon", "Six o'clock"] * 20, strict=True)
    ]
    told = found(tmp_path, {"train": spans[:100], "valid": spans[100:]})
    assert "labels-in-two-spellings" not in {check for *_, check in told}


@pytest.mark.parametrize(
    "answer",
    [
        "{{'city': '{city}', 'role': 'capital'}}",  # an object of the task's own
        '{{"content": "{city}", "land": "{land}"}}',
        "Send [{{'role': 'user', 'content': '{city}'}}] to it.",  # in a sentence on the API
        '{{"from": "{city}", "value": 3}}',
        '{{"role": "{city}", "content": "user"}}',
    ],
)
def test_objects_that_are_answers_are_not_taken_for_turns(answer: str, tmp_path: Path) -> None:
    splits = {name: rewrite(name, answer) for name in ("train", "valid")}
    assert found(tmp_path, splits) == []


def with_system(rows: list[Any], system: str | None) -> list[Any]:
    turns = [{"role": "system", "content": system}] if system else []
    return [{"messages": turns + row["messages"]} for row in rows]


def pairs(
    rows: list[Any],
    after: str,
    before: str,
    *,
    is_lower: bool = False,
    answer: Callable[[str], str] = str,
) -> list[Any]:
    """The rows as prompts with a text after them, and completions with one in front."""
    turns = [[turn["content"] for turn in row["messages"]] for row in rows]
    return [
        {
            "prompt": (asked.lower() if is_lower else asked) + after,
            "completion": before + answer(given),
        }
        for asked, given in turns
    ]


DIFFERENT: dict[str, tuple[Any, Any]] = {
    "a system text": (lambda rows: with_system(rows, "You are a guide."), lambda rows: rows),
    "another system text": (
        lambda rows: with_system(rows, "You are a guide."),
        lambda rows: with_system(rows, "You are a guide of the old town."),
    ),
    "a trailing blank": (
        lambda rows: pairs(rows, " Answer: ", ""),
        lambda rows: pairs(rows, " Answer:", ""),
    ),
    "a leading blank": (lambda rows: pairs(rows, "", " "), lambda rows: pairs(rows, "", "")),
    "a prefix": (
        lambda rows: rows,
        lambda rows: [
            chat("### Q: " + row["messages"][0]["content"], row["messages"][1]["content"])
            for row in rows
        ],
    ),
    "capitals": (
        lambda rows: pairs(rows, "", "", answer=str.upper),
        lambda rows: pairs(rows, "", "", answer=str.lower),
    ),
    "case": (lambda rows: pairs(rows, "", " "), lambda rows: pairs(rows, "", " ", is_lower=True)),
}


@pytest.mark.parametrize("name", DIFFERENT)
@pytest.mark.parametrize("split", ["valid", "test"])
def test_what_one_split_alone_writes_is_told(name: str, split: str, tmp_path: Path) -> None:
    write, otherwise = DIFFERENT[name]
    train, held_out = rows_of("train"), rows_of("valid")
    for number, (one, another) in enumerate(((write, otherwise), (otherwise, write))):
        splits = {"train": one(train), "valid": one(held_out)}
        assert "splits-differ" not in {
            check for *_, check in found(tmp_path / f"sound {number}", splits)
        }
        changed = splits | {split: another(held_out)}
        told = found(tmp_path / f"plant {number}", changed)
        assert (f"{split}.jsonl", None, "splits-differ") in told
        assert {file for file, _, check in told if check == "splits-differ"} == {f"{split}.jsonl"}


def test_a_split_by_time_is_no_other_way_of_writing(tmp_path: Path) -> None:
    splits = {
        name: [
            chat(f"{year}-03-0{1 + n % 9}: {one['content']}", two["content"])
            for n, (one, two) in enumerate(row["messages"] for row in rows_of(name))
        ]
        for name, year in (("train", 2024), ("valid", 2025))
    }
    assert "splits-differ" not in {check for *_, check in found(tmp_path, splits)}


@pytest.mark.parametrize(("held_out", "changed"), [(7, 7), (10, 8)])
def test_few_rows_and_a_part_of_them_are_no_other_way_of_writing(
    held_out: int, changed: int, tmp_path: Path
) -> None:
    valid = rows_of("valid")[:held_out]
    mixed = [*with_system(valid[:changed], "You are a guide."), *valid[changed:]]
    assert "splits-differ" not in {
        check for *_, check in found(tmp_path, {"train": rows_of("train"), "valid": mixed})
    }


def test_answers_that_their_generator_cut_off_are_told_once_a_file(tmp_path: Path) -> None:
    splits = {s: rewrite(s, "Go and see {city}, the capital of") for s in ("train", "valid")}
    assert found(tmp_path, splits) == [
        ("train.jsonl", 1, "cut-off-answers"),
        ("valid.jsonl", 1, "cut-off-answers"),
    ]


def test_a_rare_answer_without_an_end_is_not_told(tmp_path: Path) -> None:
    one = chat("What is a cliffhanger?", "A story that ends in the middle, such as in the")
    assert found(tmp_path, {"train": [*rows_of("train"), one], "valid": rows_of("valid")}) == []


@pytest.mark.parametrize(
    "whole",
    [
        "Auf die Reise nach {city} nehmen wir alle mit",
        "Bitte rufen Sie wegen {city} morgen bei uns an",
        "Lo que sigue en {city} es la letra y",
        "Of the options {city} is best, so the answer is a",
    ],
)
def test_sentences_that_end_in_a_verbs_prefix_or_a_letter_are_whole(
    whole: str, tmp_path: Path
) -> None:
    assert found(tmp_path, {s: rewrite(s, whole) for s in ("train", "valid")}) == []


def test_exchanged_columns_are_told_once_a_file(tmp_path: Path) -> None:
    splits = {
        split: [
            dict(
                zip(("completion", "prompt"), (t["content"] for t in row["messages"]), strict=True)
            )
            for row in rows_of(split)
        ]
        for split in ("train", "valid")
    }
    assert found(tmp_path, splits) == [
        ("train.jsonl", 1, "exchanged-columns"),
        ("valid.jsonl", 1, "exchanged-columns"),
    ]


def test_answers_that_ask_back_are_not_taken_for_exchanged_columns(tmp_path: Path) -> None:
    splits = {s: rewrite(s, "Do you mean {city} in {land}?") for s in ("train", "valid")}
    assert found(tmp_path, splits) == []


def base_that_lacks(folder: Path, first: int, last: int, unknown: str | None) -> TokenizerSource:
    """The example's base without tokens of this range but blanks; `unknown` stands for them."""
    shutil.copytree(MODEL, folder)
    path, settings_path = folder / "tokenizer.json", folder / "tokenizer_config.json"
    tokenizer, settings = json.loads(path.read_text("utf-8")), json.loads(settings_path.read_text())
    vocabulary = tokenizer["model"]["vocab"]
    lost = {text for text, n in vocabulary.items() if first <= n <= last and text not in "ĠĊ"}
    tokenizer["model"]["vocab"] = {k: v for k, v in vocabulary.items() if k not in lost}
    tokenizer["model"]["merges"] = [
        merge
        for merge in tokenizer["model"]["merges"]
        if lost.isdisjoint({*"".join(merge)} if isinstance(merge, list) else merge)
    ]
    tokenizer["model"]["unk_token"] = unknown
    path.write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    settings_path.write_text(json.dumps(settings | {"unk_token": unknown}))
    return TokenizerSource(str(folder))


@pytest.mark.parametrize(
    ("answer", "first", "last", "unknown"),
    [(BELLE, 99, 260, None), ("Is it <b>{city}</b>?", 32, 32, "<|pad|>")],
    ids=["dropped", "read as the unknown token, whose text has the character"],
)
def test_a_character_that_the_tokenizer_does_not_know_is_named(
    answer: str, first: int, last: int, unknown: str | None, tmp_path: Path
) -> None:
    base = base_that_lacks(tmp_path / "base", first, last, unknown)
    splits = {split: rewrite(split, answer) for split in ("train", "valid")}
    assert found(tmp_path / "data", splits, tokenizer=base) == [
        ("train.jsonl", 1, "lost-character"),
        ("valid.jsonl", 1, "lost-character"),
    ]
    assert found(tmp_path / "data", splits, tokenizer=BASE) == []


def base_that_normalises(folder: Path, normaliser: str) -> TokenizerSource:
    """The example's base with a normaliser of its tokenizer, such as NFKC."""
    shutil.copytree(MODEL, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    tokenizer["normalizer"] = {"type": normaliser}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    return TokenizerSource(str(folder))


@pytest.mark.parametrize(
    "answer", ["In {city} it is 20\u00bd degrees.", "Take bus \u2462, {city}."]
)
def test_a_number_that_the_tokenizer_writes_otherwise_is_named(answer: str, tmp_path: Path) -> None:
    splits = {split: rewrite(split, answer) for split in ("train", "valid")}
    kinds = [check for _, _, check in found(tmp_path / "data", splits, tokenizer=BASE)]
    assert kinds == []
    expected_of = {"NFKC": "lost-character", "NFC": None, "Lowercase": "case-lost"}
    for normaliser, expected in expected_of.items():
        base = base_that_normalises(tmp_path / normaliser, normaliser)
        told = found(tmp_path / "data", splits, tokenizer=base)
        assert [check for _, _, check in told] == [expected] * (2 * bool(expected)), normaliser
    report = load(tmp_path / "data", tokenizer=base_that_normalises(tmp_path / "again", "NFKC"))[0]
    assert "the tokenizer gives back" in report.warnings[0].message


def test_a_tokenizer_that_folds_case_is_told_once_with_a_word(tmp_path: Path) -> None:
    capitals = {s: rewrite(s, "Look at {city}.") for s in ("train", "valid")}
    base = base_that_normalises(tmp_path / "base", "Lowercase")
    found(tmp_path / "data", capitals, tokenizer=base)
    told = load(tmp_path / "data", tokenizer=base)[0].warnings
    assert [one.check for one in told] == ["case-lost"] * 2
    assert "gives back 'berlin' for 'Berlin'" in told[0].message
    assert found(tmp_path / "data", capitals, tokenizer=BASE) == []


@pytest.mark.parametrize("answer", ["\ufb01nd {city}\u2026", "\uff21sk \u201c{city}\u201d, \u2126"])
def test_letters_and_marks_that_a_normaliser_spells_out_are_not_told(
    answer: str, tmp_path: Path
) -> None:
    splits = {split: rewrite(split, answer) for split in ("train", "valid")}
    base = base_that_normalises(tmp_path / "base", "NFKC")
    assert found(tmp_path / "data", splits, tokenizer=base) == []


def test_two_templates_that_differ_are_told_once_a_split(tmp_path: Path) -> None:
    splits = {split: rewrite(split, "Look at {city}.") for split in ("train", "valid")}
    base = shutil.copytree(MODEL, tmp_path / "base")
    used = json.loads((base / "tokenizer_config.json").read_text())["chat_template"]
    (base / "chat_template.jinja").write_text(used + "\n")
    source = TokenizerSource(str(base))
    assert found(tmp_path / "data", splits, tokenizer=source) == []
    (base / "chat_template.jinja").write_text(f"!{used}")
    told = found(tmp_path / "data", splits, tokenizer=TokenizerSource(str(base)))
    assert [check for _, _, check in told] == ["two-templates"] * 2


def base_with_two_tokens(folder: Path, rows: mx.array) -> TokenizerSource:
    """The example's base with the added tokens <city> and <land>, and their rows of embedding."""
    shutil.copytree(MODEL, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    weights = load_arrays(folder / "model.safetensors")
    embedding = weights["model.embed_tokens.weight"]
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
    tokenizer["added_tokens"] += [
        {"id": embedding.shape[0] + n, "content": text, **flags}
        for n, text in enumerate(("<city>", "<land>"))
    ]
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), "utf-8")
    config = json.loads((folder / "config.json").read_text())
    config["vocab_size"] = embedding.shape[0] + 2
    (folder / "config.json").write_text(json.dumps(config))
    joined = mx.concatenate([embedding, rows.astype(embedding.dtype)])
    save_arrays(folder / "model.safetensors", {**weights, "model.embed_tokens.weight": joined})
    return TokenizerSource(str(folder))


WIDTH = load_arrays(MODEL / "model.safetensors")["model.embed_tokens.weight"].shape[1]


@pytest.mark.slow("writes and reads a base")
@pytest.mark.parametrize("value", [0.0, 0.25])
def test_added_tokens_with_rows_alike_are_named_where_the_rows_use_them(
    value: float, tmp_path: Path
) -> None:
    splits = {s: rewrite(s, "See<city> {city} in<land> {land}!") for s in ("train", "valid")}
    base = base_with_two_tokens(tmp_path / "base", mx.full((2, WIDTH), value))
    assert found(tmp_path / "data", splits, tokenizer=base) == [
        (f"{split}.jsonl", 1, "tokens-alike") for split in ("train", "train", "valid", "valid")
    ]
    messages = [one.message for one in load(tmp_path / "data", base)[0].warnings]
    assert [message[:6] for message in messages] == ["<city>", "<land>"] * 2
    learnt = base_with_two_tokens(tmp_path / "learnt", mx.random.normal((2, WIDTH)))
    assert found(tmp_path / "data", splits, tokenizer=learnt) == []
    plain = {split: rows_of(split) for split in ("train", "valid")}
    assert found(tmp_path / "plain", plain, tokenizer=base) == []


@pytest.mark.parametrize(
    "changes", [{}, {"bits": 8}, {"mode": "mxfp4", "group_size": 32}, {"mode": "mxfp8"}]
)
def test_one_zero_row_is_named_in_a_quantised_embedding_too(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    rows = mx.random.normal((4, 64)).astype(mx.bfloat16)
    rows[1], rows[2] = 0.0, -0.0
    for kind, arrays in (("float", (rows,)), ("few bits", mx.quantize(rows, **changes))):
        folder = tmp_path / kind
        folder.mkdir()
        names = ("weight", "scales", "biases")
        tensors = {f"model.embed_tokens.{n}": a for n, a in zip(names, arrays, strict=False)}
        save_arrays(folder / "model.safetensors", tensors)
        for token in (1, 2):
            assert find_tokens_alike(folder, [0, token, 3]) == {token}, kind


def test_a_cached_warning_of_tokens_alike_goes_when_the_base_is_mended(tmp_path: Path) -> None:
    write_lines(
        tmp_path / "data/train.jsonl", rewrite("train", "See<city> {city} in<land> {land}!")
    )
    cache = dataset_cache(tmp_path / "cache")
    checks = []
    for rows in (mx.zeros((2, WIDTH)), mx.random.normal((2, WIDTH))):
        shutil.rmtree(tmp_path / "base", ignore_errors=True)
        base = base_with_two_tokens(tmp_path / "base", rows)
        report, _ = load(tmp_path / "data", base, cache=cache)
        checks.append("tokens-alike" in {warning.check for warning in report.warnings})
    assert checks == [True, False]


def test_turns_written_by_hand_are_told_only_for_a_base_with_a_template(tmp_path: Path) -> None:
    splits = {
        split: [
            {"text": f"Question: {asked['content']} Answer: {answer['content']}"}
            for asked, answer in (row["messages"] for row in rows_of(split))
        ]
        for split in ("train", "valid")
    }
    assert found(tmp_path / "data", splits, tokenizer=BASE) == [
        ("train.jsonl", 1, "handwritten-turns"),
        ("valid.jsonl", 1, "handwritten-turns"),
    ]
    base = shutil.copytree(MODEL, tmp_path / "base")
    config = json.loads((base / "tokenizer_config.json").read_text())
    del config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    assert found(tmp_path / "data", splits, tokenizer=TokenizerSource(str(base))) == []


DATED = "{%- if strftime_now is defined %}Today: {{ strftime_now('%d %B %Y') }}\n{% endif -%}"


def base_whose_template_begins(folder: Path, beginning: str) -> TokenizerSource:
    """The example's base, its chat template after this beginning."""
    base = shutil.copytree(MODEL, folder)
    config = json.loads((base / "tokenizer_config.json").read_text())
    config["chat_template"] = beginning + config["chat_template"]
    (base / "tokenizer_config.json").write_text(json.dumps(config))
    return TokenizerSource(str(base))


def test_a_template_that_writes_the_day_is_told_and_one_that_does_not_is_not(
    tmp_path: Path,
) -> None:
    splits = {split: rows_of(split) for split in ("train", "valid")}
    dated = base_whose_template_begins(tmp_path / "dated", DATED)
    assert found(tmp_path / "data", splits, tokenizer=dated) == [
        ("train.jsonl", 1, "date-in-prompt"),
        ("valid.jsonl", 1, "date-in-prompt"),
    ]
    (message, *_) = {one.message for one in load(tmp_path / "data", dated)[0].warnings}
    assert "26 July 2024" in message
    dateless = base_whose_template_begins(tmp_path / "dateless", "Today: a day\n")
    assert found(tmp_path / "data", splits, tokenizer=dateless) == []
    text = {split: [{"text": "The day is long."}] for split in splits}
    assert found(tmp_path / "text", text, tokenizer=dated) == []


def test_prose_is_not_taken_for_turns_written_by_hand(tmp_path: Path) -> None:
    texts = [f"{n} questions were asked, and the answer: silence. Q: none." for n in range(20)]
    splits = {"train": [{"text": text} for text in texts], "valid": [{"text": "An answer: no."}]}
    assert found(tmp_path, splits, tokenizer=BASE) == []
