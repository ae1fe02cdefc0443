"""README's commands, and those of docs/first-hour.md, as printed."""

from __future__ import annotations

import http.client
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from nested_core.registry import read_champion
from tests.example import DATA, MODEL, generate_answers
from tests.flows.conftest import PROGRAM
from tests.left_out import needs_rooms
from tests.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
QUESTION = "I want to see Slovakia. Where to?"


def read_commands(document: str, data: str, **words: str) -> list[list[str]]:
    """The block of a document that begins with `nested-tune init --data DATA`, in words.

    words: what stands in place of others.
    """
    text = (ROOT / document).read_text()
    pattern = rf"^```\n(nested-tune init +--data {data}\b.*?)^```"
    (block,) = re.findall(pattern, text, re.MULTILINE | re.DOTALL)
    joined = re.sub(r"(?: \\)?\n +", " ", block)  # an indented line goes on with the one before
    lines = [shlex.split(line, comments=True) for line in joined.splitlines()]
    return [[words.get(word, word) for word in line] for line in lines]


def ask(address: str, curl: list[str]) -> tuple[str, str | None]:
    """The answer to what curl asks, and the version that the server names."""
    _, url, option, content = curl
    host, slash, path = url.partition("/")
    assert (host, option) == ("127.0.0.1:8080", "-d")  # the port of `serve` without --port
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=300)
    headers = {"Content-Type": "application/x-www-form-urlencoded"}  # as curl sends it
    connection.request("POST", slash + path, content, headers)
    response = connection.getresponse()
    version = response.headers["X-Adapter-Version"]
    answer = json.load(response)["choices"][0]["message"]["content"]
    connection.close()
    return str(answer), version


def run_all(commands: list[list[str]], cwd: Path) -> list[str]:
    """What each command prints, each in a process of its own, where the question is asked."""
    printed = []
    for program, *arguments in commands:
        assert program == "nested-tune"
        done = subprocess.run(
            [str(PROGRAM), *arguments],
            cwd=cwd,
            input=f"{QUESTION}\n",
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        printed.append(done.stdout)
    return printed


def ask_server(serve: list[str], curl: list[str], cwd: Path) -> tuple[str, str | None]:
    """The answer of a server that is started for one question, and the version that it names."""
    log = cwd / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(PROGRAM), *serve[1:], "--port", "0"], stderr=file, cwd=cwd, text=True
        )
    try:
        wait_until(lambda: " at http" in log.read_text(), log.read_text, process)
        (address,) = re.findall(r" at (http://127\.0\.0\.1:\d+)", log.read_text())
        return ask(address, curl)
    finally:
        process.kill()
        process.wait()


@needs_rooms("planning", "chat")
@pytest.mark.slow("five commands, each a process")
def test_the_readme_s_five_commands_run_as_they_are_and_end_with_a_right_answer(tmp_path) -> None:
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    commands = read_commands("README.md", r"examples/geography")
    assert [command[:2] for command in commands] == [
        ["nested-tune", word] for word in ("init", "explain", "train", "promote", "chat")
    ]
    *_, answers = run_all(commands, tmp_path)
    assert read_champion(tmp_path / "registry", "capitals") is not None
    assert "adapter: Go and see Bratislava, the capital of Slovakia!" in answers.splitlines()


@needs_rooms("planning", "serve")
@pytest.mark.slow("seven commands, each a process")
def test_seven_commands_make_a_served_champion_and_a_folder_of_sharegpt_rows(tmp_path) -> None:
    names = {"user": "human", "assistant": "gpt"}
    with (tmp_path / "chats.jsonl").open("w") as file:
        for line in (DATA / "train.jsonl").read_text().splitlines():
            turns = json.loads(line)["messages"]
            turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in turns]
            file.write(f"{json.dumps({'conversations': turns})}\n")
    *commands, serve, curl = read_commands("docs/first-hour.md", "chats.jsonl", MODEL=str(MODEL))
    assert [command[:2] for command in (*commands, serve)] == [
        ["nested-tune", word]
        for word in ("init", "explain", "train", "promote", "chat", "export", "serve")
    ]
    first, *_, chat, export = run_all(commands, tmp_path)
    assert "sharegpt" in (tmp_path / "chats.yaml").read_text()
    assert "of the gain" in export
    (exported,) = generate_answers(str(tmp_path / "my-model"), [QUESTION])
    answer, version = ask_server(serve, curl, tmp_path)
    assert version == read_champion(tmp_path / "registry", "my-chats")
    (said,) = [line for line in chat.splitlines() if line.startswith("adapter: ")]
    assert exported == answer == said.removeprefix("adapter: ")
    assert answer.startswith("Go and see")
