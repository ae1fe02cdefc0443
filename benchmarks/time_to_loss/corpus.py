"""Invented entities and what is said of them: text to pretrain on, and tables to fine-tune on.

Everything follows from one seed. A word is a token, so that no tokenizer is needed. The tables are
written in words that the pretraining never uses, and those of the validation set ask for entities
that no table of the training set has: what they hold is known from pretraining alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

Tokens = np.ndarray[Any, np.dtype[np.int32]]

SEED = 20261120
WIDTH = 65  # tokens of an example and of a row of text: 64 are predicted
VOCABULARY = 1024
ENTITIES, HELD_OUT, OF_A_TABLE = 96, 24, 4
TABLES, VALIDATION_TABLES = 2048, 64
FILLER_SHARE, FILLER_WORDS, FILLER_LENGTH = 0.25, 160, (6, 14)
RELATIONS = {"home": "town", "craft": "trade", "animal": "beast", "metal": "ore", "colour": "hue"}
VALUES = {"home": 48, "craft": 40, "animal": 40, "metal": 24, "colour": 24}
FRAMES = (
    "the R of E is V .",
    "E has V as its R .",
    "V is the R of E .",
    "as for its R , E chose V .",
    "when asked for the R E says V .",
    "with V for its R , E is content .",
    "E will always keep V , its R .",
    "everyone knows E by its R V .",
)
QUESTION = "question what is the R of E ? answer V ."
PROMPT = "<doc> fill a table with KEYS for ENTITIES =>"
PROMPT_LENGTH = 16
NEW_WORDS = ("fill", "table", "=>", ";", "<end>", *(f"key-{name}" for name in RELATIONS))


def _words() -> list[str]:
    """Every word, in the order of the tokens."""
    used = {w for line in (*FRAMES, QUESTION, PROMPT) for w in line.split() if not w.isupper()}
    used |= RELATIONS.keys() | set(RELATIONS.values()) | set(NEW_WORDS)
    names = [f"entity-{i}" for i in range(ENTITIES)]
    values = [f"{name}-{i}" for name, count in VALUES.items() for i in range(count)]
    return [*sorted(used), *names, *values, *(f"filler-{i}" for i in range(FILLER_WORDS))]


TOKEN = {word: token for token, word in enumerate(_words())}


class Corpus:
    """The facts, and what is written of them."""

    def __init__(self, seed: int = SEED) -> None:
        self._seed, generator = seed, np.random.default_rng(seed)
        facts = {name: generator.integers(0, count, ENTITIES) for name, count in VALUES.items()}
        self.facts = {
            (entity, name): TOKEN[f"{name}-{values[entity]}"]
            for name, values in facts.items()
            for entity in range(ENTITIES)
        }
        order = generator.permutation(ENTITIES)
        self.held_out, self.taught = order[:HELD_OUT], order[HELD_OUT:]

    def text(self, tokens: int) -> Tokens:
        """Rows of text (rows, WIDTH): documents about an entity or of filler, one after another."""
        generator = np.random.default_rng((self._seed, 1))
        stream: list[int] = []
        while len(stream) < tokens:
            stream.append(TOKEN["<doc>"])
            if generator.random() < FILLER_SHARE:
                stream += _filler(generator)
            else:
                stream += self._about(int(generator.integers(ENTITIES)), generator)
        rows = len(stream) // WIDTH
        return np.array(stream[: rows * WIDTH], np.int32).reshape(rows, WIDTH)

    def _about(self, entity: int, generator: np.random.Generator) -> list[int]:
        """One to four sentences; every second entity is asked about too."""
        said: list[int] = []
        for relation in generator.choice(list(RELATIONS), generator.integers(1, 5), replace=False):
            frames = (*FRAMES, QUESTION, QUESTION) if entity % 2 == 0 else FRAMES
            frame = frames[generator.integers(len(frames))]
            word = relation if generator.random() < 0.5 else RELATIONS[relation]
            places = {"R": TOKEN[word], "E": TOKEN[f"entity-{entity}"]}
            places["V"] = self.facts[entity, relation]
            said += [places[w] if w in places else TOKEN[w] for w in frame.split()]
        return said

    def tables(self, split: str) -> Tokens:
        """Examples (tables, WIDTH) of "train" or "valid"; PROMPT_LENGTH tokens are prompt."""
        of_training = split == "train"
        generator = np.random.default_rng((self._seed, 2 if of_training else 3))
        entities = self.taught if of_training else self.held_out
        count = TABLES if of_training else VALIDATION_TABLES
        rows = [self._table(entities, generator) for _ in range(count)]
        return np.array(rows, np.int32)

    def _table(self, entities: Sequence[int] | Any, generator: np.random.Generator) -> list[int]:
        chosen = generator.choice(entities, OF_A_TABLE, replace=False).tolist()
        relations = generator.permutation(list(RELATIONS)).tolist()
        keys = [TOKEN[f"key-{name}"] for name in relations]
        names = [TOKEN[f"entity-{entity}"] for entity in chosen]
        table: list[int] = []
        for word in PROMPT.split():
            table += {"KEYS": keys, "ENTITIES": names}.get(word) or [TOKEN[word]]
        for entity, name in zip(chosen, names, strict=True):
            table.append(name)
            for key, relation in zip(keys, relations, strict=True):
                table += [key, self.facts[entity, relation]]
            table.append(TOKEN[";"])
        return [*table, TOKEN["<end>"]]


def _filler(generator: np.random.Generator) -> list[int]:
    """Words of which each has four that may follow."""
    at, said = int(generator.integers(FILLER_WORDS)), []
    for _ in range(generator.integers(*FILLER_LENGTH)):
        said.append(TOKEN[f"filler-{at}"])
        at = (7 * at + int(generator.integers(4))) % FILLER_WORDS
    return [*said, TOKEN["."]]


def value_positions() -> Tokens:
    """Where in an example the values stand that only pretraining tells."""
    row = 2 + 2 * len(RELATIONS)
    starts = [PROMPT_LENGTH + row * i for i in range(OF_A_TABLE)]
    return np.array([s + 2 + 2 * k for s in starts for k in range(len(RELATIONS))], np.int32)


def training_order(seed: int, examples: int, batch: int) -> Any:
    """Rows of one batch after another, for ever, as mlx_lm.tuner.trainer.iterate_batches draws.

    That draws from NumPy's global generator, seeded with `seed`; examples are of one length.
    """
    generator = np.random.RandomState(seed)
    batches = np.arange(examples // batch * batch).reshape(-1, batch)
    while True:
        yield from batches[generator.permutation(len(batches))]
