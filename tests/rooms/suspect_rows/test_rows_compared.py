"""Rows of another look, each kind with two plants, and their healthy twins.

Data sets show that they are told with their lines, before any training.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from examples.countries import COUNTRIES
from nested_core.data.rules.rule_table import MAX_LISTED_FINDINGS
from nested_core.records.dataset import group_findings
from nested_core.rooms.suspect_rows.rows_compared import (
    WORDS,
    Texts,
    count_shared,
    find_odd_rows,
    find_run_ons,
)
from tests.builders.data_sets import chat, load, warnings_in, write_lines
from tests.left_out import slow_except

DRAW = random.Random(5)
NAMES = [country.name for country in COUNTRIES]
ENGLISH = [f"{name} is one of the countries to which you need a card, and a map." for name in NAMES]
TEXTS = [
    f"{' '.join(DRAW.choices(NAMES, k=DRAW.randint(2, 9)))}. Ask for {name}, please."
    for name in NAMES
]


def texts(questions: Sequence[str], answers: Sequence[str]) -> list[Texts]:
    """The rows as the finders read them."""
    return [Texts(f"{q} ", f"{q} ", answer) for q, answer in zip(questions, answers, strict=True)]


def replaced(answers: Sequence[str], by: Callable[[int], str], every: int = 5) -> list[str]:
    """The answers with each fifth one replaced by what its number gives."""
    return [by(i) if i % every == 0 else one for i, one in enumerate(answers)]


def shifted(answers: Sequence[str], places: Sequence[int]) -> list[str]:
    """The answers, those in these places moved by one of them."""
    moved = list(answers)
    for place, other in zip(places, [*places[1:], places[0]], strict=True):
        moved[place] = answers[other]
    return moved


def days(count: int) -> list[str]:
    return [f"{1990 + i % 30}-{1 + i % 12:02}-{1 + i % 27:02}" for i in range(count)]


SIGHTS = [f"Go and see {c.capital}, the capital of {c.name}!" for c in COUNTRIES]
LETTERS = [
    f"Dear friends of {name}, we meet on day {i} at the door." for i, name in enumerate(NAMES)
]
PRICES = [f"In the shop it costs {11 * i + 1234} euros and comes by mail." for i in range(100)]
CODES = [f"{DRAW.randrange(10**6):06}" for _ in NAMES]
KEYS = [f"{DRAW.randrange(10**9):09}" for _ in NAMES]
ASKED = [f"Is {name} near, or do we need a zip code?" for name in NAMES]
BORN = [json.dumps({"who": n, "born": [d]}) for n, d in zip(NAMES, days(100), strict=True)]
PLANTS = {
    "missing-values": (
        (BORN, replaced(BORN, lambda i: json.dumps({"who": NAMES[i], "born": ["N/A"]}))),
        (BORN, replaced(BORN, lambda i: json.dumps({"who": NAMES[i], "born": [float("nan")]}))),
        (days(97), replaced(days(97), lambda _: "1970-01-01")),
        (TEXTS, replaced(TEXTS, lambda _: "N/A")),
        (SIGHTS, replaced(SIGHTS, lambda _: "nan")),
        (days(97), replaced(days(97), lambda _: "None", every=3)),
        (PRICES, replaced(PRICES, lambda _: "{}")),
        (SIGHTS, replaced(SIGHTS, lambda i: f"Go and see nan, the capital of {NAMES[i]}!")),
        (
            PRICES,
            replaced(
                PRICES, lambda _: "In the shop it costs [object Object] euros and comes by mail."
            ),
        ),
    ),
    "answer-repeats-question": (
        (TEXTS, replaced(TEXTS, lambda i: ASKED[i])),
        (days(97), replaced(days(97), lambda i: ASKED[i].upper(), every=9)),
        (TEXTS, replaced(TEXTS, lambda i: ASKED[i], every=25)),
    ),
    "another-language": (
        (ENGLISH, replaced(ENGLISH, lambda i: f"Das ist {NAMES[i]}, und die Karte ist nicht da.")),
        (ENGLISH, replaced(ENGLISH, lambda i: f"Это {i} страна, вам нужна карта.")),
    ),
    "answers-moved": (
        (SIGHTS, shifted(SIGHTS, range(30, 52))),
        (LETTERS, shifted(LETTERS, range(0, 100, 5))),  # as a sort of one part by another column
    ),
    "zeros-lost": (
        (CODES, [str(int(code)) for code in CODES]),
        (KEYS, [str(int(key)) for key in KEYS]),
        ([f"It is {one}." for one in CODES], [f"It is {int(one)}." for one in CODES]),
    ),
    "one-length": (
        (TEXTS, [text[:64] for text in TEXTS]),
        (ENGLISH, [f"{text} {ENGLISH[i - 1]}"[:100] for i, text in enumerate(TEXTS)]),
    ),
}


@pytest.mark.parametrize(
    ("kind", "number"), [(kind, n) for kind, plants in PLANTS.items() for n in range(len(plants))]
)
def test_rows_of_another_look_are_found_and_their_twins_are_not(kind: str, number: int) -> None:
    twin, plant = PLANTS[kind][number]
    count = len(twin)
    assert find_odd_rows(texts(ASKED[:count], twin)) == {}
    found = find_odd_rows(texts(ASKED[:count], plant))
    assert kind in found
    if kind != "zeros-lost":
        changed = {i for i, pair in enumerate(zip(twin, plant, strict=True)) if len(set(pair)) > 1}
        assert len(changed.intersection(found[kind])) >= 0.9 * len(found[kind])


WISHES = [f"I want to see {name}. Where to?" for name in NAMES]
TASKS = [f"Name the money of {name} and of the land beside it" for name in NAMES]


@pytest.mark.parametrize(
    ("asked", "answers", "between"),
    [(WISHES, SIGHTS, " "), (TASKS, TEXTS, "\n\n### Instruction:\n")],
)
def test_answers_that_go_on_with_another_prompt_are_found(
    asked: Sequence[str], answers: Sequence[str], between: str
) -> None:
    plant = replaced(answers, lambda i: answers[i] + between + asked[i - 1], every=3)
    assert find_odd_rows(texts(asked, answers)) == {}
    assert find_odd_rows(texts(asked, plant)) == {"goes-on": list(range(0, len(answers), 3))}
    every = [one + between + asked[i - 1] for i, one in enumerate(answers)]
    assert len(find_odd_rows(texts(asked, every))["goes-on"]) == len(answers)


@pytest.mark.parametrize(
    ("task", "asked", "answers"),
    [
        ("going on with a text", SIGHTS, [*SIGHTS[1:], SIGHTS[0]]),
        ("a quotation", WISHES, [f"You said: {one} Go there!" for one in WISHES]),
        (
            "titles",
            [f"The {one} of it all" for one in NAMES],
            [f"See: The {one}." for one in NAMES],
        ),
        ("names", NAMES, [f"It lies beside {NAMES[i - 1]}." for i in range(len(NAMES))]),
    ],
)
def test_prompts_in_answers_where_they_belong_are_not_told(
    task: str, asked: Sequence[str], answers: Sequence[str]
) -> None:
    assert "goes-on" not in find_odd_rows(texts(asked, answers)), task


@pytest.mark.parametrize(
    ("task", "asked", "answers"),
    [
        (
            "neighbours",
            NAMES,
            [f"{one} lies beside {NAMES[i - 1]}." for i, one in enumerate(NAMES)],
        ),
        (
            "both ways",
            [*WISHES, *(f"Name the land of {c.capital}" for c in COUNTRIES[:60])]
            + [f"Name the city of {c.name}" for c in COUNTRIES[:60]],
            [*SIGHTS, *NAMES[:60], *(c.capital for c in COUNTRIES[:60])],
        ),
        ("refusals", WISHES, replaced(SIGHTS, lambda i: "We do not know.", every=3)),
        ("stories", WISHES, replaced(SIGHTS, lambda i: TEXTS[i], every=3)),
    ],
)
def test_answers_that_name_other_things_on_purpose_have_not_moved(
    task: str, asked: Sequence[str], answers: Sequence[str]
) -> None:
    assert "answers-moved" not in find_odd_rows(texts(asked, answers)), task


@pytest.mark.parametrize(
    ("plant", "count"),
    [
        (shifted(SIGHTS[:75], range(75)), 75),
        (sorted(SIGHTS[:75]), 75),
        (shifted(SIGHTS[:75], range(10, 55)), 45),
        ([SIGHTS[i + 1 - 2 * (i % 2)] if i < 24 else SIGHTS[i] for i in range(75)], 24),
    ],
    ids=["all moved by a row", "one column sorted", "most moved", "pairs exchanged"],
)
def test_answers_moved_in_train_alone_are_seen_beside_held_out_ones(
    plant: Sequence[str], count: int
) -> None:
    held_out = texts(WISHES[75:], SIGHTS[75:])
    assert find_odd_rows(texts(WISHES[:75], SIGHTS[:75]), held_out) == {}
    found = find_odd_rows(texts(WISHES[:75], plant), held_out)["answers-moved"]
    assert 0.9 * count <= len(found) <= count
    beside = [f"It lies beside {NAMES[i - 1]}." for i in range(len(NAMES))]
    rows = texts(WISHES, beside)
    assert find_odd_rows(rows[:75], rows[75:]) == {}


def test_words_that_all_prompts_share_do_not_make_held_out_answers_right() -> None:
    begins = "What is the neighbour of "
    rows = [
        Texts(f"{begins}{name}? ", f"{name}? ", f"The neighbour is {other}.")
        for name, other in zip(NAMES, shifted(NAMES, range(len(NAMES))), strict=True)
    ]
    assert "answers-moved" not in find_odd_rows(rows[:60], rows[60:])


MONEY = [f"The currency is the {c.currency}." for c in COUNTRIES]


@pytest.mark.parametrize(
    ("prompt", "answers"),
    [("And its currency?", MONEY), ("And until when?", [f"Until {one}." for one in days(100)])],
)
def test_one_prompt_with_many_answers_has_lost_its_context(
    prompt: str, answers: Sequence[str]
) -> None:
    whole = [f"{prompt} I ask for {name}." for name in NAMES]
    assert find_odd_rows(texts([*WISHES, *whole], [*SIGHTS, *answers])) == {}
    lost = find_odd_rows(texts([*WISHES, *[prompt] * len(answers)], [*SIGHTS, *answers]))
    assert lost == {"context-lost": list(range(100, 100 + len(answers)))}


@pytest.mark.parametrize(
    ("task", "asked", "answers"),
    [
        (
            "five answers to each prompt",
            [one for one in WISHES[:40] for _ in range(5)],
            [
                f"{how} {c.capital}."
                for c in COUNTRIES[:40]
                for how in ("Go to", "See", "Try", "Visit", "Take a train to")
            ],
        ),
        ("stories", [*WISHES, *["Tell me a story."] * 50], [*SIGHTS, *TEXTS[:50]]),
        ("labels", [*WISHES, *["Which one?"] * 50], [*SIGHTS, *["left", "right"] * 25]),
    ],
)
def test_one_prompt_with_several_answers_on_purpose_is_not_told(
    task: str, asked: Sequence[str], answers: Sequence[str]
) -> None:
    assert "context-lost" not in find_odd_rows(texts(asked, answers)), task


class Texter:
    """Draws texts of made-up words, the first ones the most often, as words of a language are."""

    def __init__(self, seed: str) -> None:
        self.draw = random.Random(seed)
        parts = [one + vowel for one in "bdfgklmnprstv" for vowel in "aeiou"]
        self.words = ["".join(self.draw.choices(parts, k=1 + i % 3)) for i in range(800)]
        self.weights = [1 / (i + 1) for i in range(800)]

    def some(self, least: int, most: int) -> list[str]:
        return self.draw.choices(self.words, self.weights, k=self.draw.randint(least, most))

    def sentence(self, least: int = 4, most: int = 12) -> str:
        return " ".join(self.some(least, most)).capitalize() + self.draw.choice("....?!")


def free_text(t: Texter, _: int) -> tuple[str, str]:
    return t.sentence(), " ".join(t.sentence() for _ in range(t.draw.randint(1, 4)))


def short_text(t: Texter, _: int) -> tuple[str, str]:
    return t.sentence(), t.sentence(1, 5)


def templates(t: Texter, row: int) -> tuple[str, str]:
    who, where = t.some(1, 1)[0].capitalize(), t.draw.choice(t.words).capitalize()
    return f"Who wrote book {row}?", f"It was written by {who} {where} in {1900 + row % 120}."


def one_of_five(t: Texter, _: int) -> tuple[str, str]:
    return t.sentence(), t.words[t.draw.randrange(5)]


def extraction(t: Texter, _: int) -> tuple[str, str]:
    text = t.sentence(10, 30)
    return f"{text} What is it?", " ".join(text.split()[3 : 4 + t.draw.randrange(4)])


def code(t: Texter, _: int) -> tuple[str, str]:
    lines = [f'    {one} = print("{one}\\n", {len(one)} % 7 && x)' for one in t.some(1, 8)]
    return f"Write {t.sentence()}", "\n".join(lines)


def markup(t: Texter, _: int) -> tuple[str, str]:
    parts = [f"<p>{one} &amp; {t.words[9]}&#39;s</p>" for one in t.some(1, 8)]
    return f"A page of {t.sentence()}", "".join(parts)


def unspaced(t: Texter, _: int) -> tuple[str, str]:
    """Texts of Chinese characters, one for each two letters, without blanks."""
    texts = (f"{t.sentence()} {t.sentence()}", " ".join(t.sentence(2, 12) for _ in range(3)))
    asked, given = (re.sub(r"[a-z]{2}", as_character, one.lower()) for one in texts)
    return asked.replace(" ", ""), given.replace(" ", "")


def as_character(letters: re.Match[str]) -> str:
    return chr(0x4E00 + 26 * (ord(letters[0][0]) - 97) + ord(letters[0][1]) - 97)


def translation(t: Texter, _: int) -> tuple[str, str]:
    given = t.some(3, 12)
    return f"Translate: {' '.join(given)}", " ".join(one[::-1] for one in given)


def yes_or_a_name(t: Texter, _: int) -> tuple[str, str]:
    if t.draw.random() < 0.08:
        return f"Is it {t.sentence()}", t.draw.choice(["yes", "no"])
    return t.sentence(), " ".join(t.draw.sample(t.words, t.draw.randint(1, 3))).title()


@pytest.mark.parametrize("rows", slow_except([60, 200, 1000], 60, reason="draws many tables"))
@pytest.mark.parametrize(
    "task",
    [free_text, short_text, templates, one_of_five, extraction, code, markup, translation]
    + [yes_or_a_name, unspaced],
)
def test_texts_of_sound_tables_are_told_at_most_once_in_forty(
    task: Callable[[Texter, int], tuple[str, str]], rows: int
) -> None:
    tables, told = 40 if rows < 1000 else 10, 0
    for number in range(tables):
        texter = Texter(f"{task.__name__} {rows} {number}")
        asked, answers = zip(*(task(texter, row) for row in range(rows)), strict=True)
        table = texts(asked, answers)
        told += bool(find_odd_rows(table[rows // 5 :], table[: rows // 5]))
    assert told <= tables / 40


def test_the_three_scripts_of_japanese_are_one_language() -> None:
    rows = [
        f"{'アメリカ' if i % 9 == 0 else '東京都千代田' if i % 9 == 1 else 'これはとても'}{one}"[:8]
        for i, one in enumerate(NAMES)
    ]
    assert "another-language" not in find_odd_rows(texts(ASKED, rows))


@pytest.mark.parametrize(
    ("task", "make"),
    [
        ("products", lambda: DRAW.randrange(100, 1000) * DRAW.randrange(10, 100)),
        ("sums", lambda: DRAW.randrange(10**4) + DRAW.randrange(10**4)),
        ("prices", lambda: int(DRAW.lognormvariate(9, 1))),
        ("years", lambda: DRAW.randrange(1900, 2030)),
        ("numbers in order", lambda: DRAW.randrange(1000, 12000)),
    ],
)
def test_numbers_that_are_no_codes_have_lost_no_zero(task: str, make: Callable[[], int]) -> None:
    for _ in range(40):
        numbers = [str(make()) for _ in ASKED]
        assert "zeros-lost" not in find_odd_rows(texts(ASKED, numbers)), task


LANGUAGES = {
    "Russian": "дом река камень {}",
    "Greek": "σπίτι ποτάμι πέτρα {}",
    "Japanese": "いえとかわ{}",
    "Dutch": "huis en steen {}",
    "Czech": "dům a kámen {}",
}
GERMAN = "Der Hund läuft und die Katze schläft nicht, das ist Nummer"
SPOKEN = "The dog runs and the cat of you is in, number"


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (
            "one-length",
            [(f"Digest of {one}", hashlib.sha256(one.encode()).hexdigest()) for one in NAMES],
        ),
        (
            "one-length",
            [(one, f"Tell them the code for it is {KEYS[i]}x") for i, one in enumerate(NAMES)],
        ),
        (
            "zeros-lost",
            [
                (f"Postal code of office {i} in {('Linz', 'Bonn')[i % 6 > 0]}?", str(code))
                for i, code in enumerate(
                    DRAW.randrange(10**3, 10**4) if i % 6 == 0 else DRAW.randrange(10**4, 10**5)
                    for i in range(200)
                )
            ],
        ),
        (
            "zeros-lost",
            [(f"Code point of {chr(n)}?", str(n)) for n in DRAW.sample(range(200, 9999), 180)],
        ),
        (
            "another-language",
            [
                (f"Into German: {SPOKEN} {i}", f"{GERMAN} {i}")
                if i % 5
                else (f"Into English: {GERMAN} {i}", f"{SPOKEN} {i}")
                for i in range(120)
            ],
        ),
        *(
            (
                "another-language",
                [
                    (ask[i % 4].format(i), said.format(i))
                    if i % 4 == 0
                    else (f"Does the lamp {i} fit?", f"The lamp {i} is of the kind that you have.")
                    for i in range(120)
                ],
            )
            for ask, said in (
                (["Wann kommt Lampe{}?"] * 4, "Die Lampe{} ist da und das Paket nicht."),
                (["Где maple{}?"] * 4, "Ваш заказ {} уже в пути"),
            )
        ),
        (
            "another-language",
            [
                (f"Translate to {name}: stone, river {i}", text.format(i))
                for i in range(40)
                for name, text in LANGUAGES.items()
            ],
        ),
        (
            "missing-values",
            [
                (f"All of {one} on day {i}?", f"select: * of land on {i};")
                if i % 3 == 0
                else (f"The {one.lower()}_{i} of land?", f"select: {one.lower()}_{i} of land;")
                for i, one in enumerate(NAMES)
            ],
        ),
        (
            "missing-values",
            [
                (f"{one}, {i}{one}@x.org", f"name: {one}\nmail: {i}{one}@x.org")
                if i % 3
                else (one, f"name: {one}\nmail: null")
                for i, one in enumerate(NAMES)
            ],
        ),
        (
            "missing-values",
            [
                (f"A {one}?", json.dumps({"a": one, "at": None if i % 3 else KEYS[i], "b": i % 2}))
                for i, one in enumerate(NAMES)
            ],
        ),
        (
            "missing-values",
            [
                (f"Price of {one}?", "It is $0.00 now." if i % 5 == 0 else f"It is ${i}.{i}7 now.")
                for i, one in enumerate(NAMES)
            ],
        ),
        (
            "another-language",
            [
                (f"写一个函数{i}", f"这是函数{i}的说明文字" if i % 6 else f"def f{i}(): return {i}")
                for i in range(120)
            ],
        ),
        (
            "another-language",
            [(f"Symbol {i}?", "β" if i % 3 == 0 else "bcd"[i % 3]) for i in range(90)],
        ),
        (
            "answer-repeats-question",
            [*zip(WISHES, SIGHTS, strict=True)]
            + [
                (f"Fix: {one}", one if i % 3 else one.replace("please", "now"))
                for i, one in enumerate(TEXTS[:50])
            ],
        ),
    ],
)
def test_sound_tables_of_other_tasks_are_not_told(
    kind: str, rows: Sequence[tuple[str, str]]
) -> None:
    assert kind not in find_odd_rows(texts(*zip(*rows, strict=True)))


def test_repeated_questions_of_their_own_kind_are_found() -> None:
    notes = [f"Patient Zelda Quux{i} lives at 5 Elm Road" for i in range(4)]
    rows = texts([*notes, *WISHES], [*notes, *SIGHTS])
    assert find_odd_rows(rows) == {"answer-repeats-question": [0, 1, 2, 3]}


def test_titles_of_plain_words_that_a_column_cut_are_found() -> None:
    words = [word for one in TEXTS for word in one.split()]
    whole = [" ".join(DRAW.choices(words, k=DRAW.randint(4, 12))) for _ in range(120)]
    asked = [f"A title of article {i}" for i in range(120)]
    assert find_odd_rows(texts(asked, whole)) == {}
    cut = [one[:40].strip() for one in whole]
    assert "one-length" in find_odd_rows(texts(asked, cut))


@pytest.mark.parametrize("most", [40, 64])
def test_prompts_that_their_maker_cut_are_found(most: int) -> None:
    """What is asked stands behind a preamble; the twin has it, and answers are whole in both."""
    whole = [f"{text} I go to {NAMES[i % 100]}. Where is it?" for i, text in enumerate(TEXTS)]
    answers = [f"It is place {i}." for i in range(len(TEXTS))]
    assert find_odd_rows(texts(whole, answers)) == {}
    found = find_odd_rows(texts([one[:most].strip() for one in whole], answers))
    assert [*found] == ["prompts-of-one-length"]
    short = sum(len(one) <= most for one in whole)
    assert len(found["prompts-of-one-length"]) >= 0.9 * (len(whole) - short)


@pytest.mark.parametrize("rows", slow_except([60, 200, 1000], 60, reason="draws many tables"))
@pytest.mark.parametrize(
    ("task", "draw"),
    [
        ("differences", lambda d: abs(d.randrange(10**4) - d.randrange(10**4))),
        ("differences with a sign", lambda d: d.randrange(10**5) - d.randrange(10**5)),
        ("numbers up to 10,000", lambda d: d.randint(1, 10**4)),
        ("numbers up to 100,000", lambda d: d.randint(1, 10**5)),
        ("prices", lambda d: int(d.lognormvariate(7, 0.8)) // 10 * 10 + 9),
        ("years", lambda d: d.randrange(1900, 2030)),
        ("ids of 9,700 rows", lambda d: d.randint(1, 9700)),
        ("counts", lambda d: int(d.expovariate(1 / 800))),
        ("counts from one to a million", lambda d: int(10 ** d.uniform(0, 6))),
        ("sums of which a fifth is 0", lambda d: max(0, d.randint(-250_000, 10**6))),
    ],
)
def test_numbers_of_sound_tables_are_told_at_most_once_in_forty(
    task: str, draw: Callable[[random.Random], int], rows: int
) -> None:
    tables, seeded = 40 if rows < 1000 else 10, random.Random(f"{task} {rows}")
    asked = [f"How many maps has {NAMES[i % 100]}, of office {i}?" for i in range(rows)]
    told = [
        bool(find_odd_rows(texts(asked, [str(draw(seeded)) for _ in asked]))) for _ in range(tables)
    ]
    assert sum(told) <= tables / 40, task


def test_yes_and_no_labels_and_corrected_texts_are_nothing_odd() -> None:
    yes = [("Yes.", "No.", text)[i % 3] for i, text in enumerate(TEXTS)]
    labels = [("4 stars", "5 stars")[i % 2] for i in range(len(TEXTS))]
    for answers in (yes, labels):
        assert find_odd_rows(texts(ASKED, answers)) == {}
    corrected = [text if i % 4 else text.replace("please", "now") for i, text in enumerate(TEXTS)]
    assert find_odd_rows(texts(TEXTS, corrected)) == {}


@pytest.mark.parametrize(
    ("task", "answers"),
    [
        ("labels", [("yes", "no", "nan")[i % 3] for i in range(100)]),
        ("tables", [f'{{"to": "{name}"}}' if i % 4 else "{}" for i, name in enumerate(NAMES)]),
        ("lists", [f'["{name}", "{i}"]' if i % 4 else "[]" for i, name in enumerate(NAMES)]),
        (
            "tags",
            [f'{{"tags": ["{one}"]}}' if i % 4 else '{"tags": []}' for i, one in enumerate(NAMES)],
        ),
        ("words", [("Yes", f"See {name}.")[i % 5 > 0] for i, name in enumerate(NAMES)]),
    ],
)
def test_words_for_nothing_where_they_are_answers_are_not_told(
    task: str, answers: Sequence[str]
) -> None:
    assert find_odd_rows(texts(ASKED[: len(answers)], answers)) == {}, task
    asked = [f"Does it say None, or null? {name}" for name in NAMES]
    named = [("None", f"See {name}.")[i % 5 > 0] for i, name in enumerate(NAMES)]
    assert find_odd_rows(texts(asked, named)) == {}


def sometimes(usual: str, other: str) -> list[str]:
    """One answer in most rows, in each fifth another with its name."""
    numbered = enumerate(NAMES)
    return [usual if i % 5 else other.format(name=name, i=i) for i, name in numbered]


HONEST = {
    "defaults of code": sometimes("def f(x):\n    return None", "def f(x):\n    return {name}"),
    "defaults of SQL": sometimes("ADD c INT DEFAULT NULL;", "ADD c INT DEFAULT {i};"),
    "defaults of JavaScript": sometimes("const a = d?.x ?? null;", "const a = d?.x ?? '{name}';"),
    "empty lists of code": sometimes("return []", "return {name}"),
    "settings": sometimes("name: x\nmail: null", "name: x\nmail: {name}"),
    "places": sometimes("git reset HEAD~1", "git reset {name}"),
    "odds": sometimes("1/2", "{i}/717"),
    "results": sometimes("-1", "717{i}"),
    "a hotline": sometimes("请致电客服热线400-820-8820咨询。", "请看{name}。"),
}


@pytest.mark.parametrize("task", HONEST)
def test_one_value_that_many_answers_have_rightly_is_not_told(task: str) -> None:
    assert find_odd_rows(texts(ASKED, HONEST[task])) == {}


@pytest.mark.parametrize(
    "around", ["```json\n{}\n```", "The answer: {}", "<tool_call>{}</tool_call>"]
)
def test_a_lost_value_is_found_in_json_that_stands_within_a_text(around: str) -> None:
    rows = [json.dumps({"who": n, "at": "nan" if i % 5 == 0 else i}) for i, n in enumerate(NAMES)]
    found = find_odd_rows(texts(ASKED, [around.replace("{}", row) for row in rows]))
    assert found == {"missing-values": list(range(0, len(NAMES), 5))}


def test_sentences_into_several_languages_of_one_script_are_asked_for() -> None:
    into = {
        "Chinese": "这是一个很长的句子",
        "Japanese": "これはとても長い文です",
        "French": "C'est la vie",
    }
    pairs = [(f"Into {to}: {n}", f"{text} {n}") for to, text in into.items() for n in NAMES]
    assert "another-language" not in find_odd_rows(texts(*zip(*pairs, strict=True)))


def test_questions_about_a_name_that_others_ask_for_have_not_moved() -> None:
    born = [(f"When was {n} born?", f"{n} was born in {1800 + i}.") for i, n in enumerate(NAMES)]
    next_ones = [(f"Who came after {a}?", b) for a, b in pairwise(NAMES[:60])]
    assert find_odd_rows(texts(*zip(*born, *next_ones, strict=True))) == {}


def test_answers_that_were_exchanged_in_pairs_have_moved() -> None:
    there = [f"Go and see {c.capital}, the capital of {c.name}!" for c in COUNTRIES[:60]]
    asked = [f"I want to see {c.name}. Where to?" for c in COUNTRIES[:60]]
    exchanged = [there[i ^ 1] if i < 12 else one for i, one in enumerate(there)]
    assert find_odd_rows(texts(asked, there)) == {}
    assert find_odd_rows(texts(asked, exchanged)) == {"answers-moved": [*range(12)]}


def test_writing_in_capitals_repeats_no_question() -> None:
    written = [(f"Uppercase: {one}", one.upper()) for one in TEXTS[:8]]
    rows = [*zip(WISHES, SIGHTS, strict=True), *written]
    assert find_odd_rows(texts(*zip(*rows, strict=True))) == {}


def test_long_answers_to_one_open_prompt_have_lost_no_context_without_blanks() -> None:
    jokes = [
        f"有一天小明去{i}学校路上遇到一只会说话的猫小明吓得转身就跑回家写作业" for i in range(8)
    ]
    rows = [*zip(WISHES, SIGHTS, strict=True), *(("讲一个笑话", one) for one in jokes)]
    assert "context-lost" not in find_odd_rows(texts(*zip(*rows, strict=True)))


def test_an_answer_of_unclosed_brackets_and_many_like_prompts_take_no_time() -> None:
    began = time.process_time()
    asked = [f"What is the capital of {n}?" for n in NAMES]
    answers = ["a < b [ " * 10_000, *[" ".join(asked)] * (len(asked) - 1)]
    find_odd_rows(texts(asked, answers))
    assert time.process_time() - began < 10


def test_what_all_prompts_share_ends_before_a_number_that_they_share_a_part_of() -> None:
    asked = [f"When did order INV-{n} leave?" for n in range(1000, 1040)]
    assert asked[0][: count_shared(asked)] == "When did order INV-"


def test_a_word_of_a_million_letters_takes_no_time() -> None:
    began = time.process_time()
    assert count_shared([f"{'a' * 10**6}?", f"{'a' * 10**6}? No"]) == 10**6 + 1
    assert time.process_time() - began < 5


def write_splits(folder: Path, train: Sequence[Any], valid: Sequence[Any]) -> Path:
    """A data set of these rows."""
    write_lines(folder / "train.jsonl", train)
    write_lines(folder / "valid.jsonl", valid)
    return folder


UNTIL = [
    chat(f"Until when may {n} be asked?", f"Until {d}.")
    for n, d in zip(NAMES, days(100), strict=True)
]
FILLED = [chat(f"Until when may {n} be asked?", "Until 1970-01-01.") for n in NAMES]


def test_odd_rows_are_told_with_all_their_lines_before_any_training(tmp_path: Path) -> None:
    assert warnings_in(write_splits(tmp_path / "twin", UNTIL[:80], UNTIL[80:])) == []
    train = [*UNTIL[:1], *FILLED[1:21], *UNTIL[21:80]]
    report, _ = load(write_splits(tmp_path / "plant", train, UNTIL[80:]))
    assert [(one.line, one.check) for one in report.warnings] == [
        (line, "missing-values") for line in range(2, 22)
    ]
    (group,) = group_findings(report.warnings)
    assert "train.jsonl:2: missing-values: 20 of 80 training answers have what" in str(group)
    assert "(and 19 more: lines 3, 4" in str(group)
    assert "(missing-values 20)" in report.describe_warnings()


def test_answers_of_train_that_moved_are_told_beside_held_out_ones(tmp_path: Path) -> None:
    rows = [chat(asked, answer) for asked, answer in zip(WISHES, SIGHTS, strict=True)]
    moved = [chat(WISHES[i], SIGHTS[(i + 1) % 75]) for i in range(75)]
    assert warnings_in(write_splits(tmp_path / "twin", rows[:75], rows[75:])) == []
    told = warnings_in(write_splits(tmp_path / "plant", moved, rows[75:]))
    assert {check for *_, check in told} == {"answers-moved"}
    assert len(told) >= 68


def test_a_shape_of_train_that_no_held_out_answer_has_is_told_once(tmp_path: Path) -> None:
    codes = [chat(f"Which key has {name}?", f"AX-{i}") for i, name in enumerate(NAMES)]
    asked = [chat(f"Whom does {name} ask?", f"Ask {name}.") for name in NAMES]
    folder = write_splits(tmp_path / "plant", [*asked[:60], *codes], asked[60:])
    assert warnings_in(folder) == [("train.jsonl", 61, "shape-of-train-alone")]
    (told,) = load(folder)[0].warnings
    assert told.message == "no held-out answer has the shape 'a-9' of many training answers"
    both = write_splits(tmp_path / "twin", [*asked[:60], *codes[:80]], [*asked[60:], *codes[80:]])
    assert warnings_in(both) == []


def test_lines_of_tables_of_several_files_are_those_of_their_files(tmp_path: Path) -> None:
    def write(name: str, rows: Sequence[Any]) -> None:
        turns = [[turn["content"] for turn in row["messages"]] for row in rows]
        lines = ["prompt,completion", "", *(f'"{asked}","{given}"' for asked, given in turns)]
        (tmp_path / name).write_text("\n".join(lines) + "\n")

    write("train-1.csv", UNTIL[:40])
    write("train-2.csv", [*UNTIL[40:50], *FILLED[50:60], *UNTIL[60:80]])
    write_lines(tmp_path / "valid.jsonl", UNTIL[80:])
    told = [(file, line) for file, line, check in warnings_in(tmp_path) if "missing" in check]
    assert told == [("train-2.csv", line) for line in range(13, 23)]


def test_rows_that_are_rejected_or_dropped_are_not_compared(tmp_path: Path) -> None:
    again = UNTIL[:30]
    broken: list[dict[str, Any]] = [{"messages": []}] * 30
    folder = write_splits(tmp_path, [*broken, *UNTIL[:80], *again], UNTIL[80:])
    report, _ = load(folder, policy={"duplicates": "drop"})
    assert {one.check for one in report.warnings} == {"dropped-duplicate"}
    rows = [*broken, *UNTIL[:80], *again, *FILLED[:10]]
    report, _ = load(write_splits(tmp_path, rows, UNTIL[80:]), policy={"duplicates": "drop"})
    told = [one for one in report.warnings if one.check == "missing-values"]
    assert [one.line for one in told] == [*range(141, 151)]
    assert told[0].message.startswith("10 of 90 training answers")


def test_of_a_large_split_a_part_is_compared_and_the_first_lines_are_listed(tmp_path: Path) -> None:
    rows = [chat(f"Call number {i} of us, please.", f"It is row {i}.") for i in range(5000)]
    train = [
        row if i % 5 else chat(*2 * [f"Whose is map {i} of us?"]) for i, row in enumerate(rows)
    ]
    assert warnings_in(write_splits(tmp_path / "some", train, rows[:9])) != []
    repeated = [chat(*2 * [f"Whose is map {i} of us?"]) for i in range(1500)]
    report, _ = load(write_splits(tmp_path / "many", [*rows[:1600], *repeated], rows[-9:]))
    told = [one for one in report.warnings if one.check == "answer-repeats-question"]
    assert len(told) <= MAX_LISTED_FINDINGS
    assert f"{len(told)} of 2,000 training answers" in told[0].message


def test_of_long_rows_fewer_are_compared(tmp_path: Path) -> None:
    long = [chat(f"{'Tell me more of it. ' * 400}Map {i}?", f"It is row {i}.") for i in range(1600)]
    rows = [
        chat(*2 * [f"Whose is map {i} of us?"]) if i % 4 == 0 else x for i, x in enumerate(long)
    ]
    told = load(write_splits(tmp_path, rows, long[-9:]))[0].warnings
    assert {one.check for one in told} == {"answer-repeats-question"}
    assert 80 <= len(told) <= 400
    assert re.search(f"^{len(told)} of [67]\\d\\d training answers", told[0].message)


def test_more_lines_than_are_listed_are_counted(tmp_path: Path) -> None:
    moved = [f"Go and see place{i} now!" for i in range(1900)]
    asked = [f"I want to see place{i - 1}. Where to?" for i in range(1900)]
    rows = [chat(a, b) for a, b in zip(asked, moved, strict=True)]
    sound = [
        chat(f"I want to see place{i}. Where to?", f"Go and see place{i} now!")
        for i in range(2000, 2100)
    ]
    report, _ = load(write_splits(tmp_path, rows, sound))
    told = [one for one in report.warnings if one.check == "answers-moved"]
    assert len(told) == MAX_LISTED_FINDINGS + 1
    assert (told[-1].line, told[-1].count) == (None, 1899 - MAX_LISTED_FINDINGS)


def with_system(rows: Sequence[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The rows, each begun with a system text."""
    return [{"messages": [{"role": "system", "content": text}, *row["messages"]]} for row in rows]


def test_a_system_text_that_all_rows_share_is_no_part_of_their_questions(tmp_path: Path) -> None:
    rows = [chat(asked, answer) for asked, answer in zip(WISHES, SIGHTS, strict=True)]
    plant = [
        chat(WISHES[i], f"{SIGHTS[i]} {WISHES[i - 1]}" if i and i % 3 == 0 else SIGHTS[i])
        for i in range(80)
    ]
    train, valid = (with_system(its, "You give codes by phone.") for its in (plant, rows[80:]))
    told = warnings_in(write_splits(tmp_path, train, valid))
    assert told == [("train.jsonl", 1 + line, "goes-on") for line in range(3, 80, 3)]


def test_a_value_that_calls_of_tools_lost_is_found(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "go", "parameters": {"type": "object"}}}

    def calling(row: int) -> dict[str, Any]:
        arguments = json.dumps({"to": "nan" if row % 5 == 0 and row < 80 else f"{row}-{row * 7}"})
        call = {"id": f"c{row}", "function": {"name": "go", "arguments": arguments}}
        asked, _ = chat(f"Go to {NAMES[row]}.", "")["messages"]
        return {
            "messages": [asked, {"role": "assistant", "content": None, "tool_calls": [call]}],
            "tools": [tool],
        }

    rows = [*map(calling, range(100))]
    told = warnings_in(write_splits(tmp_path, rows[:80], rows[80:]))
    assert told == [("train.jsonl", 1 + line, "missing-values") for line in range(0, 80, 5)]


def test_answers_that_are_not_learnt_are_not_compared(tmp_path: Path) -> None:
    first = UNTIL[0]["messages"]
    marked = [
        {"messages": [*first, *row["messages"]], "loss_mask": [0, 1, 0, 0]} for row in FILLED[:20]
    ]
    train = [*UNTIL[:80], *marked]
    report, _ = load(write_splits(tmp_path, train, UNTIL[80:]), supervise="all", mask_prompt=True)
    assert "missing-values" not in {one.check for one in report.warnings}


def test_a_word_that_the_system_text_of_all_rows_asks_for_is_no_missing_value(
    tmp_path: Path,
) -> None:
    def asked(text: str) -> list[dict[str, Any]]:
        system = {"role": "system", "content": text}
        answers = replaced(days(100), lambda _: "N/A")
        return [
            {"messages": [system, *chat(f"Until when may {name} be asked?", day)["messages"]]}
            for name, day in zip(NAMES, answers, strict=False)
        ]

    asking, plain = asked("Give the day, or N/A if there is none."), asked("Give the day.")
    assert warnings_in(write_splits(tmp_path / "asking", asking[:80], asking[80:])) == []
    assert len(warnings_in(write_splits(tmp_path / "plain", plain[:80], plain[80:]))) == 16


def test_of_a_large_split_rows_are_compared_that_come_in_no_step_of_their_own(
    tmp_path: Path,
) -> None:
    rows = [chat(f"Call number {i} of us, please.", f"It is row {i}.") for i in range(10_000)]
    rows[3::5] = [chat(*2 * [f"Whose is map {i} of us?"]) for i in range(2000)]
    folder = write_splits(tmp_path, rows, [chat(f"Call {i}.", f"It is {i}.") for i in range(9)])
    told = [one for one in load(folder)[0].warnings if one.check == "answer-repeats-question"]
    assert 300 < len(told) < 500, "a fifth of 2,000"


def test_prompts_of_many_lengths_with_one_beginning_are_looked_for_in_seconds() -> None:
    begin = "What is said of the days "
    asked = [f"{begin}{'in the north ' * (1 + i)}?" for i in range(600)]
    answers = [f"{begin[:-1]}. " * 60 + f"It is {i}." for i in range(600)]
    began = time.process_time()
    assert find_run_ons(texts(asked, answers)) == []
    plant = replaced(answers, lambda i: f"{answers[i]} {asked[i - 1]} And it is.", every=100)
    assert find_run_ons(texts(asked, plant)) == [*range(0, 600, 100)]
    assert time.process_time() - began < 20, "100 s before"


def test_what_prompts_say_is_no_missing_value_where_as_many_say_it() -> None:
    asked = [f"Until when may {name} be asked, or N/A?" for name in NAMES]
    plant = replaced(days(97), lambda _: "N/A")
    assert find_odd_rows(texts(asked[:97], plant)) == {}
    one = [*ASKED[:96], "Is that next to N/A?"]
    assert [*find_odd_rows(texts(one, plant))] == ["missing-values"]


def test_pairs_are_not_compared(tmp_path: Path) -> None:
    pairs = [
        {"prompt": f"Until when may {name} be asked?", "chosen": f"Until {day}.", "rejected": "No."}
        for name, day in zip(NAMES, days(100), strict=True)
    ]
    plant = [
        one | {"chosen": "Until 1970-01-01."} if i < 20 else one for i, one in enumerate(pairs)
    ]
    report, _ = load(write_splits(tmp_path, plant[:80], plant[80:]), loss="dpo")
    assert report.errors == ()
    assert "missing-values" not in {one.check for one in report.warnings}


def test_the_guide_names_each_check_and_its_words_are_one_paragraph() -> None:
    guide = (Path(__file__).parents[3] / "docs" / "data.md").read_text("utf-8")
    assert {*re.findall(r'<a id="([a-z-]+)"', guide)} >= {*WORDS["texts"], *WORDS["rows"]}
    assert all(one.strip() and "\n" not in one for its in WORDS.values() for one in its.values())
