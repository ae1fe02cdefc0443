"""Invented entities and what is said of them: text to pretrain on, and tables to fine-tune on.

Everything follows from one seed. A word is a token, so that no tokenizer is needed. The tables are
in a form that the pretraining never has, of words that it does have, and those of the validation
set are about entities that no table of the training set has: what they hold is known from
pretraining alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Tokens = np.ndarray[Any, np.dtype[np.int32]]

SEED = 20261120
WIDTH = 33  # tokens of an example and of a row of text: 32 are predicted
VOCABULARY = 1024
ENTITIES, HELD_OUT = 192, 48
TABLES, VALIDATION_TABLES = 2048, 96
FILLER_SHARE, FILLER_LENGTH = 0.25, (6, 14)
RELATIONS = {"home": "town", "craft": "trade", "animal": "beast", "metal": "ore", "colour": "hue"}
VALUES = {"home": 48, "craft": 40, "animal": 40, "metal": 24, "colour": 24}
FRAMES = (  # the value comes last: whoever knows the fact can tell it
    "the R of E is V .",
    "E has as its R V .",
    "as for its R , E chose V .",
    "when asked for the R E says V .",
    "everyone knows E by its R V .",
    "of all there is for R E took V .",
    "ask E about its R and hear V .",
    "what E keeps for R is V .",
)
QUESTION = "question what is the R of E ? answer V ."
PROMPT = "<doc> fill table of KEYS for E =>"
PROMPT_LENGTH = 12
FORM_WORDS = ("fill", "table", "=>", ";", "<end>")  # known from filler
FILLERS = (*FORM_WORDS, *(f"filler-{i}" for i in range(160)))


def _words() -> list[str]:
    """Every word, in the order of the tokens."""
    used = {w for line in (*FRAMES, QUESTION, PROMPT) for w in line.split() if not w.isupper()}
    used |= RELATIONS.keys() | set(RELATIONS.values())
    names = [f"entity-{i}" for i in range(ENTITIES)]
    values = [f"{name}-{i}" for name, count in VALUES.items() for i in range(count)]
    return [*sorted(used - set(FILLERS)), *names, *values, *FILLERS]


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
        """Rows of text (rows, WIDTH): documents of facts or of filler, one after another."""
        generator = np.random.default_rng((self._seed, 1))
        stream: list[int] = []
        while len(stream) < tokens:
            stream.append(TOKEN["<doc>"])
            if generator.random() < FILLER_SHARE:
                stream += _filler(generator)
            else:
                stream += self._statements(generator)
        rows = len(stream) // WIDTH
        return np.array(stream[: rows * WIDTH], np.int32).reshape(rows, WIDTH)

    def _statements(self, generator: np.random.Generator) -> list[int]:
        """One to four sentences about an entity; every second one is asked about too."""
        entity, said = int(generator.integers(ENTITIES)), list[int]()
        frames = (*FRAMES, QUESTION, QUESTION) if entity % 2 == 0 else FRAMES
        for relation in generator.choice(list(RELATIONS), generator.integers(1, 5), replace=False):
            frame = frames[generator.integers(len(frames))]
            word = relation if generator.random() < 0.5 else RELATIONS[relation]
            places = {"R": TOKEN[word], "E": TOKEN[f"entity-{entity}"]}
            places["V"] = self.facts[entity, relation]
            said += [places[w] if w in places else TOKEN[w] for w in frame.split()]
        return said

    def asked(self) -> tuple[Tokens, Tokens]:
        """Every fact as the beginning of a sentence (facts, tokens), and the values."""
        places = [(TOKEN[relation], TOKEN[f"entity-{entity}"]) for entity, relation in self.facts]
        words = ["<doc>", "the", "R", "of", "E", "is"]
        rows = [[{"R": r, "E": e}.get(w) or TOKEN[w] for w in words] for r, e in places]
        return np.array(rows, np.int32), np.array(list(self.facts.values()), np.int32)

    def tables(self, split: str) -> Tokens:
        """Examples (tables, WIDTH) of "train" or "valid"; PROMPT_LENGTH tokens are prompt."""
        of_training = split == "train"
        generator = np.random.default_rng((self._seed, 2 if of_training else 3))
        entities = self.taught if of_training else self.held_out
        count = TABLES if of_training else VALIDATION_TABLES
        rows = [self._table(entities, generator) for _ in range(count)]
        return np.array(rows, np.int32)

    def _table(self, entities: Any, generator: np.random.Generator) -> list[int]:
        entity = int(generator.choice(entities))
        relations = generator.permutation(list(RELATIONS)).tolist()
        keys, name = [TOKEN[relation] for relation in relations], TOKEN[f"entity-{entity}"]
        table: list[int] = []
        for word in PROMPT.split():
            table += {"KEYS": keys, "E": [name]}.get(word) or [TOKEN[word]]
        for key, relation in zip(keys, relations, strict=True):
            table += [name, key, self.facts[entity, relation], TOKEN[";"]]
        return [*table, TOKEN["<end>"]]


def _filler(generator: np.random.Generator) -> list[int]:
    """Words of which each has four that may follow."""
    at, said = int(generator.integers(len(FILLERS))), []
    for _ in range(generator.integers(*FILLER_LENGTH)):
        said.append(TOKEN[FILLERS[at]])
        at = (7 * at + int(generator.integers(4))) % len(FILLERS)
    return [*said, TOKEN["."]]


def value_positions() -> Tokens:
    """Where in an example the values stand that only pretraining tells."""
    return PROMPT_LENGTH + 2 + 4 * np.arange(len(RELATIONS), dtype=np.int32)


def training_order(seed: int, examples: int, batch: int) -> Any:
    """Rows of one batch after another, for ever, as mlx_lm.tuner.trainer.iterate_batches draws.

    That draws from NumPy's global generator, seeded with `seed`; examples are of one length.
    """
    generator = np.random.RandomState(seed)
    batches = np.arange(examples // batch * batch).reshape(-1, batch)
    while True:
        yield from batches[generator.permutation(len(batches))]
