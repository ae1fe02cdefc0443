"""Streams of nights on which an adapter goes on learning: facts that change, and tasks.

`facts` and `tasks` are made up, of words that the example's base knows. `intents` and `four` are of
real text, for a real model. PROTOCOL.md and PROTOCOL-3.md say what is measured.
"""

from __future__ import annotations

import json
import runpy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from benchmarks.learning.tasks import GEOGRAPHY, READERS, Counts, Row, read_task
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
# Of a night of real text. Three epochs of so many rows are what `init` takes as least, 200 steps.
REAL_COUNTS = Counts(train=534, choose=40, judge=400)
REAL_TASKS = ("banking77", "restaurant8k", "clinc150", "snips")  # a night each, in this order
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
    """What is learnt in a night, and what is asked about it; of facts both are the same.

    choose: rows by whose loss the night's step is chosen; without any it is the last.
    """

    train: tuple[Fact, ...]
    questions: tuple[Fact, ...]
    choose: tuple[Fact, ...] = ()


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
def read_stream(name: str, data: Path | None = None) -> Stream:
    """A stream by its name, always the same: `facts`, `tasks`, `intents` or `four`.

    With `-reversed` behind it `facts` and `tasks` are in the other order. The last two are read
    from `data`, the folder of the tasks' repositories.
    """
    kind, _, order = name.partition("-")
    if kind in ("facts", "tasks"):
        return {"facts": _changing_facts, "tasks": _four_tasks}[kind](is_reversed=bool(order))
    if data is None:
        raise SystemExit(f"{name} is read from the folder of --data; PROTOCOL-2.md fetches it.")
    return {"intents": _banking_intents, "four": _real_tasks}[kind](data)


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


def _banking_intents(data: Path) -> Stream:
    """The 77 intents of banking77, a sixth of them a night: the other intents are unknown to it."""
    chance = Random(SEED)
    train, _, judge = READERS["banking77"](data)
    intents = sorted({row.answer for row in train})
    chance.shuffle(intents)
    nights, seen = list[Night](), set[str]()
    for number in range(NIGHTS):
        own = set(intents[number::NIGHTS])
        drawn = []
        wanted = (train, REAL_COUNTS.train), (judge, REAL_COUNTS.judge), (train, REAL_COUNTS.choose)
        for pool, count in wanted:
            rows = {r.prompt: r for r in pool if r.answer in own and r.prompt not in seen}
            taken = list(rows.values())
            chance.shuffle(taken)
            drawn.append(_as_facts(taken[:count]))
            seen.update(row.prompt for row in taken[:count])
        nights.append(Night(*drawn))
    return Stream(tuple(nights))


def _real_tasks(data: Path) -> Stream:
    """Four tasks of PROTOCOL-2.md, one after another."""
    splits = [read_task(name, data, REAL_COUNTS) for name in REAL_TASKS]
    nights = (map(_as_facts, (each.train, each.judge, each.choose)) for each in splits)
    return Stream(tuple(Night(*night) for night in nights))


def _as_facts(rows: Sequence[Row]) -> tuple[Fact, ...]:
    """Rows that are independent of each other."""
    return tuple(Fact(row, row.prompt) for row in rows)
