"""Characters that a tokenizer loses, and turns written by hand for a base with a chat template."""

from __future__ import annotations

import re
import unicodedata
from typing import Any

from nested_core.data.lines.example_parsing import Example, find_row_format
from nested_core.data.tokens.example_encoding import has_chat_template
from nested_core.data.tokens.shown_texts import Note
from nested_core.storage.untrusted_files import collect_strings

# A question's mark at the beginning of a text, or with hashes anywhere, and an answer's after it.
_HANDWRITTEN_TURNS_PATTERN = re.compile(
    r"(?is)(?:\A[\s*#]*(?:question|instruction|user|human|q)\b|###\s*(?:instruction|question|user|human)\b)"
    r"[\s*]{0,3}:.*?\b(?:answer|response|assistant|output|bot|a)\b[\s*]{0,3}:"
)
_JUDGED_CATEGORIES = "LNPS"  # letters, numbers, punctuation, symbols (unicodedata)
MAX_LOST_PER_ROW = 3


class TokenizerChecks:
    """Notes on an example's texts that need the base's tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        """Remember the tokenizer, and each character's fate once it was asked."""
        self._tokenizer = tokenizer
        self._has_template = has_chat_template(tokenizer)
        self._known: set[str] = set()
        self._lost: set[str] = set()

    def __call__(self, example: Example) -> list[Note]:
        """Return a note for each of the first lost characters, and one for handwritten turns."""
        texts = [example.text, *collect_strings(example.messages)]
        characters = set().union(*texts)
        for character in characters - self._known:
            if self._is_lost(character):
                self._lost.add(character)
        self._known |= characters
        notes = [
            Note("warning", "lost-character", _describe_lost(character))
            for character in sorted(characters & self._lost)[:MAX_LOST_PER_ROW]
        ]
        is_plain_text = not find_row_format(example.format).is_templated
        if is_plain_text and self._has_template and _HANDWRITTEN_TURNS_PATTERN.search(example.text):
            notes.append(Note("warning", "handwritten-turns", _HANDWRITTEN_TURNS_MESSAGE))
        return notes

    def _is_lost(self, character: str) -> bool:
        """Return whether a character is not in what its tokens decode to, in whatever case."""
        if unicodedata.category(character)[0] not in _JUDGED_CATEGORIES:
            return False
        tokens = self._tokenizer.encode(character, add_special_tokens=False)
        decoded = _fold(self._tokenizer.decode(tokens))
        return _fold(character).strip() not in decoded


def _fold(text: str) -> str:
    """Return a text without differences that a tokenizer's normaliser makes: case, NFKC."""
    return unicodedata.normalize("NFKC", text).casefold()


def _describe_lost(character: str) -> str:
    """Say what becomes of a character."""
    return (
        f"{character} (U+{ord(character):04X}) is lost: the tokenizer has no token for it, so the "
        f"model neither sees nor writes it. Take the tokenizer that belongs to the base"
    )


_HANDWRITTEN_TURNS_MESSAGE = (
    "turns written by hand (such as `Question: ... Answer: ...`) in plain text, for a base with a "
    "chat template: served as chat, the adapter would read another text than it learnt. Write "
    "such rows as messages, or ask it by plain text alone"
)
