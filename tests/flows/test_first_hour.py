"""The commands of docs/first-hour.md, in their order, on the example."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from string import Template

import pytest

from flows.cli import main

ROOT = Path(__file__).resolve().parents[2]


def commands_of(document: Path) -> list[list[str]]:
    """The commands of a document's sh blocks, with the variables that the blocks set."""
    variables: dict[str, str] = {}
    commands = []
    for block in re.findall(r"^```sh\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", "").splitlines():
            words = shlex.split(Template(line).substitute(variables), comments=True)
            name, is_assignment, value = words[0].partition("=")
            if is_assignment:
                variables[name] = value
            else:
                commands.append(words)
    return commands


@pytest.mark.reliability
def test_the_first_hour_ends_with_right_answers_and_goes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    commands = commands_of(ROOT / "docs" / "first-hour.md")
    assert len(commands) == 14
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    printed = {}
    for program, *arguments in commands:
        assert program == "nested-tune"
        assert main(arguments) == 0, shlex.join(arguments)
        printed[shlex.join(arguments)] = capsys.readouterr().out
    (answers,) = [text for command, text in printed.items() if command.startswith("chat")]
    assert "Bratislava, the capital of Slovakia" in answers
    compared = printed["compare runs/first runs/second"]
    assert re.search(r"lora_parameters.rank\W+8\W+32", compared)
    first = printed["train -c lora.yaml --run-dir runs/first"]
    assert "passed, better loss; no questions asked: 84 of 84" in first
    assert "validation loss 7.965 -> 0.0197" in first
    versions = re.findall(r"promoted: (\w+)", "".join(printed.values()))
    assert len(set(versions)) == 2
    assert f"rolled_back: {versions[0]}" in printed["rollback my-adapter"]
    assert (tmp_path / "registry/my-adapter/champion").resolve().name.startswith(versions[0])
