"""Find control tokens in the text of rows: forged turns, doubled ends, tokens of other models.

A tokenizer reads the text of a control token as that token, wherever it is.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

from nested_core.data.tokens.shown_texts import Note, RowText
from nested_core.models.chat_template import (
    ChatTemplate,
    chat_template_of,
    end_token_ids,
    list_end_texts,
)

CONTROL_CHECK = "control-token"
FOREIGN_CHECK = "foreign-control-token"
DOUBLED_CHECK = "doubled-control-token"
# Turns and ends of ChatML, Llama, Gemma, Mistral, Phi and DeepSeek.
_KNOWN_CONTROL_TOKENS = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>"),
    *("<|begin_of_text|>", "<|start_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|end_of_text|>"),
    *("<start_of_turn>", "<end_of_turn>", "<bos>", "<eos>"),
    *("[INST]", "[/INST]", "<|user|>", "<|assistant|>", "<|end|>"),
    *("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<\uff5cend\u2581of\u2581sentence\uff5c>"),
)
_END_IN_HTML = "</s>"  # the end of struck text too, so that it counts only where a text ends
_OTHER_MARKUP = ("think_start", "think_end", "tool_call_start", "tool_call_end")


class _ControlTokens(NamedTuple):
    """The texts of a tokenizer's control tokens, and a pattern of these and of foreign ones."""

    texts: frozenset[str]
    pattern: re.Pattern[str]


@lru_cache(maxsize=4)
def _control_tokens_of(tokenizer: Any) -> _ControlTokens:
    """Return the tokenizer's control tokens: special ones, and the chat template's around turns.

    Markers of thoughts and tool calls are not included.
    """
    example = chat_template_of(tokenizer).example
    added = getattr(tokenizer, "added_tokens_decoder", {}).values()
    markup = {getattr(tokenizer, name, None) for name in _OTHER_MARKUP}
    texts = {token.content for token in added if token.special or token.content in example}
    texts -= markup
    foreign = set(_KNOWN_CONTROL_TOKENS) - {token.content for token in added}
    words = [re.escape(text) for text in sorted(texts | foreign, key=len, reverse=True)]
    if _END_IN_HTML not in texts:
        words.append(rf"{_END_IN_HTML}(?=\s*(?:\0|\Z))")
    return _ControlTokens(frozenset(texts), re.compile("|".join(words)))


def has_control_token(texts: Sequence[str], tokenizer: Any) -> bool:
    """Return whether a text has a control token, of this tokenizer or of another model."""
    return _control_tokens_of(tokenizer).pattern.search("\0".join(texts)) is not None


def note_control_tokens(texts: Sequence[RowText], tokenizer: Any) -> list[Note]:
    """Return a warning for each control token in a text, of this tokenizer or of another model.

    A control token, such as <|im_end|>, has a meaning in the chat template that the text of a row
    should not have.
    """
    notes: list[Note] = []
    tokens = _control_tokens_of(tokenizer)
    if not has_control_token([text.spellings[0] for text in texts], tokenizer):
        return notes
    for text in texts:
        where = f"{text.role} turns" if text.turn is not None else "tools"
        for word in dict.fromkeys(tokens.pattern.findall(text.spellings[0])):
            if word in tokens.texts:
                message = (
                    f"{word} in the text of {where} is read as this control token of the model: "
                    f"as an end or a turn that is none. Take it out of the text"
                )
                notes.append(Note("warning", CONTROL_CHECK, message))
            else:
                notes.append(_note_foreign_token(word, where))
    return notes


def _note_foreign_token(word: str, where: str) -> Note:
    """Build the warning for a control token of another model.

    word: the token's text. where: the texts that have it, for the message.
    """
    return Note(
        "warning",
        FOREIGN_CHECK,
        f"{word} in {where} is a control token of other models, which this one reads as letters. "
        f"Take it out of the text, or write the token of this model",
    )


def note_taken_ends(
    messages: Sequence[Mapping[str, Any]],
    prepared: Sequence[Mapping[str, Any]],
    template: ChatTemplate,
) -> list[Note]:
    """Return a warning for each end-of-sequence text that was removed from the end of answers.

    messages: the row's turns; prepared: the turns given to the template, of which such texts were
        removed. template: its `ends` are the end-of-sequence texts that it adds itself.
    """
    removed = [
        before["content"][len(after["content"]) :]
        for before, after in zip(messages, prepared, strict=True)
        if before.get("content") not in (None, after["content"])
    ]
    return [
        Note(
            "warning",
            DOUBLED_CHECK,
            f"{end} at the end of answers: the chat template adds it, so it was taken from the "
            f"text. Take it out of the rows",
        )
        for end in template.ends
        if any(end in text for text in removed)
    ]


def note_tokens_in_text(text: str, tokens: Sequence[int], tokenizer: Any) -> tuple[Note, ...]:
    """Return warnings for a plain text: doubled start or end tokens, and foreign control tokens.

    tokens: the tokens of the text, with those that the tokenizer and mlx-lm add at its ends.
    """
    notes = []
    start = getattr(tokenizer, "bos_token_id", None)
    if start is not None and list(tokens[:2]) == [start, start]:
        name = tokenizer.convert_ids_to_tokens(start)
        message = f"{name} twice at the start of texts: the tokenizer adds it. Take it out of them"
        notes.append(Note("warning", DOUBLED_CHECK, message))
    end = tokenizer.eos_token
    if end and _ends_in_two_ends(text, tokens, tokenizer):
        message = f"{end} after texts that end already: mlx-lm adds it. End the texts with it alone"
        notes.append(Note("warning", DOUBLED_CHECK, message))
    control = _control_tokens_of(tokenizer)
    words = control.pattern.findall(text)
    foreign = dict.fromkeys(word for word in words if word not in control.texts)
    return (*notes, *(_note_foreign_token(word, "texts") for word in foreign))


def _ends_in_two_ends(text: str, tokens: Sequence[int], tokenizer: Any) -> bool:
    """Return whether the text has an end token of its own before the one that is appended.

    tokens: the tokens of the text, with the end that is appended.
    """
    stripped = text.rstrip()
    if not stripped.endswith(list_end_texts(tokenizer)):
        return False
    return stripped != text or len(tokens) > 1 and tokens[-2] in end_token_ids(tokenizer)
