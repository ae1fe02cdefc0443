"""The README's six commands and its curl, from a folder of examples to a served answer."""

from __future__ import annotations

import http.client
import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from nested_core.registry import read_champion
from tests.example import DATA, MODEL
from tests.flows.conftest import PROGRAM
from tests.waiting import wait_until

README = Path(__file__).resolve().parents[2] / "README.md"


def read_commands() -> list[list[str]]:
    """The block of the README that begins with `nested-tune init`, with the example's folders."""
    (block,) = re.findall(
        r"^```\n(nested-tune init .*?)^```", README.read_text(), re.MULTILINE | re.DOTALL
    )
    folders = {"DATA": str(DATA), "MODEL": str(MODEL)}
    lines = [shlex.split(line, comments=True) for line in block.splitlines()]
    return [[folders.get(word, word) for word in line] for line in lines]


def ask(address: str, curl: list[str], question: str) -> tuple[str, str | None]:
    """The answer to a question asked as curl asks it, and the version that the server names."""
    _, url, option, content = curl
    host, slash, path = url.partition("/")
    assert (host, option) == ("127.0.0.1:8080", "-d")  # the port of `serve` without --port
    body = json.loads(content)
    body["messages"][0]["content"] = question
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=300)
    headers = {"Content-Type": "application/x-www-form-urlencoded"}  # as curl sends it
    connection.request("POST", slash + path, json.dumps(body), headers)
    response = connection.getresponse()
    version = response.headers["X-Adapter-Version"]
    answer = json.load(response)["choices"][0]["message"]["content"]
    connection.close()
    return str(answer), version


@pytest.mark.slow("six commands, each a process")
def test_the_readme_s_six_commands_end_with_an_answer_of_ones_own_adapter(tmp_path: Path) -> None:
    *commands, serve, curl = read_commands()
    assert [command[:2] for command in (*commands, serve)] == [
        ["nested-tune", word] for word in ("init", "explain", "train", "promote", "chat", "serve")
    ]
    for _, *arguments in commands:
        done = subprocess.run(
            [str(PROGRAM), *arguments],
            cwd=tmp_path,
            input="I want to see Slovakia. Where to?\n",
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        assert done.returncode == 0, done.stderr
    log = tmp_path / "serve.log"
    with log.open("w") as file:
        process = subprocess.Popen(
            [str(PROGRAM), *serve[1:], "--port", "0"], stderr=file, cwd=tmp_path, text=True
        )
    try:
        wait_until(lambda: " at http" in log.read_text(), log.read_text, process)
        (address,) = re.findall(r" at (http://127\.0\.0\.1:\d+)", log.read_text())
        answer, version = ask(address, curl, "I want to see Slovakia. Where to?")
    finally:
        process.kill()
        process.wait()
    assert version == read_champion(tmp_path / "registry", "support-bot")
    assert "Go and see" in answer
