"""mlx_lm's own programs on REGISTRY/NAME/champion, before and after a promotion and a rollback."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from nested_core.pipeline import steps
from nested_core.registry import rollback
from tests.builders.registering import promote, register
from tests.example import DATA, MODEL, generate_answers, train_example

pytestmark = [pytest.mark.reliability, pytest.mark.timeout(900)]
NAME = "capitals"
PROMPT = "I want to see Slovakia. Where to?"
TOKENS = 24


@pytest.fixture(scope="module")
def versions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A registry with two trained versions, the second of which answers in other words."""
    folder = tmp_path_factory.mktemp("champion")
    (folder / "other").mkdir()
    for file in DATA.glob("*.jsonl"):
        (folder / "other" / file.name).write_text(
            file.read_text().replace("Go and see", "Travel to")
        )
    versions = []
    for data in (DATA, folder / "other"):
        finished = train_example(folder / f"run-{data.name}", iters=60, data=str(data))
        steps.judge(finished.config, finished.run)
        versions.append(register(finished.run.path, folder / "registry", NAME, {}))
    return folder / "registry", versions


@pytest.fixture(scope="module")
def answers(versions: tuple[Path, list[str]]) -> dict[str, str]:
    """What the model says with each version, read from the version's own folder."""
    registry, digests = versions
    said = {
        digest: generate_answers(
            str(MODEL), [PROMPT], adapter=registry / NAME / "versions" / digest, max_tokens=TOKENS
        )[0]
        for digest in digests
    }
    untrained = generate_answers(str(MODEL), [PROMPT], max_tokens=TOKENS)[0]
    assert len({untrained, *said.values()}) == 3
    return said


def run_program(name: str, *arguments: object) -> str:
    program = Path(sys.executable).with_name(name)
    command = [str(program), "--model", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def generate(champion: Path, folder: Path) -> str:
    """mlx_lm.generate."""
    options = ("--prompt", PROMPT, "--max-tokens", TOKENS, "--verbose", "False")
    return run_program("mlx_lm.generate", MODEL, "--adapter-path", champion, *options)


def fuse(champion: Path, folder: Path) -> str:
    """mlx_lm.fuse, and what the fused model says without an adapter."""
    fused = folder / f"fused-{time.monotonic_ns()}"
    run_program("mlx_lm.fuse", MODEL, "--adapter-path", champion, "--save-path", fused)
    return generate_answers(str(fused), [PROMPT], max_tokens=TOKENS)[0]


def serve(champion: Path, folder: Path) -> str:
    """mlx_lm.server, asked over HTTP."""
    with server(champion) as url:
        request = {
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": TOKENS,
            "temperature": 0.0,
        }
        reply = ask(f"{url}/v1/chat/completions", request)
    return str(reply["choices"][0]["message"]["content"])


@contextmanager
def server(champion: Path) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = str(Path(sys.executable).with_name("mlx_lm.server"))
    command = [program, "--model", str(MODEL), "--adapter-path", str(champion)]
    process = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--port", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    try:
        url = f"http://127.0.0.1:{port}"
        wait_until_it_answers(f"{url}/health", process)
        yield url
    finally:
        process.kill()
        process.wait()


def wait_until_it_answers(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(url, timeout=5)  # noqa: S310 -- http on this machine
            return
        except OSError:
            assert process.poll() is None, "mlx_lm.server has ended"
            assert time.monotonic() < deadline
            time.sleep(0.2)


def ask(url: str, document: dict[str, Any]) -> dict[str, Any]:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url, json.dumps(document).encode(), headers)  # noqa: S310
    with urllib.request.urlopen(request, timeout=120) as reply:  # noqa: S310
        return dict(json.loads(reply.read()))


@pytest.mark.parametrize("program", [generate, fuse, serve])
def test_program_answers_with_the_champion_before_and_after_it_moves(
    versions, answers, tmp_path, program
) -> None:
    registry, (first, second) = versions
    champion = registry / NAME / "champion"
    promote(registry, NAME, first, by="ann")
    assert answers[first] in program(champion, tmp_path)
    promote(registry, NAME, second, by="ann")
    assert answers[second] in program(champion, tmp_path)
    assert rollback(registry, NAME, by="ann").version == first
    assert answers[first] in program(champion, tmp_path)


def test_a_server_keeps_the_adapter_that_it_has_loaded(versions, answers) -> None:
    registry, (first, second) = versions
    promote(registry, NAME, first, by="ann")
    messages = [{"role": "user", "content": PROMPT}]
    request = {"messages": messages, "max_tokens": TOKENS, "temperature": 0.0}
    with server(registry / NAME / "champion") as url:
        for version in (first, second):
            promote(registry, NAME, version, by="ann")
            reply = ask(f"{url}/v1/chat/completions", request)
            assert reply["choices"][0]["message"]["content"].strip() == answers[first]
