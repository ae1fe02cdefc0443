"""SECURITY.md has a line for every key that can name something; a new key fails without one."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest

from flows.finetune import FinetuneParameters
from nested_core.config.key_properties import iterate_keys
from nested_core.config.section_base import Section, key

ROOT = Path(__file__).resolve().parents[1]
SECURITY = ROOT / "SECURITY.md"


@pytest.mark.parametrize(
    ("code", "rule"),
    [
        ("import pickle", "TID251"),
        ("import yaml\nyaml.load(x)", "S506"),
        ("import subprocess\nsubprocess.run(x, shell=True)", "S602"),
    ],
)
def test_the_linter_refuses_code_that_runs_what_it_reads(code: str, rule: str) -> None:
    place = str(ROOT / "nested_core" / "new.py")
    words = ["check", "--output-format=json", "--stdin-filename", place, "-"]
    command = [sys.executable, "-m", "ruff", *words]
    done = subprocess.run(command, input=code, capture_output=True, text=True, cwd=ROOT)
    assert rule in {found["code"] for found in json.loads(done.stdout)}


def can_name_something(annotation: Any) -> bool:
    """Whether a key's value can be text or a switch; numbers and fixed words name nothing."""
    if get_origin(annotation) is Literal:
        return False
    parts = get_args(annotation)
    if annotation in (str, bool, Any) or get_origin(annotation) is dict:
        return True
    return any(can_name_something(part) for part in parts if isinstance(part, type) or part)


def keys_that_can_name_something(section: type[Section]) -> set[str]:
    keys = [each for each in iterate_keys(section) if each.section is None]
    return {each.name for each in keys if can_name_something(each.field.annotation)}


def rows() -> list[list[str]]:
    """The table's rows, a list of cells each."""
    chapter = SECURITY.read_text().split("### What parameters may name")[1].split("\n#")[0]
    lines = [line for line in chapter.splitlines() if line.startswith("| `")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def keys_with_a_line() -> list[str]:
    return [name for cells in rows() for name in re.findall(r"`([^`]+)`", cells[0])]


def test_every_key_that_can_name_something_has_one_line() -> None:
    listed = keys_with_a_line()
    assert len(listed) == len(set(listed))
    assert set(listed) == keys_that_can_name_something(FinetuneParameters)
    assert all(len(cells) == 4 and all(cells) for cells in rows())


def test_a_key_of_a_path_says_that_paths_are_checked() -> None:
    checkers = {name: cells[3] for cells in rows() for name in re.findall(r"`([^`]+)`", cells[0])}
    paths = {
        each.name
        for each in iterate_keys(FinetuneParameters)
        if isinstance(each.field.json_schema_extra, dict) and "path" in each.field.json_schema_extra
    }
    assert {name for name in paths if "with_allowed_paths" in checkers[name]} == paths
    named = {pair for cells in rows() for pair in re.findall(r"`(?:(\w+)\.)?(\w+)`", cells[3])}
    assert {name for room, name in named if not is_defined(name, room)} == set()


def is_defined(name: str, room: str) -> bool:
    """Whether there is such a function, in a room where one is named; a deleted room's count."""
    folder = ROOT / "nested_core" / ("rooms" if room else "") / room
    files = [*folder.rglob("*.py"), *(() if room else (ROOT / "flows").rglob("*.py"))]
    found = any(re.search(rf"^def {name}\(", path.read_text(), re.MULTILINE) for path in files)
    return found or bool(room and not folder.exists())


def test_a_function_that_is_not_defined_is_found() -> None:
    assert is_defined("with_allowed_paths", "")
    assert is_defined("with_allowed_paths_of_old", "no_such_room")
    assert not is_defined("with_allowed_paths_of_old", "")
    assert not is_defined("with_allowed_paths_of_old", ".")  # in none of the rooms


def test_a_new_key_is_found() -> None:
    class Inner(Section):
        """A section with keys of each sort."""

        address: str | None = key(None, "a service")
        words: tuple[str, ...] = key((), "texts")
        anything: dict[str, Any] = key({}, "whatever")
        switch: bool = key(False, "a switch")
        number: int | None = key(None, "a number")
        word: Literal["a", "b"] = key("a", "fixed")

    class Outer(Section):
        """A section in a list."""

        inner: tuple[Inner, ...] = key((), "several")

    assert keys_that_can_name_something(Outer) == {
        "inner.address",
        "inner.words",
        "inner.anything",
        "inner.switch",
    }
