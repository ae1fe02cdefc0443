"""In a terminal, init asks which columns are the question and the answer."""

from __future__ import annotations

import os
import pty
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from flows.cli import build_parser
from flows.rooms.tables.command import prepare
from nested_core.errors import ConfigError
from tests.rooms.tables.test_table_mistakes import TICKETS


def ask(
    folder: Path, typed: Sequence[str], monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, int], str]:
    """Prepare the tickets with standard input and standard error on a terminal.

    Returns the rows of each split, and what stands on the terminal then.
    """
    monkeypatch.chdir(folder)
    (folder / "tickets.csv").write_text(TICKETS)
    outer, inner = pty.openpty()
    try:
        os.write(outer, "".join(f"{line}\n" for line in typed).encode() or b"\x04")
        with os.fdopen(os.dup(inner)) as stdin, os.fdopen(os.dup(inner), "w") as stderr:
            monkeypatch.setattr(sys, "stdin", stdin)
            monkeypatch.setattr(sys, "stderr", stderr)
            words = ("init", "--data", "tickets.csv", "--model", "MODEL", "--minutes", "5")
            made = prepare(build_parser("init").parse_args(words)).made
            stderr.flush()
            return dict(made.rows) if made else {}, os.read(outer, 65_536).decode()
    finally:
        os.close(outer)
        os.close(inner)


def test_the_columns_are_asked_for_and_the_command_without_questions_is_shown(
    tmp_path, monkeypatch
) -> None:
    rows, shown = ask(tmp_path, ["Description", "Triage", "Sort tickets."], monkeypatch)
    assert rows == {"train": 24, "valid": 3, "test": 3}
    first = (tmp_path / "tickets-split" / "train.jsonl").read_text().splitlines()[0]
    assert '{"role": "system", "content": "Sort tickets."}' in first
    assert '"role": "user", "content": "My parcel ' in first
    words = shlex.split(shown.partition("The same without questions:")[2].split("\n")[1])
    assert words[words.index("--completion-feature") + 1] == "Triage"
    assert words[words.index("--system") + 1] == "Sort tickets."
    assert words[words.index("--minutes") + 1] == "5.0"


def test_enter_takes_the_columns_that_look_like_it(tmp_path, monkeypatch) -> None:
    ask(tmp_path, ["", "", ""], monkeypatch)
    first = (tmp_path / "tickets-split" / "train.jsonl").read_text().splitlines()[0]
    assert first.startswith('{"messages": [{"role": "user", "content": "My parcel ')


def test_no_answer_is_told_with_the_command_that_needs_none(tmp_path, monkeypatch) -> None:
    with pytest.raises(ConfigError, match=r"Nothing was answered.* --prompt-feature Description "):
        ask(tmp_path, [], monkeypatch)
    assert [path.name for path in tmp_path.iterdir()] == ["tickets.csv"]
