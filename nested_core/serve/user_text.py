"""Control tokens that a user writes, such as `<|im_start|>`, read as text and not as turns.

mlx_lm.server renders the chat template and encodes all of it, so that a user's text could end its
turn and begin one of the assistant or the system.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

UNTRUSTED_ROLES = ("user", "tool")


def encode_user_text_as_text(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> Any:
    """A tokenizer that encodes control tokens of users and tools in these messages as text.

    It is `tokenizer` itself, mlx_lm's, where there are none.
    """
    added = tokenizer.added_tokens_decoder.values()
    names = sorted((token.content for token in added if token.special), key=len, reverse=True)
    control_token = re.compile("|".join(map(re.escape, names)) or r"(?!)")
    is_found = any(
        control_token.search(str(message.get("content")))
        for message in messages
        if message["role"] in UNTRUSTED_ROLES
    )
    return _SplittingTokenizer(tokenizer, control_token) if is_found else tokenizer


class _SplittingTokenizer:
    """mlx_lm's tokenizer; a control token of a user is encoded in two parts, which are text."""

    def __init__(self, tokenizer: Any, control_token: re.Pattern[str]) -> None:
        self._tokenizer = tokenizer
        self._control_token = control_token
        self._mark = secrets.token_hex(16)  # between the parts, while the template is rendered

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def apply_chat_template(
        self, messages: Sequence[Mapping[str, Any]], *, tokenize: bool = True, **kwargs: Any
    ) -> Any:
        """As the tokenizer's."""
        marked = [self._mark_control_tokens(message) for message in messages]
        text = self._tokenizer.apply_chat_template(marked, tokenize=False, **kwargs)
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def encode(self, text: str, **kwargs: Any) -> list[int]:
        """As the tokenizer's, each part by itself."""
        parts = text.split(self._mark)
        return list(chain(*(self._tokenizer.encode(part, **kwargs) for part in parts)))

    def _mark_control_tokens(self, message: Mapping[str, Any]) -> Mapping[str, Any]:
        content = message.get("content")
        if message["role"] not in UNTRUSTED_ROLES or not isinstance(content, str):
            return message
        marked = self._control_token.sub(lambda token: _insert(token[0], self._mark), content)
        return {**message, "content": marked}


def _insert(token: str, mark: str) -> str:
    return f"{token[0]}{mark}{token[1:]}"
