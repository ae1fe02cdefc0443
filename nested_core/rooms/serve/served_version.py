"""A version in memory: the base's own arrays, with the layers and tensors of one adapter."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.server import CompletionRequest

from nested_core.errors import ConfigError
from nested_core.models.adapter_fit import describe_other_base
from nested_core.models.chat_template import Tokenizer, chat_template_of
from nested_core.models.lora_attachment import copy_with_adapter
from nested_core.registry import VerifiedVersion
from nested_core.rooms.serve.canary_check import check_canary, require_version_in_layers
from nested_core.text.digest_format import shorten_digest

BASE_VERSION = "base"


@lru_cache(maxsize=4)
def find_mark_of_answers(tokenizer: Tokenizer) -> str:
    """Return what the chat template writes between a question and its answer; empty if nothing."""
    with suppress(Exception):  # a template is its author's program: it may raise anything
        turns = [{"role": "user", "content": "?"}]
        rendered = chat_template_of(tokenizer).render(turns, add_generation_prompt=True)
        return rendered.rpartition("?")[2].strip()
    return ""


@dataclass
class ServedVersion:
    """One version of a name; two are equal if they are the same version of the same name.

    name: in the registry.
    version: the adapter's digest, or "base" for the base model alone.
    verified: as read from disk, until the model that is built of it has been checked; None for the
        base.
    system: the system text that all its training rows begin with, or None.
    is_chat: whether the chat template formatted its training rows.
    """

    name: str
    version: str
    verified: VerifiedVersion | None = field(default=None, compare=False, repr=False)
    system: str | None = field(default=None, compare=False, repr=False)
    is_chat: bool = field(default=False, compare=False, repr=False)
    _model: nn.Module | None = field(default=None, init=False, compare=False, repr=False)

    @property
    def label(self) -> str:
        """What a request's `model` names it by: NAME@VERSION."""
        return f"{self.name}@{self.version}"

    def lacks_system_text(self, request: CompletionRequest) -> bool:
        """Return whether a request begins otherwise than the training rows, which share a text."""
        if self.system is None:
            return False
        if request.request_type == "text":
            return self.system not in request.prompt
        first = request.messages[0] if request.messages else {}
        content = first.get("content")
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content)
        return first.get("role") not in ("system", "developer") or content != self.system

    def lacks_template(self, request: CompletionRequest, tokenizer: Tokenizer) -> bool:
        """Return whether a request is a text without what the chat template writes before answers.

        No version whose rows were chats has learnt to answer such a text.
        """
        if not self.is_chat or request.request_type != "text":
            return False
        return find_mark_of_answers(tokenizer) not in request.prompt

    def build_model(self, base: nn.Module) -> nn.Module:
        """Return the model that answers as this version; it is built at the first call.

        All modules are its own, and all arrays of the base are the base's: a request that began
        with an earlier version keeps that version's model, which nothing changes. Call it in the
        thread that generates. Raises ConfigError where the adapter does not fit the base.
        """
        if self._model is None:
            adapter = None if self.verified is None else self.verified.adapter
            self._model = base if adapter is None else copy_with_adapter(base, adapter)
            mx.eval(self._model.parameters())
        return self._model

    def check(self, base: nn.Module, base_arrays: Collection[int]) -> Iterator[None]:
        """Build the model, compare its tensors with the file's, and ask its canary, in steps.

        base_arrays: the id() of each array that the base was loaded with. Raises CanaryFailed.
        """
        model = self.build_model(base)
        yield
        if self.verified is not None:
            require_version_in_layers(model, self.verified.adapter.tensors, base_arrays)
            yield
            if self.verified.canary is not None:
                yield from check_canary(self.verified.canary, model)
        self.verified = None  # lets go of what was read


def require_same_base(verified: VerifiedVersion, base: Path) -> None:
    """Raise ConfigError where a version was made for another model than that in `base`.

    Or trained with another chat template or tokenizer than those in its files.
    """
    adapter = verified.adapter
    what = f"Version {shorten_digest(verified.version)} of {adapter.path.parent.parent.name}"
    verified.tokenizer.require_in(base, what)
    if other_base := describe_other_base(adapter.config, base):
        raise ConfigError(
            f"{what} was {other_base}. Serve it with the base that it was trained on (--model), "
            f"names of other bases by another server."
        )
