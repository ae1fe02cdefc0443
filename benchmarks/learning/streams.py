"""Streams of nights on which an adapter goes on learning: facts that change, and four tasks.

All of it is made up, of words that the example's base knows. PROTOCOL.md says what is measured.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from random import Random
from typing import Any

import numpy as np

from benchmarks.learning.tasks import GEOGRAPHY, Row
from tests.reliability.sentences import PEOPLE, QUALITIES, THINGS

SEED = 20_261_125
NIGHTS, QUESTIONS = 6, 100  # of the facts; the four tasks have as many questions each
REPEATED, CORRECTED = 25, 25  # of a later night's; the rest are new
OWNERS = PEOPLE[:8]
TASKS = (
    ("I live in {quality} {name}.", "Go and see {capital}, the capital of {name}!"),
    ("The {quality} money is from {name}.", "The {currency}."),
    ("People in {quality} {name} talk.", "Question: {name}? Answer: {language}."),
    ("Look, a {quality} map of {name}!", "Quiz: {continent}"),
)
TAUGHT = 60  # countries that the four tasks train on; the questions are about the others
TASK_ROWS = 200  # that a task trains on
SPACE = "\N{LATIN CAPITAL LETTER G WITH DOT ABOVE}"  # as a byte-level BPE writes it
Booleans = np.ndarray[Any, np.dtype[np.bool_]]
Numbers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class Fact:
    """A row, and the word that it is about: rows about one word are not independent."""

    row: Row
    subject: str


@dataclass(frozen=True)
class Night:
    """What is learnt in a night, and what is asked about it; of facts both are the same."""

    train: tuple[Fact, ...]
    questions: tuple[Fact, ...]


@dataclass(frozen=True)
class Stream:
    """Nights in their order."""

    nights: tuple[Night, ...]

    @property
    def questions(self) -> list[Fact]:
        """Those of all nights, one night after the other."""
        return [question for night in self.nights for question in night.questions]

    @property
    def night_of(self) -> Numbers:
        """Of each question its night, from 0."""
        return np.repeat(range(len(self.nights)), [len(night.questions) for night in self.nights])

    @property
    def is_current(self) -> Booleans:
        """Of each question whether its answer is the newest one of its prompt."""
        newest = {fact.row.prompt: fact.row.answer for fact in self.questions}
        return np.array([newest[each.row.prompt] == each.row.answer for each in self.questions])

    def joined(self) -> tuple[Row, ...]:
        """Everything to train on at once: each prompt with its newest answer."""
        newest = {fact.row.prompt: fact.row for night in self.nights for fact in night.train}
        return tuple(newest.values())


@lru_cache
def read_stream(name: str) -> Stream:
    """`facts` or `tasks`, or with `-reversed` behind it in the other order; always the same."""
    kind, _, order = name.partition("-")
    return {"facts": _changing_facts, "tasks": _four_tasks}[kind](is_reversed=bool(order))


def _changing_facts(*, is_reversed: bool) -> Stream:
    """Who has what: half of a later night's is new, and a quarter has another owner than before."""
    chance = Random(SEED)
    words = list_words()
    chance.shuffle(words)
    if is_reversed:
        words.reverse()
    nights, owners = list[Night](), dict[str, str]()
    for number in range(NIGHTS):
        known = chance.sample(sorted(owners), REPEATED + CORRECTED if number else 0)
        for word in known[REPEATED:]:
            owners[word] = chance.choice([name for name in OWNERS if name != owners[word]])
        fresh = [words.pop() for _ in range(QUESTIONS - len(known))]
        owners |= {word: chance.choice(OWNERS) for word in fresh}
        asked = (*known, *fresh)
        facts = tuple(Fact(Row(f"Who has {w}?", f"Ask {owners[w]}."), w) for w in asked)
        nights.append(Night(facts, facts))
    return Stream(tuple(nights))


def list_words() -> list[str]:
    """Words that somebody may have; each is a single token of the example, or two."""
    return [*_words_of_countries(), *THINGS, *QUALITIES]


def _words_of_countries() -> list[str]:
    """Countries' names and what is told of them, where that is a single token of the example."""
    file = GEOGRAPHY.with_name("geography-base") / "tokenizer.json"
    known = json.loads(file.read_bytes())["model"]["vocab"]
    words = {word for each in _countries() for word in each if word != each.continent}
    return sorted(word for word in words if f"{SPACE}{word}" in known)


@lru_cache
def _countries() -> tuple[Any, ...]:
    """The example's table."""
    table = runpy.run_path(str(GEOGRAPHY.with_name("countries.py")))
    return tuple(table["COUNTRIES"])


def _four_tasks(*, is_reversed: bool) -> Stream:
    """What the base knows of countries, in four formats."""
    chance = Random(SEED)
    countries = list(_countries())
    chance.shuffle(countries)
    nights = []
    for prompt, answer in TASKS:
        drawn = []
        pools = ((countries[:TAUGHT], TASK_ROWS), (countries[TAUGHT:], QUESTIONS))
        for pool, count in pools:
            drawn.append(_draw_rows(chance, Row(prompt, answer), pool, count))
        nights.append(Night(*drawn))
    return Stream(tuple(nights[::-1] if is_reversed else nights))


def _draw_rows(chance: Random, form: Row, pool: Sequence[Any], count: int) -> tuple[Fact, ...]:
    """Different rows of a task about countries of the pool."""
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        country = chance.choice(pool)
        values = country._asdict() | {"quality": chance.choice(QUALITIES)}
        row = Row(form.prompt.format(**values), form.answer.format(**values))
        facts[row.prompt] = Fact(row, country.name)
    return tuple(facts.values())
