"""What a program needs beside a GGUF to serve it: Ollama's Modelfile, or a script with a command.

Ollama has chat templates of a form of its own. One is written only for a template that puts texts
around each message and does nothing else, which is found out by rendering small chats.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, Self

from nested_core.errors import NestedTuneError
from nested_core.models.base_model import context_length
from nested_core.models.chat_template import (
    Messages,
    chat_template_of,
    has_chat_template,
    list_end_texts,
)
from nested_core.rooms.export.asked import Asked
from nested_core.rooms.export.gguf.vocabulary import find_added_ends

Program = Literal["ollama", "llama-server", "lmstudio"]
# How it is called, and the ending of what it reads
PROGRAMS: dict[Program, tuple[str, str]] = {
    "ollama": ("Ollama", "Modelfile"),
    "llama-server": ("llama-server", "llama-server.sh"),
    "lmstudio": ("LM Studio", "lmstudio.sh"),
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


def write_for(program: Program, place: Path, files: Mapping[str, str], asked: Asked) -> Path:
    """Write what a program reads beside the GGUF `place`; return its path.

    files: the names of model and LoRA there, with their SHA-256; a model alone has no second. A
        base that lies elsewhere has its whole path.
    """
    path = place_for(program, place)
    told = [f"# For {PROGRAMS[program][0]}, by nested-tune. It reads:"]
    told += [f"# sha256:{digest} {name}" for name, digest in files.items()]
    if program == "ollama":
        told += _describe_for_ollama(files, asked)
    else:
        enter = 'cd "$(dirname "$0")" || exit'
        told = ["#!/bin/sh", *told, enter, _describe_command(program, files)]
    path.write_text("\n".join(told) + "\n", "utf-8")
    return path


def _describe_command(program: Program, files: Iterable[str]) -> str:
    model, *lora = map(shlex.quote, files)
    if program == "lmstudio":
        return f'exec lms import {model} "$@"'
    adapter = f" --lora {lora[0]}" if lora else ""
    return f'exec llama-server --model {model}{adapter} --jinja --temp 0 "$@"'


def _describe_for_ollama(files: Iterable[str], asked: Asked) -> list[str]:
    """Return the lines of a Modelfile."""
    words = zip(("FROM", "ADAPTER"), files, strict=False)
    lines = [f"{word} {name if '/' in name else f'./{name}'}" for word, name in words]
    turns, rows = Turns.find(asked.tokenizer), asked.prompt_format
    texts: dict[str, Any] = {"SYSTEM": (rows and rows.system) or (turns and turns.system)}
    template = "" if turns is None else turns.to_go()
    if template.count("{{") == 9 and '"""' not in f"{template}{texts}":
        texts = {"TEMPLATE": template} | texts
    else:
        lines.append("# No TEMPLATE: this model's does more than Ollama's can be told here.")
    lines += [f'{word} """{text}"""' for word, text in texts.items() if text]
    context = min(context_length(asked.base) or MAX_CONTEXT, MAX_CONTEXT)
    lines += [f"PARAMETER {value}" for value in ("temperature 0", "repeat_penalty 1")]
    lines += [f"PARAMETER num_ctx {context}"]
    return lines + [f'PARAMETER stop "{text}"' for text in list_end_texts(asked.tokenizer)]


def place_for(program: Program, place: Path) -> Path:
    """Where lies what a program reads of the GGUF `place`."""
    return place.with_name(f"{place.stem}.{PROGRAMS[program][1]}")
