"""The tokens of a request: bounded in size, and with control tokens that a user writes as text.

mlx_lm.server renders the chat template and encodes all of it, so that `<|im_start|>` in a user's
text could end its turn and begin one of the assistant or the system.
"""

from __future__ import annotations

import inspect
import re
import secrets
from collections.abc import Collection, Iterable, Mapping, Sequence
from itertools import chain
from os.path import commonprefix
from typing import Any

from nested_core.data.tokens.text_notes import control_tokens_of
from nested_core.models.chat_template import stopped_clock
from nested_core.rooms.serve.request_model import MAX_ANSWER_TOKENS, RequestRefused
from nested_core.text.groups import grouped

UNTRUSTED_ROLES = ("user", "tool")


class RequestTokenizer:
    """mlx_lm's tokenizer for clients; a control token of a user or a tool is encoded as text.

    It is encoded in two parts, neither of which is a control token.
    """

    def __init__(self, tokenizer: Any, context: int | None) -> None:
        """`context` is how many tokens the model sees; None if it is not known."""
        self._tokenizer = tokenizer
        self._context = context
        self._longest_token = max(len(str(text).encode()) for text in tokenizer.get_vocab())
        self._mark = secrets.token_hex(16)  # between the two parts, while the template is rendered
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        names = special | control_tokens_of(tokenizer).texts
        self._control_token = re.compile(match_any(names - {""}) or r"(?!)")

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool = True, **kwargs: Any
    ) -> Any:
        """Apply the template as the tokenizer does."""
        marked = [self._mark_control_tokens(message) for message in messages]
        more = stopped_clock(self._tokenizer, kwargs.get("tools")) | kwargs
        text = self._tokenizer.apply_chat_template(marked, tokenize=False, **more)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """Encode as the tokenizer; RequestRefused for a text that no context has room for.

        To encode a text takes seconds a megabyte.
        """
        self.require_room(len(text.encode()), "bytes", self._longest_token)
        parts = text.split(self._mark)
        return list(chain(*(self._tokenizer.encode(part, **kwargs) for part in parts)))

    def require_room(self, size: int, unit: str, units_a_token: int) -> None:
        """Raise RequestRefused for a prompt of more tokens than the model sees."""
        if self._context is not None and size > self._context * units_a_token:
            most = f" of at most {units_a_token} {unit}" if units_a_token > 1 else ""
            raise RequestRefused(
                f"The prompt has {size} {unit}, and the model sees {self._context} tokens{most}.",
                code="context_length_exceeded",
            )

    def room_after(self, prompt: Sequence[int]) -> int:
        """Return how many tokens an answer may have: at least one."""
        return MAX_ANSWER_TOKENS if self._context is None else max(1, self._context - len(prompt))

    def require_known_arguments(self, given: Collection[str] | None) -> None:
        """Raise RequestRefused for arguments that the model's own chat template does not read.

        Others would reach the tokenizer: a template of the client's own, padding, cutting off.
        """
        if not given:
            return
        template = self._tokenizer.chat_template
        source = template if isinstance(template, str) else ""
        render = type(self._tokenizer._tokenizer).apply_chat_template
        of_the_tokenizer = inspect.signature(render).parameters
        known = set(re.findall(r"\w+", source)) - set(of_the_tokenizer) | {"enable_thinking"}
        if unknown := sorted(set(given) - known):
            raise RequestRefused(
                f"chat_template_kwargs: {', '.join(unknown):.200} not taken here. Expected "
                f"arguments that the chat template of the model reads, or enable_thinking."
            )

    def _mark_control_tokens(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        if message["role"] not in UNTRUSTED_ROLES:
            return message
        return {**message, "content": self._mark_texts(message.get("content"))}

    def _mark_texts(self, content: Any) -> Any:
        """Mark a text, or the texts among the parts of a message, as beside an image."""
        if isinstance(content, str):
            return self._control_token.sub(self._split, content)
        if not isinstance(content, list):
            return content
        texts = [part["text"] for part in content if isinstance(part.get("text"), str)]
        joined = len(self._control_token.findall("".join(map(str.strip, texts))))
        is_split = joined > sum(len(self._control_token.findall(text)) for text in texts)
        end = self._mark if is_split else ""  # a template may write the texts without a space
        return [
            part | {"text": self._mark_texts(part["text"]) + end}
            if isinstance(part.get("text"), str)
            else part
            for part in content
        ]

    def _split(self, token: re.Match[str]) -> str:
        return f"{token[0][0]}{self._mark}{token[0][1:]}"


def match_any(texts: Iterable[str], depth: int = 16) -> str:
    """Return a regular expression that finds the longest of these texts.

    Texts with the same beginning share a branch: of plain alternatives Python tries all, one after
    the other, wherever one of them may begin.

    depth: how often texts may part from each other; from there on they are tried one by one.
    """
    ordered = sorted(texts, key=len, reverse=True)
    if not depth or len(ordered) < 2:
        return "|".join(map(re.escape, ordered))
    found = []
    for ones in grouped((text[:1], text) for text in ordered).values():
        begin = commonprefix(ones)
        rest = match_any((text[len(begin) :] for text in ones), depth - 1)
        found.append(f"{re.escape(begin)}(?:{rest})")
    return "|".join(found)
