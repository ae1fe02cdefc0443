"""`serve` as a process: what it says, how it ends, and what a kill leaves; mlx_lm's options."""

from __future__ import annotations

import argparse
import ctypes
import http.client
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlx_lm import server as mlx_lm_server

from flows.cli import build_parser
from flows.rooms.serve.command import _list_system_texts
from nested_core.records.dataset import PromptFormat
from nested_core.registry import rollback
from nested_core.rooms.serve.follower import ChampionFollower
from nested_core.rooms.serve.metrics import NameStatus
from tests.example import MODEL
from tests.flows.conftest import PROGRAM, called
from tests.registry_care import audit
from tests.rooms.serve.versions import (
    NAME,
    make_base,
    promote_run,
    serving,
    settings,
    write_version_run,
)
from tests.waiting import wait_until

PR_CAPBSET_DROP, CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH = 24, 1, 2  # linux/prctl.h, capability.h


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A registry with a champion, and its version."""
    folder = tmp_path_factory.mktemp("served")
    base = make_base(MODEL, folder / "base")
    version = promote_run(write_version_run(folder / "run", base, 1), folder / "registry")
    return folder / "registry", version


@contextmanager
def serve_process(
    registry: Path,
    folder: Path,
    begin: Callable[[], None] | None = None,
    program: Sequence[str] = (str(PROGRAM),),
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`nested-tune serve` at a free port, and the address that it said.

    begin: called in the process before the command.
    """
    log = folder / "serve.log"
    command = [*program, "serve", "--registry", str(registry), "--name", NAME, "--port", "0"]
    with log.open("w") as file:
        process = subprocess.Popen(command, stderr=file, cwd=folder, text=True, preexec_fn=begin)  # noqa: PLW1509
    try:
        wait_until(lambda: " at http" in log.read_text(), log.read_text, process)
        found = re.search(r" at (http://127\.0\.0\.1:\d+)", log.read_text())
        assert found is not None
        yield process, found[1]
    finally:
        process.kill()
        process.wait()


def health(address: str) -> Any:
    connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=300)
    connection.request("GET", "/health")
    document = json.load(connection.getresponse())
    connection.close()
    return document


@pytest.mark.slow("starts the command twice")
def test_a_killed_server_leaves_a_sound_registry_and_the_next_one_ends_cleanly(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    registry, version = served
    with serve_process(registry, tmp_path) as (process, address):
        assert health(address)["names"][NAME]["version"] == version
        process.kill()
        process.wait()
    assert audit(registry, NAME).is_sound
    with serve_process(registry, tmp_path) as (process, address):
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    assert "ending: answers under way are finished" in (tmp_path / "serve.log").read_text()


@pytest.mark.slow("starts the command")
def test_interrupts_in_a_row_end_it_with_the_exit_code_of_an_interrupt(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    with serve_process(served[0], tmp_path) as (process, _):
        for _ in range(8):
            process.send_signal(signal.SIGINT)
            time.sleep(0.02)
        assert process.wait() == 130


@pytest.mark.slow("starts the command")
def test_as_json_each_line_of_the_log_is_a_record_and_a_request_is_one(
    served: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_LOG_FORMAT", "json")
    with serve_process(served[0], tmp_path) as (process, address):
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=300)
        for _ in range(3):
            connection.request("POST", "/v1/completions", json.dumps({"prompt": "x"}))
            connection.getresponse().read()
        connection.close()
        process.send_signal(signal.SIGTERM)
        assert process.wait() == 0
    lines = [json.loads(line) for line in (tmp_path / "serve.log").read_text().splitlines()]
    asked = [line for line in lines if "request" in line]
    assert [line["version"] for line in asked] == [served[1]] * 3
    between = lines[lines.index(asked[0]) : lines.index(asked[-1]) + 1]
    ending = [line for line in between if line["message"].startswith("ending: ")]
    assert [line for line in between if line not in ending] == asked


@pytest.mark.slow("starts the command")
def test_sigterm_ends_a_process_whose_generation_stands_still(served, tmp_path) -> None:
    planted = """if True:
        import sys, time
        from flows.cli import main
        from nested_core.rooms.serve import server
        from nested_core.rooms.serve.engine import VersionProvider
        VersionProvider.load = lambda *_: time.sleep(600)
        server.SECONDS_TO_FINISH = 0.0
        sys.exit(main())
    """
    program = (sys.executable, "-c", planted)
    with serve_process(served[0], tmp_path, program=program) as (process, address):
        connection = http.client.HTTPConnection(address.removeprefix("http://"))
        connection.request("POST", "/v1/completions", json.dumps({"prompt": "x"}))
        wait_until(lambda: health(address)["names"][NAME]["requests"] == 1, "it is asked")
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 1
        connection.close()
    assert "ended by force: an answer under way" in (tmp_path / "serve.log").read_text()


@pytest.mark.slow("starts the command")
def test_a_registry_that_is_away_or_closed_is_said_and_followed_again_when_it_is_back(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    registry, first = served
    run = write_version_run(tmp_path / "run", registry.parent / "base", 2)
    away = registry.with_name("away")
    with serve_process(registry, tmp_path, begin=obey_modes) as (_, address):
        assert health(address)["problems"] == []
        registry.rename(away)
        wait_until(lambda: problem(address, "There is no registry"), "it says so")
        assert answered_by(address) == [first] * 3
        assert not registry.exists()  # the server made none in its place
        second = promote_run(run, away)
        away.rename(registry)
        wait_until(lambda: answered_by(address)[-1] == second, "it follows again")
        wait_until(lambda: health(address)["problems"] == [], "no problem is left")
        registry.chmod(0)
        try:
            wait_until(lambda: problem(address, "Permission denied"), "it says so")
            assert answered_by(address) == [second] * 3
            assert health(address)["status"] == "ok"
        finally:
            registry.chmod(0o755)
        rollback(registry, NAME, to=first, by="a test")
        wait_until(lambda: answered_by(address)[-1] == first, "it follows again")
        wait_until(lambda: health(address)["problems"] == [], "nothing is in the way")
    assert audit(registry, NAME).is_sound


def obey_modes() -> None:
    """Have root obey the modes of files, as every other user does."""
    if sys.platform == "linux":
        for capability in (CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH):
            ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, capability, 0, 0, 0)


def problem(address: str, words: str) -> bool:
    """Whether `/health` names a problem with these words."""
    return any(words in text for text in health(address)["problems"])


def answered_by(address: str) -> list[str | None]:
    """The versions that answer three requests."""
    body = json.dumps({"prompt": "I want to see Italy.", "max_tokens": 2})
    versions = []
    for _ in range(3):
        connection = http.client.HTTPConnection(address.removeprefix("http://"), timeout=300)
        connection.request("POST", "/v1/completions", body)
        response = connection.getresponse()
        assert response.status == 200
        response.read()
        versions.append(response.headers["X-Adapter-Version"])
        connection.close()
    return versions


@pytest.mark.slow("starts the command twice")
def test_two_servers_of_a_name_both_follow(served: tuple[Path, str], tmp_path: Path) -> None:
    registry, first = served
    run = write_version_run(tmp_path / "run", registry.parent / "base", 2)
    with (
        serve_process(registry, tmp_path) as (_, address),
        serving(settings(registry, "--name", NAME)) as here,
    ):
        second = promote_run(run, registry)
        for ask in (lambda: health(address), here.health):
            wait_until(lambda ask=ask: ask()["names"][NAME]["version"] == second)  # type: ignore[misc]
    rollback(registry, NAME, to=first, by="a test")


def test_a_name_without_a_champion_a_damaged_one_and_another_base_are_refused(
    served: tuple[Path, str], tmp_path: Path
) -> None:
    registry, version = served
    unknown = called("serve", "--registry", registry, "--name", "rivers", cwd=tmp_path)
    for port in (80000, -1):
        far = called("serve", "--registry", registry, "--name", NAME, "--port", port, cwd=tmp_path)
        assert (far.code, f":{port} cannot be listened at" in far.stderr) == (2, True)
    assert (unknown.code, "no adapter named 'rivers'" in unknown.stderr) == (2, True)
    other = called(
        "serve", "--registry", registry, "--name", NAME, "--model", MODEL, "--port", 0, cwd=tmp_path
    )
    assert (other.code, "was made for the base sha256:" in other.stderr) == (2, True)
    weights = registry / NAME / "versions" / version / "adapters.safetensors"
    content = weights.read_bytes()
    weights.chmod(0o644)
    try:
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        damaged = called("serve", "--registry", registry, "--name", NAME, cwd=tmp_path)
    finally:
        weights.write_bytes(content)
        weights.chmod(0o444)
    assert (damaged.code, "is not what was registered" in damaged.stderr) == (6, True)


def test_the_options_are_those_of_mlx_lm_with_its_defaults(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[argparse.Namespace] = []
    monkeypatch.setattr(mlx_lm_server, "ModelProvider", lambda options: options)
    monkeypatch.setattr(mlx_lm_server, "run", lambda host, port, options: taken.append(options))
    monkeypatch.setattr(mlx_lm_server, "maybe_set_recommended_wired_limit", lambda: None)
    monkeypatch.setattr(logging, "basicConfig", lambda **options: None)
    sizes = ["--prompt-cache-bytes", "2GB", "--allowed-origins", "http://a,http://b"]
    monkeypatch.setattr(sys, "argv", ["mlx_lm.server", *sizes])
    mlx_lm_server.main()
    ours = vars(build_parser().parse_args(["serve", "--name", NAME, *sizes]))
    theirs = vars(taken[0])
    assert theirs.keys() - ours.keys() == {"adapter_path", "pipeline"}
    assert ours.keys() - theirs.keys() == {
        *("command", "debug", "run"),
        *("registry", "name", "log_format", "no_api_key"),
    }
    assert {key: ours[key] for key in theirs if key in ours} == {
        key: value for key, value in theirs.items() if key in ours
    }


def test_origins_may_be_apart_by_spaces() -> None:
    flags = ["--name", NAME, "--allowed-origins", "http://a, http://b"]
    assert build_parser().parse_args(["serve", *flags]).allowed_origins == ["http://a", "http://b"]


@pytest.mark.slow("a process that loads a model")
def test_serving_imports_no_prefect() -> None:
    code = (
        "import sys, flows.cli, flows.rooms.serve.command, nested_core.rooms.serve.server\n"
        "flows.cli.build_parser()\n"
        "print([name for name in sys.modules if name.split('.')[0] == 'prefect'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).resolve().parents[3],
        env=dict(os.environ),
    )
    assert done.stdout.strip() == "[]"


def test_it_says_which_system_text_the_rows_of_a_version_have(
    served, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry, version = served
    generator: Any = SimpleNamespace(require_sound=lambda _: None)
    follower = ChampionFollower(registry, registry.parent / "base", generator)
    server: Any = SimpleNamespace(follower=follower)
    follower.names[NAME] = NameStatus(follower._read_sound_version(NAME, version))
    assert list(_list_system_texts(server)) == []
    read = PromptFormat.read

    def read_with_text(recorded: Path) -> PromptFormat:
        assert recorded.parent.name == version
        return replace(read(recorded) or PromptFormat(), system="Say a city.")

    monkeypatch.setattr(PromptFormat, "read", read_with_text)
    follower.names[NAME] = NameStatus(follower._read_sound_version(NAME, version))
    (line,) = _list_system_texts(server)
    assert line == f"{NAME}: its training rows begin with a system text; send it too: Say a city."
