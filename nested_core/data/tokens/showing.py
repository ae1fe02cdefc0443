"""Examples as a person can check them: each token with its text and whether it is learnt.

Reads what training reads; tokenises nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nested_core.data.tokens.split import TokenizedSplit

_SPACE_MARK = "\u2581"  # what SentencePiece writes for a space; decoding one token alone drops it


@dataclass(frozen=True)
class ShownToken:
    """One token; `text` is what it stands for, or its name where it is a part of a character."""

    id: int
    text: str
    supervised: bool


@dataclass(frozen=True)
class ShownExample:
    """One example after truncation, with the file and the line that it comes from."""

    file: str
    line: int
    tokens: tuple[ShownToken, ...]


def show_examples(
    split: TokenizedSplit, file: str, tokenizer: Any, count: int
) -> list[ShownExample]:
    """The first examples of a split, at most `count`; `tokenizer` is the one it was made with."""
    return [
        ShownExample(
            file,
            int(split.lines[index]),
            tuple(
                ShownToken(token, _text_of(token, tokenizer), is_learnt)
                for token, is_learnt in zip(
                    split.example(index).tolist(), split.supervision(index).tolist(), strict=True
                )
            ),
        )
        for index in range(min(count, len(split)))
    ]


def _text_of(token: int, tokenizer: Any) -> str:
    name = str(tokenizer.convert_ids_to_tokens(token))
    if _SPACE_MARK in name:
        return name.replace(_SPACE_MARK, " ")
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return name if "\ufffd" in text else text
