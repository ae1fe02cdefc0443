"""Hostile inputs for a parser: sound examples, changed at random by bytes, tokens and pieces."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Sequence

MAX_INPUT_BYTES = 64 * 1024
MAX_CORPUS = 2000
NUMBERS = (
    b"0",
    b"-1",
    b"1e999",
    b"-0",
    b"9" * 400,
    b"1e-400",
    b"4294967296",
    b"18446744073709551615",
)
COMMON_TOKENS = (
    b"\0",
    b"\n",
    b"\r\n",
    b"\xff",
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b" ",
    b"\t",
    b'"',
)
NUMBER = re.compile(rb"-?\d+")
Change = Callable[[bytearray, random.Random], None]


def flip_a_bit(content: bytearray, dice: random.Random) -> None:
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)


def set_a_byte(content: bytearray, dice: random.Random) -> None:
    content[dice.randrange(len(content))] = dice.choice((0, 9, 10, 34, 58, 91, 92, 123, 127, 255))


def delete_a_piece(content: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(content))
    del content[start : start + dice.choice((1, 2, 8, 64, 1024))]


def repeat_a_piece(content: bytearray, dice: random.Random) -> None:
    start = dice.randrange(len(content))
    piece = content[start : start + dice.choice((1, 2, 3, 8, 64))]
    content[start:start] = piece * dice.choice((1, 2, 16, 300, 3000))


def truncate(content: bytearray, dice: random.Random) -> None:
    del content[dice.randrange(len(content)) :]


def replace_a_number(content: bytearray, dice: random.Random) -> None:
    numbers = list(NUMBER.finditer(content[:4096]))
    if numbers:
        start, end = dice.choice(numbers).span()
        content[start:end] = dice.choice(NUMBERS)


def move_a_piece(content: bytearray, dice: random.Random) -> None:
    start, place = dice.randrange(len(content)), dice.randrange(len(content))
    piece = content[start : start + dice.randint(1, 40)]
    content[place:place] = piece


CHANGES: tuple[Change, ...] = (
    *(flip_a_bit, set_a_byte, delete_a_piece, repeat_a_piece, truncate),
    *(replace_a_number, move_a_piece),
)


class InputGenerator:
    """Makes inputs from a corpus that grows by those that a parser answered in a new way."""

    def __init__(self, corpus: Sequence[bytes], tokens: Sequence[bytes], seed: int) -> None:
        self._corpus = list(corpus)
        self._tokens = (*COMMON_TOKENS, *tokens)
        self._dice = random.Random(seed)
        self._answers: set[str] = set()

    def next(self) -> bytes:
        """One input of at most 64 KiB."""
        dice = self._dice
        content = bytearray(dice.choice(self._corpus))
        for _ in range(dice.choice((1, 1, 2, 3, 8))):
            choice = dice.random()
            if not content or choice < 0.3:
                self._insert_token(content)
            elif choice < 0.4:
                other = dice.choice(self._corpus)
                content[dice.randrange(len(content)) :] = other[dice.randrange(len(other) + 1) :]
            else:
                dice.choice(CHANGES)(content, dice)
        return bytes(content[:MAX_INPUT_BYTES])

    def _insert_token(self, content: bytearray) -> None:
        place = self._dice.randint(0, len(content))
        token = self._dice.choice(self._tokens) * self._dice.choice((1, 1, 1, 2, 50, 2000))
        content[place:place] = token

    def learn(self, content: bytes, answer: str) -> None:
        """Keep an input whose answer was not seen before, to start from it again."""
        if answer not in self._answers and len(self._corpus) < MAX_CORPUS:
            self._answers.add(answer)
            self._corpus.append(content)
