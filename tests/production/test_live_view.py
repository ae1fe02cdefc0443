"""The live view in a real terminal: tmux at two sizes, resized, NO_COLOR, TERM=dumb, and piped."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.example import write_config

pytestmark = [
    pytest.mark.production,
    pytest.mark.timeout(600),
    pytest.mark.skipif(shutil.which("tmux") is None, reason="there is no tmux"),
]
PROGRAM = f"{shlex.quote(sys.executable)} -m flows.cli"
ROOT = Path(__file__).resolve().parents[2]
SECONDS = 180
# 39 and 49, with which tmux ends what is bold, are the terminal's own colours.
COLOUR = re.compile("\x1b\\[[0-9;]*?(?:3[0-8]|4[0-8]|9[0-7]|10[0-7])[;m]")


class Terminal:
    """A tmux server of its own with one window."""

    def __init__(self, socket: Path, width: int, height: int) -> None:
        self._tmux = ["tmux", "-f", "/dev/null", "-S", str(socket)]
        self.tmux("new-session", "-d", "-x", str(width), "-y", str(height), "-s", "a", "bash")
        self.type(
            f"export PYTHONPATH={shlex.quote(str(ROOT))} PS1='$ '; unset COLUMNS LINES; clear"
        )

    def tmux(self, *arguments: str) -> str:
        command = [*self._tmux, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    def type(self, line: str) -> None:
        self.tmux("send-keys", "-t", "a", line, "Enter")

    def screen(self, *, with_history: bool = False, with_colours: bool = False) -> str:
        options = [*(["-S", "-200"] if with_history else []), *(["-e"] if with_colours else [])]
        return self.tmux("capture-pane", "-p", "-t", "a", *options)

    def wait_for(self, *words: str, with_history: bool = False) -> str:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline:
            screen = self.screen(with_history=with_history)
            if all(word in screen for word in words):
                return screen
            time.sleep(0.1)
        raise AssertionError(f"{words} did not appear:\n{self.screen(with_history=True)}")


@pytest.fixture
def terminal(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Terminal]:
    width, height = getattr(request, "param", (80, 24))
    terminal = Terminal(tmp_path / "tmux", width, height)
    yield terminal
    terminal.tmux("kill-server")


def configuration(folder: Path, **changes: object) -> str:
    settings = {"iters": 120, "batch_size": 8, "steps_per_eval": 20, "val_batches": -1} | changes
    path = write_config(folder / "config.yaml", **settings)
    return f"{PROGRAM} train -c {path} --run-dir {folder / 'run'}"


@pytest.mark.parametrize("terminal", [(80, 24), (200, 50)], indirect=True)
def test_a_run_is_watched_and_its_last_screen_stays(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type(configuration(tmp_path))
    watched = terminal.wait_for("of 120", "tokens/s", "updates: tier 0", " left")
    assert "step 120\n" in watched.replace(" \n", "\n")  # the axis ends where the run will
    last = terminal.wait_for("adapter: ", "passed, better loss; ", with_history=True)
    for words in ("selected: the adapter of step", "verdict: passed", "peak memory", "expected:"):
        assert words in last
    assert last.count("· training loss   o validation loss") == 1
    assert (
        last.index("· training loss")
        < last.index("selected: ")
        < last.index("passed, better loss; ")
    )


@pytest.mark.parametrize("exported", ["", "COLUMNS=80 LINES=24 "])
def test_a_resize_leaves_one_whole_screen(terminal, tmp_path, exported) -> None:
    terminal.type(f"{exported}{configuration(tmp_path, iters=600)}")
    terminal.wait_for("updates: tier 0")
    for width, height in ((200, 50), (60, 20), (100, 30)):
        terminal.tmux("resize-window", "-t", "a", "-x", str(width), "-y", str(height))
        time.sleep(1.5)
        lines = terminal.wait_for("train ", "+----", "updates: tier 0").splitlines()
        assert sum("train " in line and "%" in line for line in lines) == 1
        assert sum("+----" in line for line in lines) == 1
        assert max(map(len, lines)) <= width
    terminal.tmux("send-keys", "-t", "a", "C-c")
    terminal.wait_for("--resume")


def test_no_color_has_none(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type(f"NO_COLOR=1 {configuration(tmp_path)}")
    terminal.wait_for("updates: tier 0")
    assert COLOUR.search(terminal.screen(with_colours=True)) is None


def test_a_dumb_terminal_gets_lines(terminal: Terminal, tmp_path: Path) -> None:
    terminal.type(f"TERM=dumb {configuration(tmp_path)}")
    terminal.wait_for("tokens/s", "step 120 of 120", with_history=True)
    assert "+----" not in terminal.screen(with_history=True)


def test_a_pipe_gets_lines_without_a_control_character(tmp_path: Path) -> None:
    command = configuration(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "FORCE_COLOR": "1", "CI": "true"}
    done = subprocess.run(
        shlex.split(command), env=environment, capture_output=True, text=True, check=True
    )
    assert "\x1b[2K" not in done.stderr
    assert "step 120 of 120" in done.stderr
    assert "selected: the adapter of step" in done.stderr
