"""What a program needs beside a GGUF to serve it: Ollama's Modelfile, or a script with a command.

Ollama has chat templates of a form of its own. One is written only for a template that puts texts
around each message and does nothing else, which is found out by rendering small chats.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from nested_core.errors import ConfigError, NestedTuneError
from nested_core.models.base_model import context_length
from nested_core.models.chat_template import (
    Messages,
    chat_template_of,
    has_chat_template,
    list_end_texts,
)
from nested_core.records.dataset import PromptFormat
from nested_core.rooms.export.gguf.vocabulary import find_added_ends

Program = Literal["ollama", "llama-server", "lmstudio"]
ENDINGS: dict[Program, str] = {
    "ollama": "Modelfile",
    "llama-server": "llama-server.sh",
    "lmstudio": "lmstudio.sh",
}
NAMES: dict[Program, str] = {
    "ollama": "Ollama",
    "llama-server": "llama-server",
    "lmstudio": "LM Studio",
}
MAX_CONTEXT = 8192  # tokens that Ollama keeps room for; its own default may cut a prompt
_MARK = "(text)"
_TURNS = ("system", "user", "assistant", "user")
_TEXTS = ("Answer in one word.", "What is it?", "It is a lighthouse.", " And\nthat? ")
CHATS: tuple[Messages, ...] = tuple(
    tuple({"role": _TURNS[turn], "content": _TEXTS[turn]} for turn in turns)
    for turns in ((1,), (3,), (0, 1), (1, 2, 3), (0, 1, 2, 3))
)


@dataclass(frozen=True)
class Turns:
    """A chat template that puts a text before and after each message, and does nothing else.

    around: these two texts, by the message's role.
    begin: what stands before the first message; programs put it there, as the tokenizer does.
    ask: what stands after the last message of a question.
    system: the system text of a chat that has none of its own; empty without one.
    """

    around: Mapping[str, tuple[str, str]]
    begin: str
    ask: str
    system: str

    @classmethod
    def find(cls, tokenizer: Any) -> Self | None:
        """Return what a tokenizer's template writes; None for a template that does more."""
        if not has_chat_template(tokenizer):
            return None
        template = chat_template_of(tokenizer)
        begin = tokenizer.bos_token if find_added_ends(tokenizer)[0] else ""
        marked = [{"role": role, "content": _MARK} for role in _TURNS]
        try:
            texts = [template.render(marked[:count]) for count in range(1, len(_TURNS) + 1)]
            alone = template.render(marked[1:2])
            ask = template.render(marked, add_generation_prompt=True).removeprefix(texts[-1])
            pieces = [text.removeprefix(before) for before, text in pairwise((begin, *texts))]
            around: Any = {
                role: tuple(piece.split(_MARK)) for role, piece in zip(_TURNS, pieces, strict=True)
            }
            (before, after), user = around["system"], _MARK.join(around["user"])
            system = alone.removeprefix(begin).removesuffix(user)
            turns = cls(around, begin, ask, system.removeprefix(before).removesuffix(after))
            is_all = all(
                turns.render(chat) == template.render(chat, add_generation_prompt=True)
                for chat in CHATS
            )
        except NestedTuneError:  # it takes more than it may
            raise
        except Exception:  # a template is its author's program: it may raise anything
            return None
        return turns if is_all else None

    def render(self, chat: Messages) -> str:
        """Return the text of a chat, up to where the answer begins."""
        if self.system and chat[0]["role"] != "system":
            chat = [{"role": "system", "content": self.system}, *chat]
        turns = (str(turn["content"]).join(self.around[str(turn["role"])]) for turn in chat)
        return "".join((self.begin, *turns, self.ask))

    def to_go(self) -> str:
        """Return it in the language of Ollama's templates."""
        turns = [
            f'{{{{ {word} eq .Role "{role}" }}}}' + "{{ .Content }}".join(self.around[role])
            for word, role in zip(("if", "else if", "else if"), self.around, strict=True)
        ]
        return f"{{{{ range .Messages }}}}{''.join(turns)}{{{{ end }}}}{{{{ end }}}}{self.ask}"


@dataclass(frozen=True)
class Served:
    """A GGUF that a program is to serve.

    folder: where it lies.
    files: the names of model and LoRA there, with their SHA-256; a model alone has no second. A
        base that lies elsewhere has its whole path.
    tokenizer, base: the base's, as mlx_lm loads it, and its folder.
    rows: how the rows begin that the adapter was trained on; None if unknown.
    """

    files: Mapping[str, str]
    tokenizer: Any
    base: Path
    rows: PromptFormat | None

    def write(self, program: Program, place: Path) -> Path:
        """Write what a program reads beside the GGUF `place`; return its path."""
        path = place_for(program, place)
        told = [f"# For {NAMES[program]}, by nested-tune. It reads:"]
        told += [f"# sha256:{digest} {name}" for name, digest in self.files.items()]
        if program == "ollama":
            told += self._describe_for_ollama()
        else:
            told = ["#!/bin/sh", *told, 'cd "$(dirname "$0")" || exit', self._command(program)]
        path.write_text("\n".join(told) + "\n", "utf-8")
        return path

    def _command(self, program: Program) -> str:
        model, *lora = (shlex.quote(name) for name in self.files)
        if program == "lmstudio":
            return f'exec lms import {model} "$@"'
        adapter = f" --lora {lora[0]}" if lora else ""
        return f'exec llama-server --model {model}{adapter} --jinja --temp 0 "$@"'

    def _describe_for_ollama(self) -> list[str]:
        """Return the lines of a Modelfile."""
        words = zip(("FROM", "ADAPTER"), self.files, strict=False)
        lines = [f"{word} {name if '/' in name else f'./{name}'}" for word, name in words]
        turns = Turns.find(self.tokenizer)
        system = (self.rows and self.rows.system) or (turns and turns.system)
        texts = {"TEMPLATE": turns and turns.to_go(), "SYSTEM": system}
        if turns is None or '"""' in str(texts) or turns.to_go().count("{{") != 9:
            lines.append("# No TEMPLATE: this model's does more than Ollama's can be told here.")
            del texts["TEMPLATE"]
        lines += [f'{word} """{text}"""' for word, text in texts.items() if text]
        context = min(context_length(self.base) or MAX_CONTEXT, MAX_CONTEXT)
        values: list[tuple[str, object]] = [("temperature", 0), ("repeat_penalty", 1)]
        values += [("num_ctx", context)]
        values += [("stop", f'"{text}"') for text in list_end_texts(self.tokenizer)]
        return [*lines, *(f"PARAMETER {name} {value}" for name, value in values)]


def place_for(program: Program, place: Path) -> Path:
    """Where lies what a program reads of the GGUF `place`."""
    return place.with_name(f"{place.stem}.{ENDINGS[program]}")


def require_served(programs: Sequence[Program], *, is_adapter: bool, has_base: bool) -> None:
    """Raise ConfigError for a program that takes no LoRA alone, or has no base to apply it to."""
    if is_adapter and "lmstudio" in programs:
        raise ConfigError(
            "export: LM Studio takes no LoRA. Give --gguf for base and adapter as one model."
        )
    if has_base and not is_adapter:
        raise ConfigError("export: --base-gguf is what --gguf-adapter is applied to.")
    if is_adapter and programs and not has_base:
        raise ConfigError(
            f"export: {NAMES[programs[0]]} applies a LoRA to its base as a GGUF. Give that by "
            f"--base-gguf FILE; it is made there if there is none."
        )
