"""A tokenizer, and its chat template: prepares messages as it expects them, and renders them.

Training, samples and eval sets all use it, so that one conversation gives the same tokens in each.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property, lru_cache
from os.path import commonprefix
from typing import Any, Protocol

from nested_core.errors import NestedTuneError

FIXED_DATE = datetime(2024, 7, 26, 12, tzinfo=UTC)  # of Llama's templates, without a clock
_CLOCK = "strftime_now"  # of transformers.utils.chat_template_utils
_QUESTION = {"role": "user", "content": "What is it?"}
_ANSWER = "It is a lighthouse."
_ARGUMENTS = {"query": "lighthouse"}
Messages = Sequence[Mapping[str, object]]


class AddedToken(Protocol):
    """A token that was added to the vocabulary, as transformers describes it."""

    content: str
    special: bool
    normalized: bool


class Detokenizer(Protocol):
    """The text of tokens that come one by one."""

    text: str

    def add_token(self, token: int) -> None:
        """Append a token."""

    def finalize(self) -> None:
        """Bring the text to its end: no token follows."""


class Tokenizer(Hashable, Protocol):
    """What the core uses of a tokenizer: mlx_lm's wrapper, or a plain one of transformers."""

    bos_token: str | None
    eos_token: str | None
    eos_token_id: int | None
    eos_token_ids: set[int]
    has_chat_template: bool
    added_tokens_decoder: Mapping[int, AddedToken]
    backend_tokenizer: Any  # tokenizers.Tokenizer, of a fast one

    @property
    def detokenizer(self) -> Detokenizer:
        """A new detokenizer."""

    def encode(self, text: str, **options: bool) -> list[int]:
        """Return the tokens of a text."""

    def decode(self, tokens: Sequence[int], **options: bool) -> str:
        """Return the text of tokens."""

    def convert_ids_to_tokens(self, token: int) -> str:
        """Return a token's name in the vocabulary."""

    def apply_chat_template(self, messages: Sequence[object], **options: object) -> Any:
        """Return the text of a conversation, or its tokens; of a batch, a list of these."""


class ChatTemplate:
    """The chat template of one tokenizer; create it with `chat_template_of`, which caches it.

    What the template expects is found out by rendering small conversations.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap the chat template of a tokenizer."""
        self._tokenizer = tokenizer

    def prepare(self, messages: Messages) -> list[dict[str, Any]]:
        """Return messages in the form that the template expects, each with a content.

        Arguments of tool calls become objects, as in mlx_lm.server, or JSON texts for a template
        that concatenates texts. An answer loses the end-of-sequence text at its end if the template
        adds one.
        """
        return [self._prepare_turn(message) for message in messages]

    def render(self, messages: Messages, tools: object = None, **more: object) -> str:
        """Return the text of prepared messages; an empty list renders an empty conversation.

        Raises whatever the template raises.
        """
        return str(self._apply(messages, tools, tokenize=False, **more))

    def tokenize(self, messages: Messages, tools: object = None, **more: object) -> list[int]:
        """Return the tokens of prepared messages, as mlx_lm's datasets compute them."""
        return list(self._apply(messages, tools, return_dict=False, **more))

    def _apply(self, messages: Messages, tools: object, **more: object) -> Any:
        """Apply the tokenizer's chat template to messages, which may be empty."""
        more = stopped_clock(self._tokenizer, tools) | more
        if messages:
            return self._tokenizer.apply_chat_template(list(messages), tools=tools, **more)
        # transformers fails on an empty conversation, but not on a batch with one.
        return self._tokenizer.apply_chat_template([[]], tools=tools, **more)[0]

    @cached_property
    def text_tokenizer(self) -> Any:
        """The tokenizer for a rendered text; None if it renders chats in a way of its own."""
        from transformers import PreTrainedTokenizerBase

        is_bare = isinstance(self._tokenizer, PreTrainedTokenizerBase)
        inner = self._tokenizer if is_bare else getattr(self._tokenizer, "_tokenizer", None)
        renders = getattr(type(inner), "apply_chat_template", None)
        return inner if renders is PreTrainedTokenizerBase.apply_chat_template else None

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The end-of-sequence texts to strip from answers; empty if the template adds none."""
        texts = list_end_texts(self._tokenizer)
        return texts if self.example.rpartition(_ANSWER)[2].lstrip().startswith(texts) else ()

    @cached_property
    def example(self) -> str:
        """A rendered question with its answer; empty if the template rejects them."""
        return self._try_to_render({"role": "assistant", "content": _ANSWER})

    @cached_property
    def unlike_rows(self) -> tuple[str, str]:
        """How its prompt goes on where a row goes on otherwise, and how the row does; else empty.

        The prompt is a question with the generation prompt, as it is asked when it is served.
        """
        asked = self._try_to_render(add_generation_prompt=True) if self.example else ""
        shared = len(commonprefix([asked, self.example]))
        return asked[shared:], self.example[shared:]

    @cached_property
    def joins_argument_text(self) -> bool:
        """Whether arguments of a tool call must be JSON text, which the template inserts unchanged.

        Such a template raises for an object, or writes it as Python does.
        """
        text = json.dumps(_ARGUMENTS)
        with_object = self._try_to_render(_call_with(_ARGUMENTS))
        if text not in self._try_to_render(_call_with(text)):
            return False
        return _ARGUMENTS["query"] not in with_object or str(_ARGUMENTS) in with_object

    def _try_to_render(self, *answer: Mapping[str, object], **more: object) -> str:
        """Render a question with this answer; empty if the template raises an error."""
        try:
            return self.render([_QUESTION, *answer], **more)
        except NestedTuneError:  # it takes more than it may
            raise
        except Exception:  # a template is its author's program: it may raise anything
            return ""

    def _prepare_turn(self, message: Mapping[str, Any]) -> dict[str, object]:
        """Return one message with prepared tool calls and a content, without an end text."""
        prepared = dict(message)
        if message.get("tool_calls"):
            prepared["tool_calls"] = [self._prepare_call(call) for call in message["tool_calls"]]
        if message.get("content") is None:  # mlx_lm.server gives the template an empty text
            prepared["content"] = ""
        elif message["role"] == "assistant":
            prepared["content"] = self.without_end(message["content"])
        return prepared

    def without_end(self, answer: str) -> str:
        """Return the answer without the end-of-sequence texts at its end."""
        while (stripped := answer.rstrip()).endswith(self.ends):
            end = next(end for end in self.ends if stripped.endswith(end))
            answer = stripped.removesuffix(end)
        return answer

    def _prepare_call(self, call: Mapping[str, Any]) -> dict[str, object]:
        """Convert a tool call's arguments to the type that the template expects.

        The call may be nested under "function".
        """
        if "function" in call:
            return {**call, "function": self._prepare_call(call["function"])}
        arguments = call.get("arguments")
        if self.joins_argument_text:
            if isinstance(arguments, dict):
                arguments = json.dumps(arguments, ensure_ascii=False)
        elif isinstance(arguments, str):
            arguments = json.loads(arguments)
        return {**call, "arguments": arguments} if "arguments" in call else dict(call)


def end_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Return the tokens that end an answer.

    mlx_lm's tokenizer wrapper may have several, a plain tokenizer has one or none.
    """
    return frozenset(getattr(tokenizer, "eos_token_ids", None) or {tokenizer.eos_token_id}) - {None}


def list_end_texts(tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return the texts of the tokens that end an answer, such as "<|im_end|>"."""
    return tuple(tokenizer.convert_ids_to_tokens(end) for end in end_token_ids(tokenizer))


def stopped_clock(tokenizer: Tokenizer, tools: object = None) -> dict[str, object]:
    """Return the argument that has a template write FIXED_DATE in place of the time.

    So prompts are the same each day. Empty for a template that reads no clock.
    """
    template = getattr(tokenizer, "chat_template", None)
    if isinstance(template, dict):  # as transformers' get_chat_template chooses
        has_own = tools is not None and "tool_use" in template
        template = template.get("tool_use" if has_own else "default")
    if not isinstance(template, str) or _CLOCK not in template:
        return {}
    return {"chat_template": _stop_clock(template)}


@lru_cache(maxsize=4)
def _stop_clock(template: str) -> str:
    """Put a macro in place of the template's clock, with the directives that the template has."""
    directives = set(re.findall(r"%-?[a-zA-Z]", template))
    filters = "".join(f"|replace('{each}', {FIXED_DATE.strftime(each)!r})" for each in directives)
    filters = f"|replace('%%', '\ue000'){filters}|replace('\ue000', '%')"  # %%d is no day
    macro = f"{{%- macro {_CLOCK}(format) -%}}{{{{- format{filters} -}}}}{{%- endmacro %}}"
    return f"{macro}\n{template}"  # the line's end is not rendered (trim_blocks)


def has_chat_template(tokenizer: Tokenizer) -> bool:
    """Return whether a tokenizer (mlx_lm's wrapper, or a plain one) has a chat template."""
    if hasattr(tokenizer, "has_chat_template"):
        return bool(tokenizer.has_chat_template)
    return getattr(tokenizer, "chat_template", None) is not None


@lru_cache(maxsize=4)
def chat_template_of(tokenizer: Tokenizer) -> ChatTemplate:
    """Return the (cached) chat template of a tokenizer that has one."""
    return ChatTemplate(tokenizer)


def _call_with(arguments: object) -> dict[str, object]:
    """Return a message that calls a tool; Mistral's templates need an id of nine letters."""
    function = {"name": "search", "arguments": arguments}
    call = {"id": "call00001", "type": "function", "function": function}
    return {"role": "assistant", "content": "", "tool_calls": [call]}
