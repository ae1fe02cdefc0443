"""A tokenizer's chat template: how it wants turns written, and what it makes of them.

Training, samples and eval sets prepare their turns here, so that one conversation gives the same
tokens in each.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property, lru_cache
from typing import Any

_QUESTION = {"role": "user", "content": "What is it?"}
_ANSWER = "It is a lighthouse."
_ARGUMENTS = {"query": "lighthouse"}


class ChatTemplate:
    """The chat template of one tokenizer; `chat_template_of` makes it once.

    What it expects is found by rendering small conversations.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    def prepare(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """The turns as the template wants them, each with a content.

        The arguments of a tool call are objects, as mlx_lm.server makes them, or JSON texts for a
        template that joins texts. An answer loses an end-of-sequence text that the template adds.
        """
        return [self._prepare_turn(message) for message in messages]

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Any = None, **more: Any) -> str:
        """The text of prepared turns, or what the template writes for none; raises what it does."""
        return str(self._apply(messages, tools, tokenize=False, **more))

    def tokenize(
        self, messages: Sequence[Mapping[str, Any]], tools: Any = None, **more: Any
    ) -> list[int]:
        """The tokens of prepared turns, as mlx_lm's datasets make them."""
        return list(self._apply(messages, tools, return_dict=False, **more))

    def _apply(self, messages: Sequence[Mapping[str, Any]], tools: Any, **more: Any) -> Any:
        if messages:
            return self._tokenizer.apply_chat_template(list(messages), tools=tools, **more)
        # transformers looks at the first message; of a batch, at the first conversation.
        return self._tokenizer.apply_chat_template([[]], tools=tools, **more)[0]

    @cached_property
    def text_tokenizer(self) -> Any:
        """Makes the tokens of a rendered text; None for a tokenizer that renders in its own way."""
        from transformers import PreTrainedTokenizerBase

        is_bare = isinstance(self._tokenizer, PreTrainedTokenizerBase)
        inner = self._tokenizer if is_bare else getattr(self._tokenizer, "_tokenizer", None)
        renders = getattr(type(inner), "apply_chat_template", None)
        return inner if renders is PreTrainedTokenizerBase.apply_chat_template else None

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The end-of-sequence texts that answers lose; none if the template adds no end."""
        texts = list_end_texts(self._tokenizer)
        return texts if self.example.rpartition(_ANSWER)[2].lstrip().startswith(texts) else ()

    @cached_property
    def example(self) -> str:
        """The text of a question and its answer; empty where the template does not take them."""
        return self._try_to_render({"role": "assistant", "content": _ANSWER})

    @cached_property
    def joins_argument_text(self) -> bool:
        """Whether the arguments of a tool call have to be text, which the template joins as it is.

        An object raises there, or is written as Python writes it.
        """
        text = json.dumps(_ARGUMENTS)
        of_object = self._try_to_render(_call_with(_ARGUMENTS))
        if text not in self._try_to_render(_call_with(text)):
            return False
        return _ARGUMENTS["query"] not in of_object or str(_ARGUMENTS) in of_object

    def _try_to_render(self, answer: Mapping[str, Any]) -> str:
        try:
            return self.render([_QUESTION, answer])
        except Exception:  # a template is its author's program: it may raise anything
            return ""

    def _prepare_turn(self, message: Mapping[str, Any]) -> dict[str, Any]:
        prepared = dict(message)
        if message.get("tool_calls"):
            prepared["tool_calls"] = [self._prepare_call(call) for call in message["tool_calls"]]
        if message.get("content") is None:  # mlx_lm.server gives the template an empty text
            prepared["content"] = ""
        elif message["role"] == "assistant":
            prepared["content"] = self.without_end(message["content"])
        return prepared

    def without_end(self, answer: str) -> str:
        """The answer without the end-of-sequence texts at its end."""
        while (stripped := answer.rstrip()).endswith(self.ends):
            end = next(end for end in self.ends if stripped.endswith(end))
            answer = stripped.removesuffix(end)
        return answer

    def _prepare_call(self, call: Mapping[str, Any]) -> dict[str, Any]:
        if "function" in call:
            return {**call, "function": self._prepare_call(call["function"])}
        arguments = call.get("arguments")
        if self.joins_argument_text:
            if isinstance(arguments, dict):
                arguments = json.dumps(arguments, ensure_ascii=False)
        elif isinstance(arguments, str):
            arguments = json.loads(arguments)
        return {**call, "arguments": arguments} if "arguments" in call else dict(call)


def end_token_ids(tokenizer: Any) -> frozenset[int]:
    """The tokens that end an answer: several of mlx_lm's wrapper, one or none of a plain one."""
    return frozenset(getattr(tokenizer, "eos_token_ids", None) or {tokenizer.eos_token_id}) - {None}


def list_end_texts(tokenizer: Any) -> tuple[str, ...]:
    """The texts of the tokens that end an answer."""
    return tuple(tokenizer.convert_ids_to_tokens(end) for end in end_token_ids(tokenizer))


@lru_cache(maxsize=4)
def chat_template_of(tokenizer: Any) -> ChatTemplate:
    """The chat template of a tokenizer that has one."""
    return ChatTemplate(tokenizer)


def _call_with(arguments: Any) -> dict[str, Any]:
    """An answer that calls a tool; Mistral's templates want an id of nine letters."""
    function = {"name": "search", "arguments": arguments}
    call = {"id": "call00001", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}
