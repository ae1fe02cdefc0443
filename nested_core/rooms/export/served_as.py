"""Programs that serve a GGUF: what they read beside it, and a llama-server that is asked.

Ollama has chat templates of a form of its own. One is written only for a template that puts texts
around each message and does nothing else, which is found out by rendering small chats.

llama-server is started by the command that is printed. What it does to a chat, which answers it
gives and whether they end are its own: it has the file's template in an interpreter of its own, and
may leave a LoRA out.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from itertools import chain, pairwise, takewhile
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any, Literal, Self

from nested_core.errors import NestedTuneError
from nested_core.measure.answers.suite_answers import EncodedSuite
from nested_core.models.base_model import context_length
from nested_core.models.chat_template import (
    Messages,
    chat_template_of,
    has_chat_template,
    list_end_texts,
)
from nested_core.models.generation import Answer
from nested_core.process.child import Child
from nested_core.rooms.export.asked import CONTINUED_TOKENS, Asked, Reading
from nested_core.rooms.export.export_record import ServedBy
from nested_core.rooms.export.gguf.vocabulary import find_added_ends
from nested_core.rooms.export.judgement import count_right_answers, list_worse_suites
from nested_core.text.stages import stages

Program = Literal["ollama", "llama-server", "lmstudio"]
# How it is called, and the ending of what it reads
PROGRAMS: dict[Program, tuple[str, str]] = {
    "ollama": ("Ollama", "Modelfile"),
    "llama-server": ("llama-server", "llama-server.sh"),
    "lmstudio": ("LM Studio", "lmstudio.sh"),
}
SERVER = "llama-server"
PROGRAM = Path(__file__).with_name("server_process.py")
PLAIN_KERNELS = (  # as llama_cpp_program.py has them, in which the file is judged
    "# llama.cpp's kernels for AMX ended in SIGSEGV with q4_k_m and q8_0; 1 has them all",
    'export LLAMA_ARG_REPACK="${LLAMA_ARG_REPACK:-0}"',
)
KEY_VARIABLE = "LLAMA_API_KEY"  # of the user's own server
# Of the tokens: kernels round otherwise, and answers part where two tokens are nearly as likely
MIN_SHARED = 0.6
MAX_WITHOUT_END = 0.1  # of the answers
START_SECONDS = 900
ANSWER_SECONDS = 900
END_SECONDS = 2.0  # for a server whose connection broke to be seen to have ended
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
        model, *lora = map(shlex.quote, files)
        applied = "".join(f" --lora {one}" for one in lora)
        commands = {
            "llama-server": f"llama-server --model {model}{applied} --jinja --temp 0",
            "lmstudio": f"lms import {model}",
        }
        told = ["#!/bin/sh", *told, *(PLAIN_KERNELS if program == SERVER else ())]
        told.append('CDPATH= cd -- "$(dirname -- "$0")" || exit')
        told.append(f'exec {commands[program]} "$@"')
    path.write_text("\n".join(told) + "\n", "utf-8")
    return path


def _describe_for_ollama(files: Iterable[str], asked: Asked) -> list[str]:
    """Return the lines of a Modelfile."""
    words = zip(("FROM", "ADAPTER"), files, strict=False)
    lines = [f"{word} {name if '/' in name else f'./{name}'}" for word, name in words]
    turns, rows = Turns.find(asked.tokenizer), asked.prompt_format
    template = "" if turns is None else turns.to_go()
    texts = {"SYSTEM": (rows and rows.system) or (turns and turns.system) or ""}
    if template.count("{{") == 9:
        texts = {"TEMPLATE": template} | texts
    else:
        lines.append("# No TEMPLATE: this model's does more than Ollama's can be told here.")
    for word, text in texts.items():
        if '"""' in text or text.endswith('"'):
            lines.append(f"# No {word}: its quotes would end it before it ends.")
        elif text:
            lines.append(f'{word} """{text}"""')
    context = min(context_length(asked.base) or MAX_CONTEXT, MAX_CONTEXT)
    lines += [f"PARAMETER {value}" for value in ("temperature 0", "repeat_penalty 1")]
    lines += [f"PARAMETER num_ctx {context}"]
    ends = (text for text in list_end_texts(asked.tokenizer) if text.isprintable())
    return lines + [f'PARAMETER stop "{text}"' for text in ends if '"' not in text]


def place_for(program: Program, place: Path) -> Path:
    """Where lies what a program reads of the GGUF `place`."""
    return place.with_name(f"{place.stem}.{PROGRAMS[program][1]}")


@dataclass(frozen=True)
class Server:
    """A llama-server that runs here, at a port."""

    port: int

    def ask(self, path: str, **asked: object) -> Any:
        """Return its answer to a JSON value, or without one what it says at the path."""
        method, body, headers = "GET", None, dict[str, str]()
        if asked:
            method, body, headers = "POST", json.dumps(asked), {"Content-Type": "application/json"}
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)) as connection:
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        if answer.status != 200:
            raise ConnectionError(f"{path}: {answer.status} {text:.300}")
        return json.loads(text)

    def find_wrong_chat(self, tokenizer: Any) -> str | None:
        """Return a sentence on a chat that becomes other tokens than in training, if there is one.

        tokenizer: of the training. Chats that its template refuses are not asked.
        """
        template, rendered = chat_template_of(tokenizer), []
        for chat in CHATS if has_chat_template(tokenizer) else ():
            with suppress(Exception):  # a template is its author's program: it may raise anything
                rendered.append((chat, template.render(chat, add_generation_prompt=True)))
        for chat, right in rendered:
            text = self.ask("/apply-template", messages=chat)["prompt"]
            found = self.ask("/tokenize", content=text, add_special=True, parse_special=True)
            if found["tokens"] != tokenizer.encode(right, add_special_tokens=False):
                return f"{SERVER} writes a chat as {text!r:.200}, where {right!r:.200} is right"
        return None

    def answer(self, suite: EncodedSuite, tools: object) -> list[Answer]:
        """Return its answers to a suite's questions, as a client of OpenAI's asks them.

        tools: that the chat template shows in each.
        """
        sampling = suite.suite.sampling
        limits: dict[str, Any] = {"max_tokens": sampling.max_tokens, "stop": sampling.stop}
        answers = []
        for question, prompt in zip(suite.suite.questions, suite.prompts, strict=True):
            if isinstance(question.prompt, str):
                choice = self.ask("/v1/completions", prompt=prompt, **limits)["choices"][0]
                text = choice["text"]
            else:
                asked: dict[str, Any] = {"messages": question.prompt, "reasoning_format": "none"}
                asked |= {"tools": tools, "tool_choice": "none"} if tools else {}
                choice = self.ask("/v1/chat/completions", **asked, **limits)["choices"][0]
                text = choice["message"]["content"] or ""
            is_endless = choice["finish_reason"] == "length"
            answers.append(Answer(text, 0, is_endless=is_endless, is_repeated=False))
        return answers

    def count_shared(self, prompt: Sequence[int], expected: Sequence[int]) -> int:
        """Count the tokens that it gives after a prompt, up to the first other than expected."""
        asked = {"prompt": prompt, "n_predict": CONTINUED_TOKENS, "return_tokens": True}
        pairs = zip(expected, self.ask("/completion", **asked)["tokens"], strict=False)
        return len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))


def has_server() -> bool:
    """Return whether llama-server is installed: where PATH finds it."""
    return shutil.which(SERVER) is not None


def try_programs(
    programs: Sequence[Program],
    files: Mapping[str, str],
    draft: Path,
    asked: Asked,
    read: Sequence[Reading],
) -> tuple[tuple[ServedBy, ...], tuple[str, ...]]:
    """Write what each program reads beside a GGUF, and ask llama-server, where it is installed.

    Returns what each was seen to do, and a sentence for each problem.

    files: as in `write_for`.
    read: what was read of the adapter, and of the GGUF alone.
    """
    tried = {
        program: ServedBy(PROGRAMS[program][0], write_for(program, draft, files, asked).name)
        for program in programs
    }
    problems: list[str] = []
    if SERVER in tried and has_server():
        reads = tried[SERVER].reads
        stages.info(f"asking {SERVER}")
        try:
            with starting_server(draft.with_name(reads)) as server:
                tried[SERVER], problems = _compare(
                    server, reads, asked, read, has_lora=len(files) > 1
                )
        except NestedTuneError as error:
            problems = [str(error)]
    return tuple(tried.values()), tuple(problems)


def _compare(
    server: Server, reads: str, asked: Asked, read: Sequence[Reading], *, has_lora: bool
) -> tuple[ServedBy, list[str]]:
    """Compare what a server answers with what was read of the adapter, and of the GGUF alone."""
    adapter, alone = read
    suites = [suite for suite in asked.suites if not any(suite.choices)]
    tools = None if asked.prompt_format is None else asked.prompt_format.tools
    answers = {suite.suite.name: server.answer(suite, tools) for suite in suites}
    expected = [[one for one in own if one not in alone.ends] for own in alone.continued]
    tokens = sum(map(len, expected))
    shared = sum(map(server.count_shared, asked.continued, expected))
    counts = tuple(count_right_answers(suites, adapter.answers, answers))
    pairs = [zip(adapter.answers[name], answers[name], strict=True) for name in answers]
    ended = [theirs.is_endless > ours.is_endless for ours, theirs in chain.from_iterable(pairs)]
    leaves_out = has_lora and not any(one["scale"] for one in server.ask("/lora-adapters"))
    problems = [
        f"{SERVER} was given the LoRA and does not apply it" if leaves_out else None,
        server.find_wrong_chat(asked.tokenizer),
        f"{SERVER} gives {shared} of {tokens} tokens that the file alone gives"
        if shared < MIN_SHARED * tokens
        else None,
        *list_worse_suites(counts, f"in {SERVER} "),
        f"{sum(ended)} of {len(ended)} answers do not end in {SERVER}, where the adapter's do"
        if sum(ended) > MAX_WITHOUT_END * len(ended)
        else None,
    ]
    name = f"{SERVER} {server.ask('/props').get('build_info', 'of an unknown version')}"
    done = ServedBy(name, reads, is_tried=True, tokens=tokens, shared=shared, suites=counts)
    return done, [problem for problem in problems if problem]


@contextmanager
def starting_server(script: Path) -> Iterator[Server]:
    """Start a llama-server by its script, wait until it answers, and end it with the block.

    Raises NestedTuneError if it does not begin to answer, or stops to.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        server = Server(probe.getsockname()[1])
    command = ["sh", str(script), "--host", "127.0.0.1", "--port", str(server.port)]
    environment = {name: value for name, value in os.environ.items() if name != KEY_VARIABLE}
    with NamedTemporaryFile() as log, Child(PROGRAM, environment=environment) as process:
        process.send([command, log.name])
        try:
            _wait_for(process, server)
            yield server
        except (OSError, HTTPException, KeyError, ValueError) as error:
            has_ended = process.has_answer(END_SECONDS)
            told = f"exit code {process.receive()}" if has_ended else "it goes on"
            told += f"; its last words: {log.read().decode(errors='replace')[-400:].strip()}"
            raise NestedTuneError(f"{SERVER} did not answer ({error}): {told}") from error


def _wait_for(process: Child, server: Server) -> None:
    end = time.monotonic() + START_SECONDS
    while not process.has_answer(0.2) and time.monotonic() < end:
        with suppress(ConnectionError):  # it loads its model
            server.ask("/health")
            return
    raise TimeoutError("it does not run")
