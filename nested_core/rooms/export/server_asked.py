"""Programs that serve a GGUF: a llama-server is started by the command that is printed, and asked.

What it does to a chat, which answers it gives and whether they end are its own: it has the file's
template in an interpreter of its own, and may leave a LoRA out.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from itertools import takewhile
from pathlib import Path
from typing import Any

from nested_core.errors import NestedTuneError, shorten
from nested_core.measure.answers.suite_answers import EncodedSuite
from nested_core.models.chat_template import chat_template_of, has_chat_template
from nested_core.models.generation import Answer
from nested_core.rooms.export.asked import Asked
from nested_core.rooms.export.export_record import ServedBy
from nested_core.rooms.export.fresh_reading import CONTINUED_TOKENS, Reading
from nested_core.rooms.export.judgement import count_right_answers, list_worse_suites
from nested_core.rooms.export.served_as import CHATS, PROGRAMS, Program, write_for

SERVER = "llama-server"
# Of the tokens: kernels round otherwise, and answers part where two tokens are nearly as likely
MIN_SHARED = 0.6
MAX_WITHOUT_END = 0.1  # of the answers
START_SECONDS = 900
ANSWER_SECONDS = 900


@dataclass(frozen=True)
class Server:
    """A llama-server that runs here, at a port."""

    port: int

    def ask(self, path: str, **asked: object) -> Any:
        """Return its answer to a JSON value, or without one what it says at the path."""
        with closing(HTTPConnection("127.0.0.1", self.port, timeout=ANSWER_SECONDS)) as connection:
            if asked:
                headers = {"Content-Type": "application/json"}
                connection.request("POST", path, json.dumps(asked), headers)
            else:
                connection.request("GET", path)
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
    ended = [
        (ours.is_endless, theirs.is_endless)
        for name, given in answers.items()
        for ours, theirs in zip(adapter.answers[name], given, strict=True)
    ]
    endless = ended.count((False, True))
    leaves_out = has_lora and not any(one["scale"] for one in server.ask("/lora-adapters"))
    problems = [
        f"{SERVER} was given the LoRA and does not apply it" if leaves_out else None,
        server.find_wrong_chat(asked.tokenizer),
        f"{SERVER} gives {shared} of {tokens} tokens that the file alone gives"
        if shared < MIN_SHARED * tokens
        else None,
        *list_worse_suites(counts, f"in {SERVER} "),
        f"{endless} of {len(ended)} answers do not end in {SERVER}, where the adapter's do"
        if endless > MAX_WITHOUT_END * len(ended)
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
    command = ["sh", str(script), "--port", str(server.port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(process, server)
            yield server
        except (OSError, HTTPException, KeyError, ValueError) as error:
            log.seek(0)
            said = shorten(log.read().decode(errors="replace")[-400:].strip(), 400)
            raise NestedTuneError(
                f"{SERVER} did not answer ({error}; exit code {process.poll()}); its last words: "
                f"{said}"
            ) from error
        finally:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], server: Server) -> None:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        with suppress(ConnectionError):  # it loads its model
            server.ask("/health")
            return
        time.sleep(0.2)
    raise TimeoutError("it does not run")
