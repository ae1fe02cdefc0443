"""Ask a base model and several adapters of it; the base is in memory only once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.generate import generate_step

from nested_core.errors import ConfigError
from nested_core.models.adapter_fit import describe_other_base
from nested_core.models.base_model import context_length, find_model_folder, load_lazily
from nested_core.models.generation import (
    Sampling,
    encode_messages,
    make_sampler_of,
    require_rows_for,
)
from nested_core.models.lora_attachment import copy_with_adapter
from nested_core.pipeline.finetune import Chat
from nested_core.storage.adapter import read_adapter

BASE = "base"
MAX_CHARACTERS = 1_000_000  # a tokenizer takes some 180 bytes of memory for each
Messages = Sequence[Mapping[str, Any]]


class SideBySide:
    """A base and adapters of it, which compute in their stored types, as mlx_lm would serve them.

    Attributes:
        sides: the names by which they are asked: the names of the adapters, then "base".
    """

    def __init__(
        self,
        adapters: Mapping[str, Path],
        *,
        model: str | None,
        trust_remote_code: bool,
        tools: Any = None,
    ) -> None:
        """Load the base, and each adapter into a model that shares the base's weights.

        adapters: the folder of each adapter, by the name of its side.
        model: the base; None is the one named in the first adapter's configuration.
        tools: that the chat template shows in every conversation.

        Raises ConfigError if the base cannot be loaded or an adapter belongs to another base,
        DamagedError for a damaged adapter.
        """
        loaded = {name: read_adapter(path, follow_links=True) for name, path in adapters.items()}
        base = find_model_folder(str(model or next(iter(loaded.values())).base_model))
        loaded_base, self._tokenizer, _ = load_lazily(base, trust_remote_code=trust_remote_code)
        mx.eval(loaded_base.parameters())
        loaded_base.eval()
        self._models: dict[str, nn.Module] = {BASE: loaded_base}
        for name, adapter in loaded.items():
            if other_base := describe_other_base(adapter.config, base):
                raise ConfigError(f"{name}: {other_base}. Ask it with the base of its training.")
            self._models[name] = copy_with_adapter(loaded_base, adapter)
        self._context = context_length(base)
        self._tools = tools
        self.sides = (*loaded, BASE)

    def _encode(self, messages: Messages) -> list[int]:
        """Encode a conversation; ConfigError if it leaves no room for an answer in the context."""
        characters = sum(len(str(message["content"])) for message in messages)
        is_long = characters > MAX_CHARACTERS
        tokens = [] if is_long else encode_messages(self._tokenizer, messages, self._tools)
        if tokens and (self._context is None or len(tokens) < self._context):
            return tokens
        size = f"{len(tokens):,} tokens" if tokens else f"{characters:,} characters"
        sees = "" if self._context is None else f", and the model sees {self._context:,} tokens"
        raise ConfigError(
            f"What is asked, with what was said before, has {size}{sees}. Ask in fewer words, or "
            f"begin a new conversation."
        )

    def stream_answers(
        self, chats: Mapping[str, Messages], sampling: Sampling, base_tokens: int | None = None
    ) -> Iterator[tuple[str, str]]:
        """Yield side and text of the answers to one conversation per side, as they come.

        A text may be empty; each side has one at least.

        A side is the base or an adapter, by name; one answers after the other.

        sampling: how to generate; an answer may be cut off at its number of tokens.
        base_tokens: that number for the base, which may go on and on; None for the same.

        An answer ends at the end of the model's context. Raises ConfigError for a conversation that
        leaves no room for an answer.
        """
        prompts = {side: self._encode(messages) for side, messages in chats.items()}
        for side, prompt in prompts.items():
            most = sampling.max_tokens if side != BASE or base_tokens is None else base_tokens
            room = most if self._context is None else self._context - len(prompt)
            limited = replace(sampling, max_tokens=min(most, room))
            for piece in stream_answer(self._models[side], self._tokenizer, prompt, limited):
                yield side, piece

    def ask(self, side: str, prompt: str, *, max_tokens: int, temperature: float = 0.0) -> str:
        """Return the whole answer of one side to a user's message, of `max_tokens` at most."""
        sampling = Sampling(max_tokens, temperature=temperature)
        chats = {side: [{"role": "user", "content": prompt}]}
        return "".join(piece for _, piece in self.stream_answers(chats, sampling)).strip()


def stream_answer(
    model: nn.Module, tokenizer: Any, prompt: Sequence[int], sampling: Sampling
) -> Iterator[str]:
    """Yield the answer to one prompt in pieces of text, as they are generated.

    Each piece is computed when it is requested. Stop texts are not applied. Raises ConfigError for
    a token beyond the model's embedding.
    """
    require_rows_for([prompt], model, tokenizer)
    detokenizer = tokenizer.detokenizer
    steps = generate_step(
        mx.array(list(prompt)),
        model,
        max_tokens=sampling.max_tokens,
        sampler=make_sampler_of(sampling),
    )
    for token, _ in steps:
        if int(token) in tokenizer.eos_token_ids:
            break
        detokenizer.add_token(int(token))
        yield detokenizer.last_segment
    detokenizer.finalize()
    yield detokenizer.last_segment


CHAT = Chat(SideBySide)
