"""Examples as a person can check them: each token with its text and whether the loss counts it.

Reads the arrays that training reads; tokenises nothing again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from nested_core.data.tokens.tokenized_split import TokenizedSplit

# What SentencePiece writes for a space; decoding one token alone drops it.
_SENTENCEPIECE_SPACE = "\u2581"


@dataclass(frozen=True)
class ShownToken:
    """One token; `text` is its decoded text, or its name if it is a part of a character."""

    id: int
    text: str
    supervised: bool


@dataclass(frozen=True)
class ShownExample:
    """One example after truncation, with the file and the line that it comes from."""

    file: str
    line: int
    tokens: tuple[ShownToken, ...]


def decode_examples_for_display(
    split: TokenizedSplit, file: str, tokenizer: Any, count: int
) -> list[ShownExample]:
    """The first examples of a split, at most `count`; `tokenizer` is the one it was made with."""
    shown = []
    for index in range(min(count, len(split))):
        mask = split.example_mask(index).tolist()
        tokens = tuple(
            ShownToken(token, _decode_token(token, tokenizer), is_supervised)
            for token, is_supervised in zip(split.example(index).tolist(), mask, strict=True)
        )
        shown.append(ShownExample(file, int(split.lines[index]), tokens))
    return shown


def _decode_token(token: int, tokenizer: Any) -> str:
    name = str(tokenizer.convert_ids_to_tokens(token))
    if _SENTENCEPIECE_SPACE in name:
        return name.replace(_SENTENCEPIECE_SPACE, " ")
    text = str(tokenizer.decode([token], clean_up_tokenization_spaces=False))
    return name if "\ufffd" in text else text
