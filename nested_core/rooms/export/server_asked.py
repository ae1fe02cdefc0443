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
from collections.abc import Iterator, Sequence
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
from nested_core.rooms.export.served_as import CHATS, NAMES, Program, Served

SERVER = "llama-server"
# Of the tokens: kernels round otherwise, and answers part where two tokens are nearly as likely
MIN_SHARED = 0.6
MAX_WITHOUT_END = 0.1  # of the answers
START_SECONDS = 900
ANSWER_SECONDS = 900


@dataclass(frozen=True)
class Server:
    """A running llama-server.

    name: with its version, as it says itself.
    """

    port: int
    name: str

    def ask(self, path: str, **asked: object) -> Any:
        """Post a JSON value to it, and return its answer."""
        return _call(self.port, path, asked)

    def list_problems(self, asked: Asked, *, has_lora: bool) -> Iterator[str]:
        """Yield a sentence for what it does to a chat, and to a LoRA, otherwise than it has to."""
        if has_lora and not any(one["scale"] for one in _call(self.port, "/lora-adapters")):
            yield f"{SERVER} was given the LoRA and does not apply it"
        if not has_chat_template(asked.tokenizer):
            return
        template = chat_template_of(asked.tokenizer)
        for chat in CHATS:
            try:
                expected = template.render(chat, add_generation_prompt=True)
            except Exception:  # noqa: S112  a template may refuse a chat: it is not asked
                continue
            text = self.ask("/apply-template", messages=chat)["prompt"]
            if self._encode(text) != asked.tokenizer.encode(expected, add_special_tokens=False):
                yield f"{SERVER} writes a chat as {text!r:.200}, where {expected!r:.200} is right"
                return

    def _encode(self, text: str) -> list[int]:
        """Return the tokens that it makes of a prompt."""
        asked = {"content": text, "add_special": True, "parse_special": True}
        tokens: list[int] = self.ask("/tokenize", **asked)["tokens"]
        return tokens

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

    def go_on(self, prompt: Sequence[int], count: int) -> list[int]:
        """Return the likeliest tokens after a prompt, at most `count`."""
        asked = {"prompt": prompt, "n_predict": count, "return_tokens": True}
        tokens: list[int] = self.ask("/completion", **asked)["tokens"]
        return tokens


def has_server() -> bool:
    """Return whether llama-server is installed: where PATH finds it."""
    return shutil.which(SERVER) is not None


def try_programs(
    programs: Sequence[Program], served: Served, draft: Path, asked: Asked, read: Sequence[Reading]
) -> tuple[tuple[ServedBy, ...], tuple[str, ...]]:
    """Write what each program reads beside a GGUF, and ask llama-server, where it is installed.

    Returns what each was seen to do, and a sentence for each problem.

    read: what was read of the adapter, and of the GGUF alone.
    """
    tried, problems = [], list[str]()
    for program in programs:
        path = served.write(program, draft)
        if program == SERVER and has_server():
            try:
                with starting_server(path) as server:
                    problems += server.list_problems(asked, has_lora=len(served.files) > 1)
                    tried.append(_compare(server, path.name, served, asked, read))
            except NestedTuneError as error:
                problems.append(str(error))
            else:
                problems += _find_problems(tried[-1])
                continue
        tried.append(ServedBy(NAMES[program], path.name))
    return tuple(tried), tuple(problems)


def _compare(
    server: Server, reads: str, served: Served, asked: Asked, read: Sequence[Reading]
) -> ServedBy:
    """Compare what a server answers with what was read of the adapter, and of the GGUF alone."""
    adapter, alone = read
    suites = [suite for suite in asked.suites if not any(suite.choices)]
    tools = None if served.rows is None else served.rows.tools
    answers = {suite.suite.name: server.answer(suite, tools) for suite in suites}
    tokens = shared = 0
    for prompt, own in zip(asked.continued, alone.continued, strict=True):
        expected = [token for token in own if token not in alone.ends]
        pairs = zip(expected, server.go_on(prompt, CONTINUED_TOKENS), strict=False)
        tokens += len(expected)
        shared += len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    ended = [
        (ours.is_endless, theirs.is_endless)
        for name, given in answers.items()
        for ours, theirs in zip(adapter.answers[name], given, strict=True)
    ]
    return ServedBy(
        server.name,
        reads,
        is_tried=True,
        tokens=tokens,
        shared=shared,
        suites=tuple(count_right_answers(suites, adapter.answers, answers)),
        answers=len(ended),
        without_end=sum(theirs and not ours for ours, theirs in ended),
    )


def _find_problems(tried: ServedBy) -> Iterator[str]:
    """Yield a sentence for each thing that a server does otherwise than the adapter."""
    if tried.shared < MIN_SHARED * tried.tokens:
        yield f"{SERVER} gives {tried.shared} of {tried.tokens} tokens that the file alone gives"
    yield from list_worse_suites(tried.suites, f"in {SERVER} ")
    if tried.without_end > MAX_WITHOUT_END * tried.answers:
        yield (
            f"{tried.without_end} of {tried.answers} answers do not end in {SERVER}, where the "
            f"adapter's do"
        )


@contextmanager
def starting_server(script: Path) -> Iterator[Server]:
    """Start a llama-server by its script, wait until it answers, and end it with the block.

    Raises NestedTuneError if it does not begin to answer.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = ["sh", str(script), "--port", str(port)]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
        try:
            _wait_for(process, port)
            version = _call(port, "/props").get("build_info", "of an unknown version")
            yield Server(port, f"{SERVER} {version}")
        except (OSError, HTTPException, KeyError, ValueError) as error:
            log.seek(0)
            said = shorten(log.read().decode(errors="replace")[-400:].strip(), 400)
            end = _describe_end(process)
            raise NestedTuneError(
                f"{SERVER} did not answer ({error}{end}); its last words: {said}"
            ) from error
        finally:
            with suppress(ProcessLookupError):  # it ended by itself
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _describe_end(process: subprocess.Popen[bytes]) -> str:
    """Return by which signal a process ended; empty for one that still runs."""
    code = process.poll()
    return "" if code is None else f", exit code {code}"


def _wait_for(process: subprocess.Popen[bytes], port: int) -> None:
    end = time.monotonic() + START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        try:
            _call(port, "/health")
        except ConnectionError:  # it loads its model
            time.sleep(0.2)
        else:
            return
    raise TimeoutError(f"it does not run, or loads for {START_SECONDS} s")


def _call(port: int, path: str, body: object = None) -> Any:
    """Return what a server here answers as JSON; None reads, any other value is posted."""
    with closing(HTTPConnection("127.0.0.1", port, timeout=ANSWER_SECONDS)) as connection:
        content = None if body is None else json.dumps(body)
        headers = {"Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, content, headers)
        answer = connection.getresponse()
        text = answer.read()
    if answer.status == 503:
        raise ConnectionError(f"{path}: it is not ready")
    if answer.status != 200:
        raise OSError(f"{path}: {answer.status} {text.decode(errors='replace'):.300}")
    return json.loads(text)
