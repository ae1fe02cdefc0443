"""The help: every command in a group, an example that parses, the common flags, 80 columns."""

from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from flows import cli
from flows.cli import build_parser, main
from flows.commands.help_pages import COMMON_FLAGS, is_key_flag
from nested_core.seams import is_there

EXAMPLES = {
    name: str(parser.description).rpartition("Example: ")[2]
    for name, parser in build_parser().commands.items()
}
WITH_KEYS = ("validate", "train", "run", *(("explain",) if is_there("planning") else ()))


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command line that asks for help prints."""
    with pytest.raises(SystemExit, match="^0$"):
        main(words)
    return capsys.readouterr().out


@pytest.mark.parametrize("command", EXAMPLES)
def test_the_example_of_a_command_parses(command: str) -> None:
    program, *words = shlex.split(EXAMPLES[command])
    parsed = build_parser().parse_args(words)
    assert (program, parsed.command) == ("nested-tune", command)


def test_the_help_fits_80_columns_and_lists_every_command(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    helps = [printed(capsys, "--help"), *(printed(capsys, name, "--help") for name in EXAMPLES)]
    assert [line for text in helps for line in text.splitlines() if len(line) > 80] == []
    assert [name for name in EXAMPLES if f"\n  {name} " not in helps[0]] == []
    assert "130 interrupted at once" in helps[1]


@pytest.mark.parametrize("command", WITH_KEYS)
def test_help_shows_the_common_flags_and_help_all_every_one(command, capsys) -> None:
    flags = {
        action.option_strings[-1]
        for action in build_parser().commands[command]._actions
        if is_key_flag(action) and action.help != "==SUPPRESS=="
    }
    assert len(flags) > 90
    short, whole = printed(capsys, command, "--help"), printed(capsys, command, "--help-all")
    shown = {flag for flag in flags if f"{flag} " in short or f"{flag}\n" in short}
    assert shown == flags & set(COMMON_FLAGS)
    assert [flag for flag in flags if flag not in whole] == []


def test_each_command_is_listed_under_the_module_that_adds_it_and_loads_it_alone() -> None:
    modules = cli.list_command_modules()
    for module, names in modules.items():
        assert [*build_parser(names[0]).commands] == [*names], module
    listed = [name for names in modules.values() for name in names]
    assert sorted(build_parser().commands) == sorted(listed)
    code = "import sys, flows.cli; flows.cli.build_parser('promote'); print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "flows.commands.registry" in loaded.stdout.split()
    assert not {"flows.commands.training", "pydantic"} & set(loaded.stdout.split())
