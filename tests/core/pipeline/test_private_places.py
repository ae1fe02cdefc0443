"""Rows stay where this user alone may read: in runs, the registry, the cache and pages."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nested_core.pipeline.finetune import finetune
from nested_core.report.run_report import read_report
from nested_core.storage.atomic import private_mode, write_bytes, write_page
from nested_core.storage.run_directory import RunDirectory, open_run
from nested_core.storage.untrusted_files import append_regular
from tests.example import DATA, example_config

NOBODY = 65534
# Prints, as another user, each file below a folder that can be read and has one of the texts.
READER = """
import json, os, sys
folder, user = sys.argv[1], int(sys.argv[2])
os.setgid(user)
os.setuid(user)
texts = [text.encode() for text in json.load(sys.stdin)]
for path, _, files in os.walk(folder):
    for file in files:
        try:
            content = open(os.path.join(path, file), "rb").read()
        except OSError:
            continue
        print("row" if any(text in content for text in texts) else "read", os.path.join(path, file))
"""


@pytest.fixture
def open_umask() -> Iterator[None]:
    """The umask of most machines, under which everybody reads what a program writes."""
    before = os.umask(0o022)
    yield
    os.umask(before)


@pytest.fixture
def open_folder(open_umask: None) -> Iterator[Path]:
    """A folder that another user may look into, and above which nothing is closed."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize(
    ("umask", "above", "of_run", "of_page"),
    [
        (0o022, 0o755, 0o700, 0o600),
        (0o022, 0o1777, 0o700, 0o600),  # /tmp
        (0o002, 0o2775, 0o770, 0o660),  # a group's
        (0o077, 0o775, 0o700, 0o600),
    ],
)
def test_what_holds_rows_is_its_owners_or_its_groups(
    tmp_path: Path, umask: int, above: int, of_run: int, of_page: int
) -> None:
    folder = tmp_path / "above"
    folder.mkdir()
    folder.chmod(above)
    before = os.umask(umask)
    try:
        with RunDirectory(folder / "run").locked():
            write_page(folder / "page.html", "rows")
            append_regular(folder / "answers.jsonl", b"rows")
            write_bytes(folder / "other", b"no rows")
    finally:
        os.umask(before)
    assert mode(folder / "run") & 0o777 == of_run
    assert (mode(folder / "page.html"), mode(folder / "answers.jsonl")) == (of_page, of_page)
    assert mode(folder / "other") == 0o666 & ~umask


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to give a folder to another group")
def test_rows_are_not_a_group_s_that_may_not_write_above(tmp_path: Path) -> None:
    tmp_path.chmod(0o775)
    assert private_mode(tmp_path) == 0o770
    os.chown(tmp_path, -1, os.getegid() + 1)
    assert private_mode(tmp_path) == 0o700
    tmp_path.chmod(0o2775)
    assert private_mode(tmp_path) == 0o770


def test_a_folder_that_was_there_keeps_its_mode(tmp_path: Path, open_umask: None) -> None:
    (tmp_path / "run").mkdir()
    with RunDirectory(tmp_path / "run").locked():
        assert mode(tmp_path / "run") == 0o755
    assert private_mode(tmp_path) == 0o700


@pytest.mark.slow("trains a run, and looks at it as another user")
@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to be another user")
def test_another_user_reads_no_row_of_a_run_registry_cache_or_page(
    open_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NESTED_TUNE_CACHE", str(open_folder / "cache"))
    monkeypatch.chdir(open_folder)
    registry = {"path": "registry", "name": "capitals", "promote": "always"}
    result = finetune(example_config(iters=4, registry=registry), open_run("runs/first"))
    assert result.version is not None
    read_report(Path("runs/first")).write(Path("page.html"))
    lines = [line for file in DATA.glob("*.jsonl") for line in file.read_text().splitlines()]
    texts = [turn["content"] for line in lines for turn in json.loads(line)["messages"]]

    def read_by(user: int) -> list[str]:
        command = [sys.executable, "-c", READER, str(open_folder), str(user)]
        done = subprocess.run(
            command, input=json.dumps(texts), cwd="/", capture_output=True, text=True, check=True
        )
        return done.stdout.splitlines()

    assert [line for line in read_by(0) if line.startswith("row")] != []
    read = [line.replace(str(open_folder), "") for line in read_by(NOBODY)]
    assert [line for line in read if line.startswith("row")] == []
    assert [line for line in read if "/registry/" not in line] == []
