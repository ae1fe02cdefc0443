"""One example -> the tokens that mlx-lm makes of it, and the stretches of them that are learnt.

Truncates nothing and judges nothing: a template that rewrites what came before is only noted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from nested_core.data.lines.examples import Example

# What is learnt of an example: all of it, the last turn, or every turn of the assistant.
Targets = Literal["whole", "last", "all"]
Span = tuple[int, int]


@dataclass(frozen=True)
class EncodedExample:
    """One example before truncation.

    spans: the stretches [from, to) of tokens that are learnt, ascending; broken_turn: the index of
    the first message whose prompt, as templated, does not begin the templated whole, else -1.
    """

    tokens: list[int]
    spans: tuple[Span, ...]
    broken_turn: int = -1


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can turn messages into tokens (mlx_lm's wrapper, or a plain one)."""
    if hasattr(tokenizer, "has_chat_template"):
        return bool(tokenizer.has_chat_template)
    return getattr(tokenizer, "chat_template", None) is not None


def encode_example(example: Example, tokenizer: Any, targets: Targets) -> EncodedExample:
    """Tokens as in mlx_lm/tuner/datasets.py; raises what the template raises.

    `last` starts where mlx-lm's prompt mask ends. `all` runs, for each assistant turn, from the end
    of the templated turns before it to the end of the templated turns up to it.
    """
    if example.format == "text":
        tokens = _encode_text(example.text, tokenizer)
        return EncodedExample(tokens, ((0, len(tokens)),))
    tokens = _apply(tokenizer, example, len(example.messages))
    if targets == "whole":
        return EncodedExample(tokens, ((0, len(tokens)),))
    if targets == "last":
        return _encode_last(example, tokenizer, tokens)
    return _encode_all(example, tokenizer, tokens)


def _encode_text(text: str, tokenizer: Any) -> list[int]:
    tokens = list(tokenizer.encode(text))
    end = tokenizer.eos_token_id
    if end is not None and (not tokens or tokens[-1] != end):
        tokens.append(end)
    return tokens


def _apply(tokenizer: Any, example: Example, turns: int, *, asks: bool = False) -> list[int]:
    """The tokens of the first turns; `asks` adds what the template puts before an answer."""
    more = {"add_generation_prompt": True} if asks else {}
    messages = example.messages[:turns]
    template = tokenizer.apply_chat_template
    return list(template(messages, tools=example.tools, return_dict=False, **more))


def _encode_last(example: Example, tokenizer: Any, tokens: list[int]) -> EncodedExample:
    last = len(example.messages) - 1
    asks = example.messages[last]["role"] == "assistant"
    prompt = _apply(tokenizer, example, last, asks=asks)
    broken_turn = -1 if _begins(prompt, tokens) else last
    return EncodedExample(tokens, ((len(prompt), len(tokens)),), broken_turn)


def _encode_all(example: Example, tokenizer: Any, tokens: list[int]) -> EncodedExample:
    spans: list[Span] = []
    for turn, message in enumerate(example.messages):
        if message["role"] != "assistant":
            continue
        prompt = _apply(tokenizer, example, turn, asks=True)
        is_last = turn == len(example.messages) - 1
        until = tokens if is_last else _apply(tokenizer, example, turn + 1)
        if not (_begins(prompt, tokens) and _begins(until, tokens)):
            return EncodedExample(tokens, tuple(spans), turn)
        spans.append((len(prompt), len(until)))
    return EncodedExample(tokens, tuple(spans))


def _begins(prefix: list[int], tokens: list[int]) -> bool:
    return tokens[: len(prefix)] == prefix
