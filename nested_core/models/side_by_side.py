"""A base model and an adapter of it in one model, which answers as either of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx_lm import load

from nested_core.errors import ConfigError
from nested_core.models.base_model import context_length, find_model_folder
from nested_core.models.generation import (
    Sampling,
    encode_messages,
    stream_answer,
)
from nested_core.models.lora_attachment import attach_stored_adapter
from nested_core.storage.adapter import read_adapter

Side = Literal["base", "adapter"]
SIDES: tuple[Side, Side] = ("base", "adapter")
MAX_CHARACTERS = 1_000_000  # a tokenizer takes some 180 bytes of memory for each
Messages = Sequence[Mapping[str, Any]]


class BaseAndAdapter:
    """One model in memory, with the parameters of the base and of the adapter to exchange.

    It computes as it is stored, which is how mlx_lm would serve it.
    """

    def __init__(self, adapter: Path, *, model: str | None, trust_remote_code: bool) -> None:
        """`model` is the base; None is the one that the adapter's configuration names.

        Raises ConfigError if the base cannot be loaded or does not fit, DamagedError for a damaged
        adapter.
        """
        read = read_adapter(adapter, follow_links=True)
        base = find_model_folder(str(model or read.config.get("model")))
        options = {"trust_remote_code": trust_remote_code}
        try:
            loaded = load(str(base), tokenizer_config=options, **options)  # type: ignore[arg-type]  # a bool, as mlx_lm takes it
        except (OSError, ValueError, RuntimeError, LookupError, ImportError, TypeError) as error:
            raise ConfigError(f"model: {base} could not be loaded: {error}") from error
        self._model = loaded[0]
        self._tokenizer = loaded[1]
        self._context = context_length(base)
        self._parameters: dict[Side, list[tuple[str, mx.array]]] = {
            "base": list(attach_stored_adapter(self._model, read).items()),
            "adapter": [(name, tensor.to_mlx()) for name, tensor in read.tensors.items()],
        }
        self._model.eval()

    @property
    def model(self) -> nn.Module:
        """The model, with whichever parameters answered last."""
        return self._model

    def _encode(self, messages: Messages) -> list[int]:
        """The tokens of a conversation; ConfigError where the model cannot see all of them."""
        characters = sum(len(str(message["content"])) for message in messages)
        tokens = [] if characters > MAX_CHARACTERS else encode_messages(self._tokenizer, messages)
        if tokens and (self._context is None or len(tokens) < self._context):
            return tokens
        size = f"{len(tokens):,} tokens" if tokens else f"{characters:,} characters"
        sees = "" if self._context is None else f", and the model sees {self._context:,} tokens"
        raise ConfigError(
            f"What is asked, with what was said before, has {size}{sees}. Ask in fewer words, or "
            f"begin a new conversation."
        )

    def stream_answers(
        self, conversations: Mapping[Side, Messages], sampling: Sampling
    ) -> Iterator[tuple[Side, str]]:
        """The answers to two conversations as they come, piece by piece in turn.

        An answer ends where the model's context does. Raises ConfigError for a conversation that
        leaves no room there for an answer.
        """
        prompts = {side: self._encode(messages) for side, messages in conversations.items()}
        answers = {}
        for side, prompt in prompts.items():
            left = sampling.max_tokens if self._context is None else self._context - len(prompt)
            limited = replace(sampling, max_tokens=min(sampling.max_tokens, left))
            answers[side] = stream_answer(self._model, self._tokenizer, prompt, limited)
        while answers:
            for side, pieces in list(answers.items()):
                self._model.load_weights(self._parameters[side], strict=False)
                piece = next(pieces, None)
                if piece is None:
                    del answers[side]
                elif piece:
                    yield side, piece
